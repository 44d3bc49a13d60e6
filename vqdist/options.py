"""Options as fields of a dataclass: what may be said of one stands beside it, and is checked in one place.

```python
@dataclass(kw_only=True, frozen=True)
class Config:
    lr: float = option(3e-4, at_least=0)
    precision: str = option("fp32", one_of=("fp32", "bf16"))
```
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from vqdist.errors import UserError


def option(
    default: Any = dataclasses.MISSING,
    *,
    default_factory: Callable[[], Any] | Any = dataclasses.MISSING,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    one_of: tuple[str, ...] | None = None,
    free: bool = False,
    own: bool = False,
    part: str | None = None,
) -> Any:
    """Return a dataclass field with what is known of the option; null passes all bounds, and so do its list's items.

    Args:
        default: its value where the user says nothing.
        default_factory: makes that.
        at_least: the lowest value; it must be finite, too.
        above: the value must be larger, and finite.
        at_most: the highest value.
        below: the value must be smaller.
        one_of: the words that it may be.
        free: it may change when a run is resumed, since it does not change what is learnt from there on.
        own: hosts may differ in it.
        part: import path of the registry, `module.NAME`, of an option that takes a part.
    """
    facts = {
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "below": below,
        "one_of": one_of,
        "free": free,
        "own": own,
        "part": part,
    }
    metadata = {name: fact for name, fact in facts.items() if fact is not None and fact is not False}
    if default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=default_factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_options(config: Any) -> None:
    """Raise `UserError` for the first option whose value is not possible."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        facts = field.metadata
        if value is None:
            continue
        if "one_of" in facts and value not in facts["one_of"]:
            choices = ", ".join(facts["one_of"])
            raise UserError(f"{field.name} {value!r} is not known; choose one of {choices}")
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if is_number(item) and not _is_within(item, facts):
                raise UserError(f"{field.name} {value} is not possible; it must be {_bounds_in_words(facts, item)}")


def check_types(config_class: type, options: dict[str, Any]) -> None:
    """Raise `UserError` for the first value that is not of the type of its option; a part may be an object."""
    kinds, parts = get_type_hints(config_class), names_with(config_class, "part")
    for name, value in options.items():
        is_object = name in parts and not isinstance(value, (str, int, float, list, tuple, dict))
        if not is_object and not is_of(value, kinds[name]):
            raise UserError(f"{name} {value!r} is not possible; give {in_words(kinds[name])}")


def in_one_form(config_class: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as a configuration holds them: numbers of Python, paths as strings, a bare word as a list of one.

    The last is for options that take a list or a string.
    """
    kinds, found = get_type_hints(config_class), {}
    for name, value in options.items():
        value = plain(os.fspath(value) if isinstance(value, os.PathLike) else value)
        parts = get_args(kinds.get(name))
        bare = str in parts and any(get_origin(part) is list for part in parts) and isinstance(value, str)
        found[name] = [value] if bare else value
    return found


def plain(value: Any) -> Any:
    """Return numbers of other libraries, as of numpy, as Python's, also within lists and dictionaries."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()  # true and false, too
    if is_whole(value):
        return int(value)
    return float(value) if is_number(value) else value


def is_whole(value: Any) -> bool:
    """Return whether a value is a whole number, of Python or of another library; true and false are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is a real number, of Python or of another library; true and false are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def names_with(config_class: type, fact: str) -> frozenset[str]:
    """Return the names of the options of which something is known, as "free" or "own"."""
    return frozenset(field.name for field in dataclasses.fields(config_class) if fact in field.metadata)


def default_options(config_class: type) -> dict[str, Any]:
    """Return the options that have a default, with it."""
    fields = dataclasses.fields(config_class)
    plain = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    made = {f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING}
    return {**plain, **made}


def _is_within(value: float, facts: Any) -> bool:
    bounded = not {"at_least", "above", "at_most", "below"}.isdisjoint(facts)
    return (
        (not bounded or math.isfinite(value))
        and value >= facts.get("at_least", -math.inf)
        and value <= facts.get("at_most", math.inf)
        and ("above" not in facts or value > facts["above"])
        and ("below" not in facts or value < facts["below"])
    )


def _bounds_in_words(facts: Any, value: float) -> str:
    words = {"at_least": "at least", "above": "above", "below": "below", "at_most": "at most"}
    said = [f"{word} {facts[fact]:g}" for fact, word in words.items() if fact in facts]
    return " and ".join([*said, *(["finite"] if value == math.inf and "at_most" not in facts else [])])


def is_of(value: Any, kind: Any) -> bool:
    """Return whether a value is what an annotation says; whole numbers are numbers, but true and false are none."""
    if kind is Any:
        return True
    parts = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(is_of(value, part) for part in parts)
    if get_origin(kind) is list:
        return isinstance(value, (list, tuple)) and all(is_of(item, parts[0]) for item in value)
    if kind in (int, float):
        return is_whole(value) if kind is int else is_number(value)
    return isinstance(value, get_origin(kind) or kind)


def in_words(kind: Any) -> str:
    """Return an annotation in words: `int | list[int] | None` is "a whole number, a list of whole numbers or null"."""
    parts, origin = get_args(kind), get_origin(kind)
    if origin in (Union, UnionType):
        is_list = any(get_origin(part) is list for part in parts)  # a bare word in its place goes without saying
        *others, last = [in_words(part) for part in parts if part is not str or not is_list]
        return f"{', '.join(others)} or {last}" if others else last
    if kind is Any:
        return "a name, an import path, or class_path and init_args"
    if origin in (list, tuple, Sequence) and parts:
        count = f" {len(parts)}" if origin is tuple and ... not in parts else ""
        if parts[0] in PLURALS:
            return f"a list of{count} {PLURALS[parts[0]]}"
        return f"a list{f' of{count}' if count else ''}, each item {in_words(parts[0])}"
    if kind in (dict, Mapping) or origin in (dict, Mapping):
        return "a dictionary"
    return WORDS.get(kind, str(getattr(kind, "__name__", kind)))


WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    NoneType: "null",
    Path: "a path",
    list: "a list",
}
PLURALS: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "strings"}
