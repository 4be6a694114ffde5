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

    params = settings.models.model_dump(mode="json", include={"max_length", "too_long", "refused_images"})
    with stage_run("check_rows", runtime=settings.runtime, params=params) as run:
        result = try_rows(settings, settings.runtime.workers or cores())
        run.dataset("tried", result.digest)
        for split, counts in result.splits.items():
            run.metrics(
                {f"{split}/usable": counts.usable, f"{split}/tokens": counts.tokens, f"{split}/longest": counts.longest}
            )
        run.artifact(ROWS / "rows.json")
    print(closing_line(result))


def closing_line(result: TriedRows) -> str:
    usable, cut, resized, tokens, response = (
        sum(getattr(split, field) for split in result.splits.values())
        for field in ("usable", "cut", "resized", "tokens", "response_tokens")
    )
    dropped = left_out(result.splits)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common())
    return (
        f"check_rows: {usable:,} samples usable, {cut:,} of them cut, {resized:,} with a stretched image; {dropped.total():,}"
        f" left out{f' ({reasons})' if reasons else ''}; {tokens:,} tokens, {response:,} of them trained on"
        f" -> {ROWS} (remarks.jsonl)"
    )


if __name__ == "__main__":
    exit_from(main)
