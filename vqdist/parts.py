"""Parts: what a user may bring, by name, by import path or as an object.

A quantizer, an encoder, a term of the loss, an optimizer, a tracker: each kind has one `Registry`. A part is given in
one of three forms, and all kinds take all of them:

- a name that vqdist or the user registered: `fsq`;
- an import path with arguments: `{class_path: my_nets.Encoder, init_args: {width: 32}}`, or the path alone. The words
  are those of jsonargparse and of Lightning's command line;
- in Python also an object that is built already.

The specification, not the object, goes to config.json, so that a run can be resumed and its export loaded. Of an
object that was given built only the import path is known: loading asks for the object again. An import path in a file
from elsewhere is code of somebody else: within `trusting(False)` only registered parts are built. docs/extend.md has
an example of each kind.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from vqdist.errors import PeerLost, RanksDiverged, UserError, an
from vqdist.importing import import_path, parameters_of, reason_of, signature_of
from vqdist.names import near, unknown

T = TypeVar("T")

PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
KEYS = ("class_path", "init_args")
GIVEN_BUILT = "given_as_object"
"""Key of a recorded part whose arguments nobody knows, since it was given as an object."""

PartSpec = str | dict[str, Any]
"""A part as a configuration says it: a name, an import path, or both keys of `KEYS`."""


@dataclass(frozen=True)
class Spec:
    """A part to build: a registered name or an import path, and the arguments.

    Attributes:
        target: the name or the path.
        init_args: keyword arguments.
    """

    target: str
    init_args: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: str | Mapping[str, Any], what: str = "part") -> Spec:
        """Read a specification.

        Args:
            given: the name, the path, or the dictionary.
            what: it is called in the message.

        Raises:
            UserError: for anything else.
        """
        if isinstance(given, str) and given.strip():
            return cls(given.strip())
        if not isinstance(given, Mapping) or "class_path" not in given:
            raise UserError(
                f"{what} {given!r} is not possible; give a name, or class_path and init_args, as "
                "{class_path: my_module.MyClass, init_args: {width: 32}}"
            )
        if given.get(GIVEN_BUILT):
            raise UnavailablePart(
                f"{what} was given as an object of {given['class_path']}, whose arguments nobody recorded; give the "
                f"object again, as in from_pretrained(..., {what.replace(' ', '_')}=my_object)"
            )
        for key in given:
            if key not in KEYS:
                raise UserError(f"{what} has the key {key!r}; expected class_path and init_args{near(key, KEYS)}")
        path, arguments = given["class_path"], given.get("init_args") or {}
        if not isinstance(path, str) or not path.strip():
            raise UserError(f"the class_path of {what} is {path!r}; give a name or an import path, my_module.MyClass")
        if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
            raise UserError(f"the init_args of {what} are {arguments!r}; give arguments by name, as {{width: 32}}")
        return cls(path.strip(), dict(arguments))

    def as_config(self) -> PartSpec:
        """Return what `of` reads: a name without arguments alone, anything else with both keys."""
        if not self.init_args and not PATH.fullmatch(self.target):
            return self.target
        return {"class_path": self.target, "init_args": dict(self.init_args)}


class UnavailablePart(UserError):
    """A part that a file names cannot be built here: it is code that is not trusted, or an object nobody recorded."""


_TRUSTED: ContextVar[bool | None] = ContextVar("vqdist_trusts_code", default=None)


@contextmanager
def trusting(code: bool | None) -> Iterator[None]:
    """Within this context, parts that are not registered are built only if `code` is true.

    Args:
        code: whether a file may name code that does not come with vqdist; None keeps what a context around this one
            says, and is false where there is none.
    """
    token = _TRUSTED.set(bool(_TRUSTED.get() if code is None else code))
    try:
        yield
    finally:
        _TRUSTED.reset(token)


class Registry(Generic[T]):
    """The parts of one kind, by name; it also builds those that are named by import path.

    It reads as a dictionary of the registered factories.

    Args:
        kind: what it is called in messages and in --help, in the singular: "quantizer".
        base: what a part must be: a class or a runtime-checkable protocol, or its import path; None for anything.
        contract: the methods and attributes that a part needs, for the message; by default the name of `base`.
        own: parts that are known by name before their modules are imported: import paths by name.
    """

    def __init__(
        self,
        kind: str,
        base: type[T] | str | None = None,
        *,
        contract: str | None = None,
        own: Mapping[str, str] | None = None,
    ):
        self.kind = kind
        self._base = base
        name = base.rpartition(".")[2] if isinstance(base, str) else getattr(base, "__name__", kind)
        self.contract = contract or name
        self._factories: dict[str, Callable[..., T] | str] = dict(own or {})

    @functools.cached_property
    def base(self) -> type[T] | None:
        """The class or protocol of the parts, or None for anything; imported when it is first asked for."""
        return import_path(self._base, self.kind) if isinstance(self._base, str) else self._base

    def add(self, name: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
        """Register a class or function under a name: `@QUANTIZERS.add("bsq")`.

        Raises:
            UserError: another part has the name.
        """

        def register(factory: Callable[..., T]) -> Callable[..., T]:
            known = self._factories.get(name)
            if known is not None and _place_of(known) != path_of(factory):
                raise UserError(f"there is {an(self.kind)} {name!r} already, {_place_of(known)}; choose another name")
            self._factories[name] = factory
            return factory

        return register

    def names(self) -> list[str]:
        """Return the registered names in the order of registration. Imports nothing."""
        return list(self._factories)

    def __contains__(self, name: object) -> bool:
        return name in self._factories

    def __iter__(self) -> Iterator[str]:
        return iter(self._factories)

    def __len__(self) -> int:
        return len(self._factories)

    def __getitem__(self, name: str) -> Callable[..., T]:
        factory = self._factories[name]
        if isinstance(factory, str):
            factory = self._factories[name] = import_path(factory, self.kind)
        return cast("Callable[..., T]", factory)

    def items(self) -> list[tuple[str, Callable[..., T]]]:
        """Return names and factories."""
        return [(name, self[name]) for name in self]

    def place(self, name: str) -> str:
        """Return the import path of a registered part. Imports nothing."""
        return _place_of(self._factories[name])

    def factory(self, target: str) -> Callable[..., T]:
        """Return the factory of a name, or the class or function of an import path.

        Raises:
            UserError: there is none; the message names the nearest, the module that is missing, or the base class.
        """
        if target in self:
            return self[target]
        self.refuse_unknown(target)
        for name in self:
            if self.place(name) == target:
                return self[name]
        if _TRUSTED.get() is False:
            raise UnavailablePart(
                f"{self.kind} {target} is code that does not come with vqdist; load it with trust_code=True (on the "
                "command line --trust_code true) if you know what it does, or give the built object"
            )
        found = import_path(target, self.kind)
        if not callable(found):
            raise UserError(f"{self.kind} {target} is {an(type(found).__name__)}; give a class or a function")
        if inspect.isclass(found) and self.base is not None and not _may_be(found, self.base):
            raise UserError(f"{self.kind} {target} is no {self.contract}; derive it from {path_of(self.base)}")
        return found

    def refuse_unknown(self, target: str) -> None:
        """Raise `UserError` for what is neither a registered name nor an import path. Imports nothing."""
        if target not in self and not PATH.fullmatch(target):
            raise unknown(self.kind, target, self.names(), "; or give the import path of your own, my_module.MyClass")

    def build(self, given: PartSpec | T, /, *arguments: Any, **context: Any) -> T:
        """Build a part, or return the object that was given.

        Args:
            given: a name, a path, a specification, or the built part.
            *arguments: passed first, to every part of this kind.
            **context: facts that a part may want, as `dim`; passed where the factory has a parameter of that name and
                `init_args` does not say it.

        Raises:
            UserError: there is no such part, an argument is unknown or missing, the factory raises, or the result is
                of another kind. The error of the factory is its `__cause__`.
        """
        if not isinstance(given, (str, Mapping)):
            return self.check(given, type(given).__name__)
        spec, factory, keywords = self._prepared(cast(PartSpec, given), arguments, context)
        try:
            built = factory(*arguments, **keywords)
        except (UserError, PeerLost, RanksDiverged, MemoryError, OverflowError):
            raise
        except (Exception, SystemExit) as error:  # a constructor of a user may raise anything
            raise UserError(f"{self.kind} {spec.target} cannot be built ({reason_of(error)})") from error
        return self.check(built, spec.target)

    def verify(self, given: PartSpec | T, /, *arguments: Any, **context: Any) -> None:
        """Raise what `build` raises before it calls the factory: for ranks that do not build the part."""
        if not isinstance(given, (str, Mapping)):
            self.check(given, type(given).__name__)
        else:
            self._prepared(cast(PartSpec, given), arguments, context)

    def _prepared(
        self, given: PartSpec, arguments: tuple[Any, ...], context: Mapping[str, Any]
    ) -> tuple[Spec, Callable[..., T], dict[str, Any]]:
        """Return the specification, its factory, and the checked keyword arguments."""
        spec = Spec.of(given, self.kind)
        factory = self.factory(spec.target)
        taken = parameters_of(factory)
        known = {name: value for name, value in context.items() if taken is None or name in taken}
        keywords = {**known, **spec.init_args}
        self._check_arguments(spec, factory, arguments, keywords, hidden=known.keys() - spec.init_args.keys())
        return spec, factory, keywords

    def takes(self, target: str, argument: str) -> bool:
        """Return whether the factory of a name or import path has a parameter of this name."""
        taken = parameters_of(self.factory(target))
        return taken is None or argument in taken

    def check(self, part: Any, called: str) -> T:
        """Return a built part; raise `UserError` unless it is of this kind."""
        if self.base is not None and not _is_of(part, self.base):
            missing = missing_members(part, self.base)
            lacks = f"; it lacks {', '.join(missing)}" if missing else ""
            raise UserError(f"{self.kind} {called} is no {self.contract}{lacks}")
        return part

    def _check_arguments(
        self,
        spec: Spec,
        factory: Callable[..., T],
        arguments: tuple[Any, ...],
        keywords: Mapping[str, Any],
        hidden: set[str],
    ) -> None:
        """Raise `UserError` for arguments that the factory does not take, or lacks."""
        taken = parameters_of(factory)
        if taken is not None:
            for name in spec.init_args:
                if name not in taken:
                    rest = [known for known in taken if known not in hidden]
                    raise UserError(
                        f"{self.kind} {spec.target} has no argument {name!r}{near(name, rest)}; "
                        f"it takes {', '.join(rest) or 'none'}"
                    )
        signature = signature_of(factory)
        if signature is None:  # a class of an extension has none: the call says what is wrong
            return
        try:
            signature.bind(*arguments, **keywords)
        except TypeError as error:
            raise UserError(f"{self.kind} {spec.target}: {error}; give it in init_args") from error


def recorded(given: Any) -> Any:
    """Return what config.json holds of a part: its specification, or of an object its import path, marked as such."""
    if given is None or isinstance(given, str):
        return given
    if isinstance(given, Mapping):
        try:
            return _plain(given)
        except TypeError:  # an object among the arguments: nobody could build the part from the file
            return {"class_path": called(given), GIVEN_BUILT: True}
    if isinstance(given, (list, tuple)):
        return [recorded(part) for part in given]
    if inspect.isclass(given) or inspect.isroutine(given):  # as an optimizer's factory
        return path_of(given)
    return {"class_path": path_of(type(given)), GIVEN_BUILT: True}


def _plain(value: Any) -> Any:
    """Return a value as JSON holds it; raise `TypeError` for one that JSON has no form for."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def called(given: Any) -> str:
    """Return a short name of a part for messages: the name or import path given, or the class of an object."""
    if isinstance(given, str):
        return given
    return str(given.get("class_path", "part")) if isinstance(given, Mapping) else type(given).__name__


