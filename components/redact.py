"""Keeps passwords and tokens out of what we say: errors, warnings, logs, what a server is told."""

from __future__ import annotations

import os
import re

SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|_KEY|AUTH|AUTH_STRING|WEBHOOK(_URL)?)$")  # variables' names
SHORTEST = 6  # shorter values are words that stand elsewhere too
LOGIN = re.compile(r"//[^/@\s]+@")  # user:password@ of an address
HIDDEN = "***"


def redacted(text: str) -> str:
    """`text` without the logins of addresses and without the values of secret environment variables."""
    for value in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return LOGIN.sub(f"//{HIDDEN}@", text)


def without_login(address: str) -> str:
    """http://user:password@host/ as http://host/"""
    return LOGIN.sub("//", address)


def _secrets() -> set[str]:
    """Values of variables with telling names; of user:password the password too."""
    values = {value for name, value in os.environ.items() if SECRET.search(name.upper())}
    values |= {value.partition(":")[2] for value in values if not value.startswith("http")}
    return {value for value in values if len(value) >= SHORTEST}
