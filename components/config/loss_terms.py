"""Weights of the loss terms and the options of each, checked against the dataclass of `align_ti/terms/NAME.py`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, Literal, Self, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import InitErrorDetails

from components.align_ti import terms
from components.config.fields import NonNegative, Ratio, Strict, Temperature
from components.errors import unknown


class Divergence(Strict):
    """Per-row divergence D(teacher, student) in nats; `mix` is JSD's beta or the skew's alpha. argmax: cross-entropy
    against the teacher's likeliest token."""

    kind: Literal["forward", "reverse", "jsd", "skewed", "skewed_reverse", "argmax"]
    mix: Ratio
    temperature: Temperature = Field(le=1_000, description="above, the divergence drowns in float32's rounding")

    @model_validator(mode="after")
    def _check_mix(self) -> Self:
        if self.kind.startswith("skewed") and self.mix == 1:
            raise ValueError(f"{self.kind} with mix 1 compares a distribution with itself: it is 0, and trains nothing")
        return self


class WithTerms(Strict):
    """Settings that also take options of loss terms: one block per term, under the term's name (align_ti/terms)."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="wrap")
    @classmethod
    def _reject_unknown_keys(cls, raw: Any, handler: Callable[[Any], Self]) -> Self:
        """Check unknown keys beside the fields, so that a misspelt one is reported as unknown, not only as missing."""
        extra = set(raw if isinstance(raw, dict) else ()) - {*cls.model_fields, *terms.names()}
        problems = [InitErrorDetails(type="extra_forbidden", loc=(name,), input=raw[name]) for name in sorted(extra, key=str)]
        try:
            settings = handler(raw)
        except ValidationError as error:
            for issue in error.errors():
                if issue["loc"] == () or issue["loc"][0] not in extra:
                    problems.append(
                        InitErrorDetails(type=issue["type"], loc=issue["loc"], input=issue["input"], ctx=issue.get("ctx", {}))
                    )
        if problems:
            raise ValidationError.from_exception_data("params", problems)
        return settings

    @model_validator(mode="after")
    def _check_term_options(self) -> Self:
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
    try:
        term(**_options_model(term).model_validate(as_tuples(block)).model_dump())
    except ValidationError as error:
        *_, problem = error.errors()  # of a union the last, its most detailed form
        keys = tuple(part for part in problem["loc"] if not (isinstance(part, str) and re.search(r"\W", part)))  # of YAML
        raise validation_error(problem["type"], (name, *keys), problem["input"], problem.get("ctx", {})) from None
    except ValueError as error:
        raise validation_error("value_error", (name,), block, {"error": error}) from None


@cache
def _options_model(term: type) -> type[Strict]:
    """Pydantic model of the dataclass."""
    hints = {**get_type_hints(term, include_extras=True), "divergence": Divergence | None}
    options: dict[str, Any] = {
        field.name: (hints[field.name], ... if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(term)
    }
    return create_model(term.__name__, __base__=Strict, **options)


def validation_error(kind: str, loc: tuple[int | str, ...], value: Any, ctx: dict[str, Any] | None = None) -> ValidationError:
    details = InitErrorDetails(type=kind, loc=loc, input=value, ctx=ctx or {})
    return ValidationError.from_exception_data("params", [details])


def as_tuples(value: Any) -> Any:
    """Lists of YAML as tuples, for frozen dataclasses."""
    if isinstance(value, dict):
        return {key: as_tuples(item) for key, item in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def _positive_weights(weights: dict[str, float]) -> dict[str, float]:
    """Weights above 0. Raises ValidationError for an unknown term, ValueError if all are 0."""
    for name in weights:
        if name not in terms.names():
            raise validation_error("value_error", (name,), {}, {"error": ValueError(unknown("loss term", name, terms.names()))})
    if not any(weights.values()):
        raise ValueError("at least one weight must be above 0")
    return {name: weight for name, weight in weights.items() if weight}


# L = sum of weight x L_term; a term not named: 0
Weights = Annotated[dict[str, NonNegative], AfterValidator(_positive_weights)]
