"""Records of a message as frozen dataclasses: a field is a key, its type what may stand there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from flwr.app import ConfigRecord, MetricRecord, RecordDict

MISSING: Any = dataclasses.MISSING
EXTRA = "extra"

_WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    bool: ("true or false", "true or false"),
}


def key(
    name: str = "",
    *,
    default: Any = MISSING,
    factory: Callable[[], Any] = MISSING,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    one_of: Sequence[str] = (),
) -> Any:
    """Describe a field of `Fields`; plain fields need none of it.

    Parameters
    ----------
    name : str
        Key in the record; the field's name with hyphens for underscores by default.
    default, factory
        What a missing key means, as in ``dataclasses.field``.
    least, above, most : float, optional
        Bounds of a number, or of each in a list.
    one_of : sequence of str
        The texts that may stand there.
    """
    rules = {"least": least, "above": above, "most": most, "one_of": tuple(one_of)}
    metadata = {"key": name, "rules": rules}
    return dataclasses.field(default=default, default_factory=factory, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Fields:
    """A ConfigRecord as a frozen dataclass; `Figures` is the same for a MetricRecord.

    Fields are numbers, texts, truth values, lists of them, or ``dict[int, list[int]]``, which
    stands for the keys ``name.0``, ``name.1`` and so on. A key may be missing where the field has
    a default, or None among its types; None is not written. A field ``extra`` takes all keys that
    are no field's, such as those of a user's ``train_config``.
    """

    place: ClassVar[str] = "in the message"
    record_type: ClassVar[type[ConfigRecord] | type[MetricRecord]] = ConfigRecord

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Read and check every field.

        Raises
        ------
        ValueError
            If a value is missing, of another type or out of bounds: key, value, expectation.
        """
        read: dict[str, Any] = {}
        known: set[str] = set()
        for name, at, kind, optional, default, rules in _spec(cls):
            if get_origin(kind) is dict:
                numbered = [k for k in record if k.startswith(f"{at}.")]
                known.update(numbered)
                read[name] = {
                    int(k.removeprefix(f"{at}.")): read_value(record, k, list[int], place=cls.place)
                    for k in numbered
                }
                continue
            known.add(at)
            if at in record or not (optional or default):
                read[name] = read_value(record, at, kind, place=cls.place, **rules)
            elif not default:
                read[name] = None
        if any(field.name == EXTRA for field in dataclasses.fields(cls)):
            read[EXTRA] = {k: v for k, v in record.items() if k not in known}
        return cls(**read)

    def to_dict(self) -> dict[str, Any]:
        """Return keys and values as they stand in the record."""
        told = dict(getattr(self, EXTRA, {}))
        for name, at, kind, *_ in _spec(type(self)):
            value = getattr(self, name)
            if get_origin(kind) is dict:
                told |= {f"{at}.{i}": list(v) for i, v in value.items()}
            elif value is not None:
                told[at] = value
        return told

    def to_record(self) -> Any:
        """Write the fields as a record."""
        return self.record_type(self.to_dict())


class Figures(Fields):
    """A MetricRecord as a frozen dataclass."""

    place = "in the reply's metrics"
    record_type = MetricRecord


def read_value(
    record: Mapping[str, Any],
    key: str,
    kind: Any,
    *,
    default: Any = MISSING,
    place: str = Fields.place,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    one_of: Sequence[str] = (),
) -> Any:
    """Read one value of a record.

    Parameters
    ----------
    record, key : mapping, str
        The record, and the key that is read.
    kind : type
        ``int`` (whole floats are taken too), ``float``, ``str``, ``bool`` or a list of one.
    default
        For a missing key; without it a missing key is an error.
    place : str
        Where the record stands, for the error.
    least, above, most, one_of
        As in `key`.

    Raises
    ------
    ValueError
        One line of key, value and expectation.
    """
    value = record.get(key)
    if value is None and default is not MISSING:
        return default
    many = get_origin(kind) is list
    item = get_args(kind)[0] if many else kind
    values = value if many else [value]
    if isinstance(values, list) and all(
        _is_one(v, item)
        and (least is None or v >= least)
        and (above is None or v > above)
        and (most is None or v <= most)
        and (not one_of or v in one_of)
        for v in values
    ):
        return [item(v) for v in values] if many else item(value)
    expected = "a list of " + _WORDS[item][1] if many else _WORDS[item][0]
    if one_of:
        expected = f"one of {', '.join(one_of)}"
    bounds = ((" from", least), (" above", above), (" up to", most))
    expected += "".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
    raise ValueError(f"'{key}' is {value!r} {place}, expected {expected}")


def config_of(content: RecordDict, mark: str = "") -> ConfigRecord:
    """Return the message's config record: the first, or the first that has the key ``mark``.

    Raises
    ------
    ValueError
        If there is none.
    """
    for record in content.config_records.values():
        if not mark or mark in record:
            return record
    raise ValueError(f"the message has no config record{f' with {mark!r}' if mark else ''}")


def metrics_of(content: RecordDict) -> MetricRecord:
    """Return a reply's metrics, an empty record where it has none."""
    return next(iter(content.metric_records.values()), MetricRecord())


def _is_one(value: Any, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is int and isinstance(value, float):
        return value.is_integer()
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


_Field = tuple[str, str, Any, bool, bool, dict[str, Any]]
"""Name, key, type, whether it may be None, whether it has a default, and rules of a field."""
_SPECS: dict[type, list[_Field]] = {}


def _spec(cls: type[Fields]) -> list[_Field]:
    if cls in _SPECS:
        return _SPECS[cls]
    hints = get_type_hints(cls)
    spec: list[_Field] = []
    for field in dataclasses.fields(cls):
        if field.name == EXTRA:
            continue
        kinds = get_args(hints[field.name]) if get_origin(hints[field.name]) is not list else ()
        optional = NoneType in kinds
        kind = next(k for k in kinds if k is not NoneType) if optional else hints[field.name]
        at = field.metadata.get("key") or field.name.replace("_", "-")
        default = field.default is not MISSING or field.default_factory is not MISSING
        spec.append((field.name, at, kind, optional, default, field.metadata.get("rules", {})))
    return _SPECS.setdefault(cls, spec)
