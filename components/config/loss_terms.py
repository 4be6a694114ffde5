"""Weights of the loss terms and the options of each, checked against the dataclass of `align_ti/terms/NAME.py`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self, get_type_hints

from pydantic import AfterValidator, ConfigDict, ValidationError, create_model, model_validator
from pydantic_core import InitErrorDetails

from components.align_ti import terms
from components.config.fields import NonNegative, PositiveFloat, Ratio, Strict
from components.errors import unknown


class Divergence(Strict):
    """Per-row divergence D(teacher, student) in nats; `mix` is JSD's beta or the skew's alpha. argmax: cross-entropy
    against the teacher's likeliest token."""

    kind: Literal["forward", "reverse", "jsd", "skewed", "skewed_reverse", "argmax"]
    mix: Ratio
    temperature: PositiveFloat

    @model_validator(mode="after")
    def _trains(self) -> Self:
        if self.kind.startswith("skewed") and self.mix == 1:
            raise ValueError(f"{self.kind} with mix 1 compares a distribution with itself: it is 0, and trains nothing")
        return self


class WithTerms(Strict):
    """Settings with the options of loss terms beside their fields, each term's in a block of its name (align_ti/terms)."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="wrap")
    @classmethod
    def _no_other_names(cls, raw: Any, fields: Callable[[Any], Self]) -> Self:
        """Check unknown keys beside the fields, so that a misspelt one is reported as unknown, not only as missing."""
        other = set(raw if isinstance(raw, dict) else ()) - {*cls.model_fields, *terms.names()}
        problems = [InitErrorDetails(type="extra_forbidden", loc=(name,), input=raw[name]) for name in sorted(other, key=str)]
        try:
            made = fields(raw)
        except ValidationError as error:
            for found in error.errors():
                if found["loc"] == () or found["loc"][0] not in other:
                    problems.append(
                        InitErrorDetails(type=found["type"], loc=found["loc"], input=found["input"], ctx=found.get("ctx", {}))
                    )
        if problems:
            raise ValidationError.from_exception_data("params", problems)
        return made

    @model_validator(mode="after")
    def _options_of_terms(self) -> Self:
        for name, block in self.blocks.items():
            if name in terms.names():
                _check_options(name, block)
        return self

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        return self.model_extra or {}


def _check_options(name: str, block: Any) -> None:
    """Raises ValidationError if the term's dataclass has no such field, another type for it, or rejects the value."""
    term = terms.term_class(name)
    hints = {**get_type_hints(term, include_extras=True), "divergence": Divergence | None}
    options: dict[str, Any] = {
        field.name: (hints[field.name], ... if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(term)
    }
    try:
        term(**create_model(name, __base__=Strict, **options).model_validate(as_tuples(block)).model_dump())
    except ValidationError as error:
        *_, problem = error.errors()  # of a union the last, its most detailed form
        keys = tuple(part for part in problem["loc"] if not (isinstance(part, str) and re.search(r"\W", part)))  # of YAML
        raise problem_at(problem["type"], (name, *keys), problem["input"], problem.get("ctx", {})) from None
    except ValueError as error:
        raise problem_at("value_error", (name,), block, {"error": error}) from None


def problem_at(kind: str, loc: tuple[int | str, ...], value: Any, context: dict[str, Any] | None = None) -> ValidationError:
    details = InitErrorDetails(type=kind, loc=loc, input=value, ctx=context or {})
    return ValidationError.from_exception_data("params", [details])


def as_tuples(value: Any) -> Any:
    """Lists of YAML as tuples, for frozen dataclasses."""
    if isinstance(value, dict):
        return {key: as_tuples(inside) for key, inside in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def _of_terms(weights: dict[str, float]) -> dict[str, float]:
    """Weights above 0. Raises ValidationError for an unknown term, ValueError if all are 0."""
    for name in weights:
        if name not in terms.names():
            raise problem_at("value_error", (name,), {}, {"error": ValueError(unknown("loss term", name, terms.names()))})
    if not any(weights.values()):
        raise ValueError("at least one weight must be above 0")
    return {name: weight for name, weight in weights.items() if weight}


Weights = Annotated[dict[str, NonNegative], AfterValidator(_of_terms)]  # L = sum of weight x L_term; a term not named: 0
