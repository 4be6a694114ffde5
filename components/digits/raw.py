"""`python -m components.digits.raw`: write the raw handwriting to `data/` from scikit-learn's copy of the UCI set.

Run once, for `data.dvc` to version; `make data` fetches the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from components.errors import DataError
from components.io import write_text
from components.process import exit_from
from components.records.paths import RAW

SIDE = 8  # pixels per side of a raw digit
DEPTH = 16  # maximum pixel value
COUNT = 1797
FILE = "digits.csv"
HEADER = ",".join(["label", *(f"p{row}{column}" for row in range(SIDE) for column in range(SIDE))])

ATTRIBUTION = """\
digits.csv: 1,797 handwritten digits, 8 x 8 pixels of 0..16, one a line after its label.

"Optical Recognition of Handwritten Digits" (1998), E. Alpaydin and C. Kaynak, UCI Machine Learning Repository,
https://doi.org/10.24432/C50P49. The test part of that set, as shipped in scikit-learn (sklearn.datasets.load_digits).
Changed: the format only. 43 people wrote the whole set; the 13 of this part are not told apart in it.
"""

LICENSE = """\
digits.csv is licensed under the Creative Commons Attribution 4.0 International License (CC BY 4.0),
https://creativecommons.org/licenses/by/4.0/legalcode. You may share and adapt it for any purpose, also commercially,
if you credit the authors (see ATTRIBUTION), link to the licence and say what you changed. No warranties are given.
"""


def write(folder: Path = RAW) -> Path:
    """Write `digits.csv`, `ATTRIBUTION` and `LICENSE-DATA` into `folder`: the same bytes each time."""
    from sklearn.datasets import load_digits  # only here: `prepare` needs no scikit-learn

    digits = load_digits()
    table = np.column_stack([digits.target, digits.data]).astype(int)
    lines = [HEADER, *(",".join(map(str, line)) for line in table.tolist())]
    write_text(folder / "ATTRIBUTION", ATTRIBUTION)
    write_text(folder / "LICENSE-DATA", LICENSE)
    write_text(folder / FILE, "\n".join(lines) + "\n")
    return folder / FILE


def read(folder: Path = RAW) -> tuple[np.ndarray, np.ndarray]:
    """Digits (1797, 8, 8) uint8 in 0..16, and labels (1797,). Raises DataError if the file is missing or damaged."""
    path = folder / FILE
    try:
        table = np.array([line.split(",") for line in path.read_text(encoding="utf-8").splitlines()[1:]], dtype=np.int64)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; `git checkout data.dvc && make data` brings it") from None
    except (ValueError, OverflowError, IsADirectoryError, NotADirectoryError) as error:
        raise DataError(f"{path} is damaged ({error}); {_restore_hint(path)}") from None
    if table.shape != (COUNT, 1 + SIDE**2) or table.min() < 0 or table[:, 1:].max() > DEPTH or table[:, 0].max() > 9:
        raise DataError(f"{path} does not hold {COUNT} digits of {SIDE} x {SIDE}; {_restore_hint(path)}")
    return table[:, 1:].reshape(-1, SIDE, SIDE).astype(np.uint8), table[:, 0]


def _restore_hint(path: Path) -> str:
    return f"`git checkout data.dvc && dvc checkout --force {path}` brings it back"


def main() -> None:
    path = write()
    print(f"raw: {COUNT} handwritten digits, {path.stat().st_size / 2**10:.0f} KiB -> {path}")


if __name__ == "__main__":
    exit_from(main)
