"""One section of the settings: a pydantic model whose errors are one line with the key in it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

Value = str | int | float | bool


class ConfigError(ValueError):
    """A setting, or a combination of settings, that cannot be used."""


def _flag(value: object) -> object:
    # pydantic would take "yes", and 1.
    text = value.strip().lower() if isinstance(value, str) else value
    if isinstance(text, bool) or text in ("true", "false"):
        return text in (True, "true")
    raise ValueError


def _whole(value: object) -> object:
    # pydantic would take True for 1, and 2.0 for 2.
    if isinstance(value, str | int) and not isinstance(value, bool):
        return int(value)
    raise ValueError


def _number(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError
    number = float(value)
    return number if abs(number) < float("inf") else value


Flag = Annotated[bool, BeforeValidator(_flag)]
Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number)]


def setting(default: Value, help: str, **limits: Any) -> Any:
    """Return a field: its default, one line of help, and pydantic's bounds (ge, gt, le, lt)."""
    return Field(default, description=help, **limits)


def unless(word: str, help: str, **limits: Any) -> Any:
    """Return a field for a number above 0, or the word that stands for none; inside it is a 0."""
    return Field(0, description=help, json_schema_extra={"word": word}, **limits)


class Section(BaseModel):
    """Settings that belong together.

    Keys are the names of the fields in kebab case, after the section's ``prefix`` and a dot.

    Raises
    ------
    ConfigError
        On a value of the wrong type, out of range or unknown, in one line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    prefix: ClassVar[str] = ""

    def __init__(self, **values: Any) -> None:
        fields = type(self).model_fields
        try:
            super().__init__(**{k: v for k, v in values.items() if v != (word(fields[k]) or None)})
        except ValidationError as error:
            raise ConfigError(self._line(error.errors()[0])) from None

    @classmethod
    @cache
    def described(cls) -> list[tuple[str, str, FieldInfo]]:
        """Give key, name and description of every setting."""
        start = f"{cls.prefix}." if cls.prefix else ""
        fields = cls.model_fields.items()
        return [(start + name.replace("_", "-"), name, field) for name, field in fields]

    @classmethod
    def _line(cls, error: Any) -> str:
        told = error.get("ctx", {}).get("error")
        if isinstance(told, ConfigError):
            return str(told)
        value = error["input"]
        key, field = next((k, f) for k, name, f in cls.described() if name == error["loc"][0])
        if error["type"] == "literal_error" and isinstance(value, str):
            near = suggest(value, choices(field))
            return f"{key}={value!r} is unknown{near}; expected {expectation(field)}"
        return f"{key}={value!r}: expected {expectation(field)}"


def word(field: FieldInfo) -> str:
    """Return the word that stands for no number at all, if there is one."""
    extra = field.json_schema_extra
    return str(extra["word"]) if isinstance(extra, dict) else ""


def shown(field: FieldInfo, value: Value) -> Value:
    """Return a value as it is given."""
    return value or word(field) or value


def choices(field: FieldInfo) -> tuple[str, ...]:
    """Return the values that a setting can have, if they can be listed."""
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def expectation(field: FieldInfo) -> str:
    """Return what a setting accepts, in words."""
    if known := choices(field):
        return "one of " + ", ".join(known)
    words = {bool: "true or false", int: "a whole number", float: "a number"}
    bounds = []
    for limit in field.metadata:
        if isinstance(limit, Ge):
            bounds.append(f"at least {limit.ge:g}")
        elif isinstance(limit, Gt):
            bounds.append(f"above {limit.gt:g}")
        elif isinstance(limit, Le):
            bounds.append(f"at most {limit.le:g}")
        elif isinstance(limit, Lt):
            bounds.append(f"below {limit.lt:g}")
    kind = words.get(field.annotation, "text")  # type: ignore[arg-type]
    either = f"{word(field)} or " if word(field) else ""
    return f"{either}{kind} {' and '.join(bounds)}".strip()


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean …?)`` with the nearest known names, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def parse_utc(text: str, key: str = "start") -> datetime:
    """Return an ISO 8601 time in UTC; without an offset it is taken as UTC.

    Raises
    ------
    ConfigError
        If `text` is not such a time; the message names `key`.
    """
    try:
        time = datetime.fromisoformat(text.strip())
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ConfigError(
            f"{key}={text!r}: expected an ISO 8601 time such as 2026-01-01T00:00:00Z"
        ) from None
