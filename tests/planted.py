"""Secrets to plant in the environment of real work, and where they came out."""

from __future__ import annotations

from pathlib import Path

CANARY = "canary"  # in every secret, and in nothing else
SECRETS = {
    "HF_TOKEN": "hf_canaryAbCdEf",
    "AWS_SECRET_ACCESS_KEY": "canary/wJalrXUtnFEMI",
    "MLFLOW_TRACKING_PASSWORD": "canary-tracking-password",
    "WANDB_API_KEY": "canary0123456789",
    "ALIGNTI_WEBHOOK": "http://hook:canary@127.0.0.1:9/canary-path",
}
REMOTE = "http://user:canary-remote@127.0.0.1:9/store"  # as somebody may have added it to DVC


def leaks(root: Path, but: tuple[str, ...] = ()) -> list[str]:
    """Files under `root` that hold a secret, databases, logs and caches included; `but` are where it was planted."""
    files = (path for path in root.rglob("*") if path.is_file() and path.relative_to(root).as_posix() not in but)
    return [str(path.relative_to(root)) for path in files if CANARY.encode() in path.read_bytes()]
