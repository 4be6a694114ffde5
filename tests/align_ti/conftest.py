"""The example terms have names beside those of components/align_ti/terms."""

from __future__ import annotations

import pytest

from tests.align_ti.examples import named


@pytest.fixture(autouse=True)
def example_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch)
