"""Strict YAML: text keys, each once; errors with file and line."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from components.errors import SettingsError

FAST_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's loader, if PyYAML has it: a tenth of the time


NOT_DECIMAL = re.compile(r"[-+]?0[0-9_]+$|.*:")  # 0400, 6:40


class _FormatError(Exception):
    """`line: key or value: what is wrong`."""


class _Loader(FAST_LOADER):  # type: ignore[misc, valid-type]
    """Loader with text keys, each once, and decimal numbers. YAML itself lets the last of two equal keys win, and takes `no`
    for false, `1` for a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        previous: yaml.Node | None = None
        for key, value in node.value:
            line = key.start_mark.line + 1
            kind = key.tag.rpartition(":")[2]
            if kind == "str" and not key.style and is_number(key.value):
                kind = "float"  # to YAML 1.2, as DVC reads it
            bare_number = kind in ("int", "float") and node.flow_style and value.value == ""
            if bare_number and previous is not None and is_number(previous.value):
                written, suggestion = f"{previous.value},{key.value}", f"{previous.value}.{key.value}"  # {sft: 1,0}
                is_decimal = is_number(suggestion) and len(key.value) != 3  # {sft: 1,000}: a thousand?
                advice = f"; write {suggestion}" if is_decimal else ", not in a number"
                raise _FormatError(f"{line}: {written}: a comma stands between two keys{advice}")
            previous = value
            if kind not in ("str", "merge"):
                raise _FormatError(f'{line}: {key.value}: YAML takes it for {kind}, not for text; write "{key.value}"')
            if key.value in lines:
                raise _FormatError(f"{line}: {key.value}: stands twice, here and in line {lines[key.value]}; leave one")
            lines[key.value] = line
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping

    def decimal(self, node: yaml.ScalarNode) -> int | float:
        """Number that every YAML parser reads alike: 0400 is 256 in PyYAML and 400 in DVC, 6:40 is 400 and a text."""
        number: int | float = FAST_LOADER.yaml_constructors[node.tag](self, node)
        if NOT_DECIMAL.match(node.value):
            line = node.start_mark.line + 1
            raise _FormatError(f'{line}: {node.value}: YAML takes it for {number}; write that, or "{node.value}" for a text')
        return number


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.decimal)


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML mapping. Raises SettingsError with file and line if it is missing, unreadable, malformed or no mapping."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise SettingsError(f"{path}: missing; `git checkout {path}` brings the shipped one back") from None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    except _FormatError as error:
        raise SettingsError(f"{path}:{error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        lines = path.read_text(encoding="utf-8").splitlines()[mark.line : mark.line + 1] if mark else []
        tip = "; it is indented by a tab, write spaces" if lines and lines[0].lstrip(" ").startswith("\t") else ""
        loc = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise SettingsError(f"{loc}: not valid YAML: {error.context or ''} {error.problem}{tip}".replace("  ", " ")) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a number of thousands of digits
        raise SettingsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: must be a mapping of keys to values")
    return content


def is_number(text: Any) -> bool:
    try:
        return isinstance(text, str) and math.isfinite(float(text))
    except ValueError:
        return False
