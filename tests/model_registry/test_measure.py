"""A champion of another day is asked as `evaluate` asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from components.config.load import load_settings
from components.model_registry import measure


@pytest.mark.parametrize("style", ["vicuna", "processor"])
def test_it_is_asked_with_the_template_of_the_settings(monkeypatch: pytest.MonkeyPatch, style: str) -> None:
    settings = load_settings()
    template = settings.models.template.model_copy(update={"style": style})
    settings = settings.model_copy(update={"models": settings.models.model_copy(update={"template": template})})
    templates: list[Any] = []
    monkeypatch.setattr(measure, "Samples", lambda *_: [])
    monkeypatch.setattr(measure, "load", lambda *_: None)
    monkeypatch.setattr(measure.generate, "questions", lambda *_: [])
    monkeypatch.setattr(measure.generate, "answers", lambda _l, _s, _r, template, *_: templates.append(template) or [])
    monkeypatch.setattr(measure.fingerprint, "for_evaluate", lambda _l, _s, _r, template, *_: templates.append(template))
    measure.answers(Path("model"), "champion", settings)
    assert [t.style for t in templates] == [style, style]
