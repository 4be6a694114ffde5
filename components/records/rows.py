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
    response_tokens: int  # tokens of them that are trained on
    longest: int


class TriedRows(Record):
    """artifacts/rows/rows.json: what came of trying every row with the models' tokenizers, templates and image sizes."""

    digest: str  # the data set's
    max_length: int
    tried_with: list[str]  # models, one of those that read rows alike
    splits: dict[Split, TriedSplit]
