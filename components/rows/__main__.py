"""Stage `check_rows`: tokenizes every row as the models will, before any training.

python -m components.rows      artifacts/dataset, artifacts/models -> artifacts/rows
"""

from __future__ import annotations

from collections import Counter

from components.config.load import load_settings
from components.process import cores, exit_from
from components.records.paths import ROWS
from components.records.rows import TriedRows
from components.rows.trial import try_rows


def main() -> None:
    settings = load_settings()
    from components.tracking.stage_run import stage_run

    asked = settings.models.model_dump(mode="json", include={"max_length", "too_long", "refused_images"})
    with stage_run("check_rows", runtime=settings.runtime, params=asked) as run:
        found = try_rows(settings, settings.runtime.workers or cores())
        run.dataset("tried", found.digest)
        for split, tried in found.splits.items():
            run.metrics({f"{split}/usable": tried.usable, f"{split}/tokens": tried.tokens, f"{split}/longest": tried.longest})
        run.artifact(ROWS / "rows.json")
    print(closing_line(found))


def closing_line(found: TriedRows) -> str:
    left: Counter[str] = Counter()
    for split in found.splits.values():
        left.update(split.left_out)
    cut, resized = (sum(getattr(split, what) for split in found.splits.values()) for what in ("cut", "resized"))
    out = ", ".join(f"{count:,} {reason}" for reason, count in left.most_common())
    tokens = sum(split.tokens for split in found.splits.values())
    response = sum(split.response_tokens for split in found.splits.values())
    return (
        f"check_rows: {sum(split.usable for split in found.splits.values()):,} samples usable, {cut:,} of them cut,"
        f" {resized:,} with a stretched image; {left.total():,} left out{f' ({out})' if out else ''}; {tokens:,} tokens,"
        f" {response:,} of them trained on -> {ROWS} (remarks.jsonl)"
    )


if __name__ == "__main__":
    exit_from(main)
