"""Records of stage `check_rows`."""

from __future__ import annotations

from components.records.paths import Split
from components.records.record import Record


class TriedSplit(Record):
    samples: int  # samples of the data set
    usable: int
    cut: int  # usable samples cut to the turns that fit
    resized: int  # usable samples whose images are resized
    left_out: dict[str, int]  # reason -> samples
    tokens: int  # tokens of the usable samples, maximum over models
    response_tokens: int  # response tokens of the usable samples, which carry the loss
    longest: int


class TriedRows(Record):
    """artifacts/rows/rows.json: result of encoding every row with the models' tokenizers, templates and image sizes."""

    digest: str  # digest of the data set
    max_length: int
    tried_with: list[str]  # models, one for each distinct encoding
    splits: dict[Split, TriedSplit]
    sha256: dict[Split, str]  # of SPLIT.npy
