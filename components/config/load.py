"""Loading of `params/`: every file read and checked at once, each problem reported with file, line and key."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from components.align_ti import terms
from components.config.checks import cross_file_problems
from components.config.loss_terms import WithTerms
from components.config.runtime import RuntimeSettings
from components.config.settings import FILES, Settings
from components.config.yaml_file import FAST_LOADER, is_number, read_yaml
from components.errors import SettingsError, meant


def check_project(root: Path = Path()) -> None:
    """Raises SettingsError if there is no `root/params`."""
    if not (root / "params").is_dir():
        raise SettingsError(f"{root.resolve()} has no params/: run it in the folder of a project, a clone of this repository")


def load_settings(root: Path = Path()) -> Settings:
    """Read and check every file under `root/params`.

    Raises:
        SettingsError: naming every problem of every file by file, line and key; or there is no params/.
    """
    check_project(root)
    raw, problems = {}, list(_unknown_files(root / "params"))
    for name in FILES:
        try:
            raw[name] = read_yaml(root / "params" / f"{name}.yaml")
        except SettingsError as error:
            problems.append(str(error))
    if not problems:
        raw["runtime"] = {**raw["runtime"], **_environment_values()}
        try:
            settings = Settings.model_validate(raw)
        except ValidationError as error:
            problems += _format_problems(root, error.errors())
        else:
            problems += [_locate(root, file, key.split("."), message) for file, key, message in cross_file_problems(settings)]
    if problems:
        raise SettingsError(f"{len(problems)} problem(s) in params/:\n  " + "\n  ".join(problems))
    return settings


def _unknown_files(params: Path) -> Iterator[str]:
    file_names = [f"{name}.yaml" for name in FILES]
    for path in sorted(params.glob("[!.]*.y*ml")):  # an editor's own files begin with a dot
        if path.name not in file_names:
            hint = meant(path.name, file_names).strip() or f"those are {', '.join(file_names)}"
            yield f"params/{path.name}: no file of params/, and never read; {hint}"


def _environment_values() -> dict[str, str]:
    values = {field: os.environ.get(f"ALIGNTI_{field.upper()}") for field in RuntimeSettings.model_fields}
    return {field: value for field, value in values.items() if value}


def _format_problems(root: Path, problems: list[Any]) -> Iterator[str]:
    """One line per problem, and one per block for all its missing keys."""
    missing_keys: dict[tuple[Any, ...], list[Any]] = {}
    for problem in problems:
        if problem["type"] == "missing":
            missing_keys.setdefault(problem["loc"][:-1], []).append(problem["loc"][-1])
        else:
            yield _format_problem(root, problem)
    for (file, *keys), names in missing_keys.items():
        in_arm = file == "study" and keys[-1:] in (["iva"], ["tpa"], ["divergence"])
        hint = "; an arm's block stands whole: copy that of params/distill.yaml" if in_arm else ""
        if isinstance(names[0], int):  # indices of a list
            yield _locate(root, file, keys, f"too short: {names[-1] + 1} values are wanted")
        elif len(names) == 1:
            yield _locate(root, file, [*keys, names[0]], f"required, and missing{hint}")
        else:
            yield _locate(root, file, keys, f"required, and missing: {', '.join(names)}{hint}")


def _format_problem(root: Path, problem: Any) -> str:
    """`file:line: key: message`, with the nearest known key for an unknown one."""
    file, *keys = problem["loc"]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        valid_keys = _known_keys(keys[:-1], file)
        message = "unknown key; " + (meant(str(keys[-1]), valid_keys).strip() or f"known: {', '.join(valid_keys)}")
    elif keys and not isinstance(problem["input"], dict):
        if problem["type"] == "model_type":
            message = f"takes a block of {', '.join(_known_keys(keys, file))}"
        elif problem["type"] == "dict_type":
            message = "takes a block of names and values"
        if problem["type"] != "value_error" or not isinstance(problem["input"], list):  # our sentence on a list quotes it
            message += f", not {'null' if problem['input'] is None else repr(problem['input'])}"
        if problem["type"] == "string_type" and problem["input"] is not None:
            message += "; YAML takes it for that unless it stands in quotes"
        if problem["type"] == "float_type" and is_number(problem["input"]):
            number = repr(float(problem["input"]))
            message += f"; YAML takes that for text, write {number if '.' in number else number.replace('e', '.0e')}"
    if file == "runtime" and keys and keys[0] in _environment_values():
        return f"ALIGNTI_{keys[0].upper()}: {message}"
    return _locate(root, file, keys, message)


def _locate(root: Path, file: str, keys: list[Any], message: str) -> str:
    """Message with file, line and key; if it begins with a key of the block, the line is that key's."""
    key = ".".join(str(part) for part in keys)
    leading_key = re.match(r"`?([\w.]*)", message)
    line = _line_number(root / "params" / f"{file}.yaml", [*keys, *(leading_key[1].split(".") if leading_key else ())])
    return f"params/{file}.yaml:{line}: {f'{key}: ' if key else ''}{message}"


def _known_keys(keys: list[Any], file: str) -> list[str]:
    """Field names of the models at `keys`, following dicts of models and unions."""
    annotation: Any = Settings.model_fields[file].annotation
    for key in keys:
        field = next((model.model_fields[key] for model in models_in(annotation) if key in model.model_fields), None)
        if get_origin(annotation) is dict:  # a user-chosen name
            annotation = get_args(annotation)[-1]
        elif field:
            annotation = field.annotation
        else:  # a loss term's block
            return [field.name for field in dataclasses.fields(terms.term_class(str(key)))]
    models = models_in(annotation)
    term_names = terms.names() if any(issubclass(model, WithTerms) for model in models) else ()
    return list(dict.fromkeys([*(name for model in models for name in model.model_fields), *term_names]))


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Settings models of a field that may be optional or a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [] if get_origin(annotation) is dict else [model for arg in get_args(annotation) for model in models_in(arg)]


def _line_number(path: Path, keys: list[Any]) -> int:
    """Line number of the deepest of `keys` that the file has."""
    node = yaml.compose(path.read_text(encoding="utf-8"), FAST_LOADER)
    line = 1
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            items = {key_node.value: (key_node, value_node) for key_node, value_node in node.value}
            if str(key) not in items:
                break
            key_node, node = items[str(key)]
            line = key_node.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
        else:
            break
    return line
