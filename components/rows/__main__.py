"""Stage `check_rows`: tokenizes every row as the models will, before any training.

python -m components.rows      artifacts/dataset, artifacts/models -> artifacts/rows
"""

from __future__ import annotations

from components.config.load import load_settings
from components.process import cores, exit_from
from components.records.paths import ROWS
from components.records.rows import TriedRows
from components.rows.trial import left_out, try_rows


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
    usable, cut, resized, tokens, response = (
        sum(getattr(split, count) for split in found.splits.values())
        for count in ("usable", "cut", "resized", "tokens", "response_tokens")
    )
    left = left_out(found)
    out = ", ".join(f"{count:,} {reason}" for reason, count in left.most_common())
    return (
        f"check_rows: {usable:,} samples usable, {cut:,} of them cut, {resized:,} with a stretched image; {left.total():,} left"
        f" out{f' ({out})' if out else ''}; {tokens:,} tokens, {response:,} of them trained on -> {ROWS} (remarks.jsonl)"
    )


if __name__ == "__main__":
    exit_from(main)
