from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.errors import TryAgainError, redact, without_login

SECRETS = {
    "HF_TOKEN": "hf_canary1",
    "AWS_SECRET_ACCESS_KEY": "canary/2+key",
    "MLFLOW_TRACKING_PASSWORD": "canary3",
    "ALIGNTI_SERVER_AUTH": "user:canary-four",
    "ALIGNTI_WEBHOOK": "https://hooks.example/canary5",
}
WORDS = {"TOKENIZERS_PARALLELISM": "false", "SSH_AUTH_SOCK": "/run/agent", "SHORT_TOKEN": "abc"}


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SECRETS, **WORDS}.items():
        monkeypatch.setenv(name, value)


def test_values_of_secret_variables_and_logins_are_hidden_and_words_are_not() -> None:
    redacted = redact(f"{' '.join(SECRETS.values())} canary-four https://me:canary6@host:5000/x postgresql://a:b@h/ {WORDS}")
    assert "canary" not in redacted
    assert "https://***@host:5000/x postgresql://***@h/" in redacted
    assert str(WORDS) in redacted


def test_every_error_of_ours_is_free_of_them() -> None:
    assert str(TryAgainError("no answer from http://user:canary@host, token hf_canary1")) == (
        "no answer from http://***@host, token ***"
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(), st.text())
def test_wherever_it_stands(prefix: str, suffix: str) -> None:
    assert "canary3" not in redact(f"{prefix}canary3{suffix}")


def test_an_address_without_its_login() -> None:
    assert without_login("http://me:pass@host:5000/a") == "http://host:5000/a"
    assert without_login("http://host:5000/a@b") == "http://host:5000/a@b"
    assert without_login("postgresql://me:p@ss@host/a") == "postgresql://host/a" and "ss" not in redact("//me:p@ss@host")
