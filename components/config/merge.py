"""Merging values into params documents; comments, order and the spelling of values are kept."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any, get_origin

from components.config.load import models_in
from components.config.settings import Settings


def annotation(file: str) -> Any:
    """Model of params/`file`.yaml, which says what keys its mappings have."""
    return Settings.model_fields[file].annotation


def updates(overlay: Mapping[str, Any], current: Mapping[str, Any], model_type: Any) -> Iterator[tuple[Any, ...]]:
    """(key, ..., key, value) of each value that the merge changes."""
    fields = {name: field for model in models_in(model_type) for name, field in model.model_fields.items()}
    for key, value in overlay.items():
        old_value = current.get(key)
        field = fields.get(key)
        user_named = field is None or get_origin(field.annotation) is dict
        if isinstance(value, Mapping) and isinstance(old_value, Mapping) and not user_named:
            assert field is not None
            yield from ((key, *rest) for rest in updates(value, old_value, field.annotation))
        elif key not in current or old_value != value:
            yield key, value


def merge(overlay: Mapping[str, Any], document: Any, model_type: Any) -> bool:
    """Merge `overlay` into `document`, a part of the settings of type `model_type`; true if anything changed.

    Mappings are merged key by key, except those keyed by user-chosen names; lists are replaced.
    """
    changes = list(updates(overlay, document, model_type))
    for *parents, key, value in changes:
        parent = document
        for step in parents:
            parent = parent[step]
        parent[key] = _without_comments(value)
    return bool(changes)


def _without_comments(node: Any) -> Any:
    """Copy with the YAML style of its values, without the recipe's comments."""
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    if isinstance(node, CommentedMap | CommentedSeq) and not node:
        return [] if isinstance(node, CommentedSeq) else {}  # ruamel would put its own empty node after the comment
    if isinstance(node, CommentedMap):
        copy: Any = CommentedMap((key, _without_comments(value)) for key, value in node.items())
    elif isinstance(node, CommentedSeq):
        copy = CommentedSeq(_without_comments(value) for value in node)
    else:
        return node
    (copy.fa.set_flow_style if node.fa.flow_style() else copy.fa.set_block_style)()
    return copy


def text_of(document: Any) -> str:
    stream = io.StringIO()
    round_trip().dump(document, stream)
    return stream.getvalue()


def round_trip() -> Any:
    """Round-trip YAML: comments, order, 2.0e-3, 50_000_000 and null are written as they were read."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 4096
    yaml.preserve_quotes = True
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    return yaml
