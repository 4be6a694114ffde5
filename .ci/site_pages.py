"""Pages of the documentation site that stand at the root of the repository: README, CONTRIBUTING, CHANGELOG (mkdocs.yml)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add them, with links as from docs/."""
    root = Path(config.config_file_path).parent
    for page, source in PAGES.items():
        content = (root / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=content))
    return files
