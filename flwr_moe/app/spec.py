"""One row of the settings table: parsing, checking and describing a value."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

Value = str | int | float | bool
Number = TypeVar("Number", int, float)


class ConfigError(ValueError):
    """A setting, or a combination of settings, that cannot be used."""


def setting(default: Value, help: str, key: str = "", **limits: Any) -> Any:
    """Return a dataclass field that carries its row of the settings table."""
    return field(
        default=default, metadata={"spec": {"default": default, "key": key, "help": help, **limits}}
    )


@dataclass(frozen=True)
class Spec:
    """One row of the settings table.

    Attributes
    ----------
    key
        Name in kebab case; keys of one system are dotted (``ems-fl.gate``).
    default
        Default value; its type is the type of the setting.
    help
        One line for ``--help``.
    choices
        Known values of a string; empty if any string will do.
    available
        Values this version can run; empty if all known ones.
    or_path
        What else will do, in words, if a string with a ``/`` or an existing folder does.
    minimum, maximum
        Bounds of a number, both inclusive unless the matching ``open_`` flag is set.
    open_minimum, open_maximum
        Whether the bound itself is excluded.
    is_time
        Whether a string must be an ISO 8601 time.
    """

    key: str
    default: Value
    help: str
    choices: tuple[str, ...] = ()
    available: tuple[str, ...] = ()
    or_path: str = ""
    minimum: float = -math.inf
    maximum: float = math.inf
    open_minimum: bool = False
    open_maximum: bool = False
    is_time: bool = False

    def parse(self, value: Value) -> Value:
        """Return `value` as this setting's type, checked; raise ConfigError otherwise."""
        if isinstance(self.default, bool):
            return self._parse_bool(value)
        if isinstance(self.default, int):
            return self._check_range(self._parse_int(value))
        if isinstance(self.default, float):
            return self._check_range(self._parse_float(value))
        return self._parse_str(value)

    def range_text(self) -> str:
        """Return what is accepted, in words, for errors and help."""
        if isinstance(self.default, bool):
            return "true or false"
        if isinstance(self.default, str):
            if self.is_time:
                return "an ISO 8601 time"
            return "one of " + ", ".join(self.choices) if self.choices else "text"
        kind = "a whole number" if isinstance(self.default, int) else "a number"
        bounds = []
        if math.isfinite(self.minimum):
            bounds.append(f"{'above' if self.open_minimum else 'at least'} {self.minimum:g}")
        if math.isfinite(self.maximum):
            bounds.append(f"{'below' if self.open_maximum else 'at most'} {self.maximum:g}")
        return " ".join([kind, " and ".join(bounds)]).strip()

    def available_text(self) -> str:
        """Return what this version accepts, for errors and help."""
        return ", ".join([*(self.available or self.choices), *filter(None, [self.or_path])])

    def _wrong(self, value: object) -> ConfigError:
        return ConfigError(f"{self.key}={value!r}: expected {self.range_text()}")

    def _parse_bool(self, value: Value) -> bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.strip().lower() in ("true", "false"):
            return value.strip().lower() == "true"
        raise self._wrong(value)

    def _parse_int(self, value: Value) -> int:
        if isinstance(value, bool | float):
            raise self._wrong(value)
        try:
            return int(value)
        except (TypeError, ValueError):
            raise self._wrong(value) from None

    def _parse_float(self, value: Value) -> float:
        if isinstance(value, bool):
            raise self._wrong(value)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise self._wrong(value) from None
        if not math.isfinite(number):
            raise self._wrong(value)
        return number

    def _parse_str(self, value: Value) -> str:
        if not isinstance(value, str):
            raise self._wrong(value)
        if self.choices and value not in self.choices:
            raise ConfigError(
                f"{self.key}={value!r} is unknown{suggest(value, self.choices)}; "
                f"expected {self.range_text()}"
            )
        by_path = bool(self.or_path and value) and ("/" in value or Path(value).is_dir())
        if self.available and value not in self.available and not by_path:
            raise ConfigError(
                f"{self.key} {value!r} is not available in this version; "
                f"available: {self.available_text()}"
            )
        if self.is_time:
            parse_utc(value, self.key)
        return value

    def _check_range(self, number: Number) -> Number:
        low = number <= self.minimum if self.open_minimum else number < self.minimum
        high = number >= self.maximum if self.open_maximum else number > self.maximum
        if low or high:
            raise self._wrong(number)
        return number


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
