"""Base class of config sections, and the `Problem` and `ConfigError` that report invalid values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# Keys and values are untrusted text: their escape codes must not reach a terminal. Line feeds are ours.
CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code != ord("\n")}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration."""

    path: str  # the key, `rollout.group_size`
    got: str
    wanted: str
    fix: str
    where: str = ""  # `jobs/configs/demo.yaml:12` or `command line`, when it is known

    def __str__(self) -> str:
        place = f"  ({self.where})" if self.where else ""
        lines = f"got:    {self.got}", f"wanted: {self.wanted}", f"fix:    {self.fix}"
        return "\n    ".join([f"  {self.path}{place}", *lines]).translate(CONTROL) + "\n"


class ConfigError(ValueError):
    """A configuration that cannot be used; its text lists every problem."""

    def __init__(self, problems: Sequence[Problem], source: str = "") -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        origin = f" ({source})" if source else ""
        title = f"{count} in the configuration{origin}:\n"
        super().__init__("\n".join([title, *map(str, problems)]).rstrip())
        self.problems = list(problems)
        self.source = source


# Takes a section without its invalid fields: reading one raises AttributeError, which skips the check.
Check = Callable[[Any], Problem | None]


@dataclass(frozen=True)
class Meanings:
    """What each choice of a key is, for `--help`."""

    of_choice: Mapping[str, str]


@dataclass(frozen=True)
class Wanted:
    """Describes a field's accepted values where type and bounds do not; goes into its `Annotated[…]`."""

    text: str


def _reject_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("true and false are not numbers here")
    return value


# For literals with numbers in them: to Python, True is 1.
NotBool = BeforeValidator(_reject_bool)


Count = Annotated[int, Field(ge=1)]
NaturalNumber = Annotated[int, Field(ge=0)]
PositiveNumber = Annotated[float, Field(gt=0)]
NonNegativeNumber = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Frozen model, strict about keys and types: a number is accepted neither as a text nor as a boolean."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )

    # Cross-field checks of this section. Paths in their problems are relative to it.
    checks: ClassVar[tuple[Check, ...]] = ()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        problems = [problem for check in self.checks if (problem := check(self)) is not None]
        if problems:
            raise ConfigError(problems)
        return self
