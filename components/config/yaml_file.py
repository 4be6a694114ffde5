"""Strict YAML: text keys, each once; errors with file and line."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from components.errors import SettingsError

QUICK = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's loader, if PyYAML has it: a tenth of the time


NOT_DECIMAL = re.compile(r"[-+]?0[0-9_]+$|.*:")  # 0400, 6:40


class _Bad(Exception):
    """`line: key or value: what is wrong`."""


class _Loader(QUICK):  # type: ignore[misc, valid-type]
    """Loader with text keys, each once, and decimal numbers. YAML itself lets the last of two equal keys win, and takes `no`
    for false, `1` for a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        before: yaml.Node | None = None
        for key, value in node.value:
            line = key.start_mark.line + 1
            kind = key.tag.rpartition(":")[2]
            if kind == "str" and not key.style and is_number(key.value):
                kind = "float"  # to YAML 1.2, as DVC reads it
            split = kind in ("int", "float") and node.flow_style and value.value == ""
            if split and before is not None and is_number(before.value):
                said, wanted = f"{before.value},{key.value}", f"{before.value}.{key.value}"  # {sft: 1,0}
                likely = is_number(wanted) and len(key.value) != 3  # {sft: 1,000}: a thousand?
                advice = f"; write {wanted}" if likely else ", not in a number"
                raise _Bad(f"{line}: {said}: a comma stands between two keys{advice}")
            before = value
            if kind not in ("str", "merge"):
                raise _Bad(f'{line}: {key.value}: YAML takes it for {kind}, not for text; write "{key.value}"')
            if key.value in lines:
                raise _Bad(f"{line}: {key.value}: stands twice, here and in line {lines[key.value]}; leave one")
            lines[key.value] = line
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found

    def decimal(self, node: yaml.ScalarNode) -> int | float:
        """Number that every YAML parser reads alike: 0400 is 256 in PyYAML and 400 in DVC, 6:40 is 400 and a text."""
        number: int | float = QUICK.yaml_constructors[node.tag](self, node)
        if NOT_DECIMAL.match(node.value):
            line = node.start_mark.line + 1
            raise _Bad(f'{line}: {node.value}: YAML takes it for {number}; write that, or "{node.value}" for a text')
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
    except _Bad as bad:
        raise SettingsError(f"{path}:{bad}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = path.read_text(encoding="utf-8").splitlines()[mark.line : mark.line + 1] if mark else []
        tab = "; it is indented by a tab, write spaces" if line and line[0].lstrip(" ").startswith("\t") else ""
        at = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise SettingsError(f"{at}: not valid YAML: {error.context or ''} {error.problem}{tab}".replace("  ", " ")) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: must be a mapping of keys to values")
    return content


def is_number(text: Any) -> bool:
    try:
        return isinstance(text, str) and math.isfinite(float(text))
    except ValueError:
        return False