def arguments_of(factory: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of a class or function, for --help."""
    signature = signature_of(factory)
    return [] if signature is None else list(signature.parameters.values())


def missing_members(part: Any, base: type) -> list[str]:
    """Return the members of a protocol that an object lacks; none where `base` is no protocol."""
    if not getattr(base, "_is_protocol", False):
        return []
    classes = [cls for cls in base.__mro__ if getattr(cls, "_is_protocol", False) and cls.__module__ != "typing"]
    members = {name for cls in classes for name in (*inspect.get_annotations(cls), *vars(cls))}
    return sorted(name for name in members if not name.startswith("_") and not hasattr(part, name))


def _is_of(part: Any, base: type) -> bool:
    """Return whether an object is of a class, or has the members of a protocol.

    From Python 3.12 on, `isinstance` does not see what an object gives by `__getattr__`, as `torch.nn.Module` does
    with a submodule: a decoder's `last_layer` is one.
    """
    if getattr(base, "_is_protocol", False):
        return not missing_members(part, base)
    return isinstance(part, base)


def _may_be(cls: type, base: type) -> bool:
    """Return whether instances of a class may be of a base; of protocols with attributes only instances tell."""
    if getattr(base, "_is_protocol", False):
        return True
    return issubclass(cls, base)


MOVED = {
    "vqdist.trainers.muon.MuonWithAdamW": "vqdist.trainers.optimizers.MuonWithAdamW",
    "vqdist.trainers.muon.muon": "vqdist.trainers.optimizers.muon",
    "vqdist.trainers.library_optimizers.schedule_free": "vqdist.trainers.optimizers.schedule_free",
    "vqdist.trainers.library_optimizers.adamw_8bit": "vqdist.trainers.optimizers.adamw_8bit",
}
"""Import paths that records of runs hold, where something has moved: the path now, and the one before."""


def is_same(one: Any, other: Any) -> bool:
    """Return whether two values of a record are equal, or import paths of one thing that has moved since."""
    if isinstance(one, str) and isinstance(other, str):
        return MOVED.get(one, one) == MOVED.get(other, other)
    return bool(one == other)


def path_of(thing: Any) -> str:
    """Return the import path of a class, a function, or of an object's class."""
    return f"{thing.__module__}.{getattr(thing, '__qualname__', type(thing).__name__)}"


def _place_of(factory: Any) -> str:
    return factory if isinstance(factory, str) else path_of(factory)
