"""Code of users: its import by path, the signatures of what it has, and the line of it that raised an error."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vqdist.errors import UserError
from vqdist.names import near

INSTALLED = f"{os.sep}site-packages{os.sep}"
# files that are no user's: of the import system, of the standard library, of vqdist
_NOT_OWN = ("<frozen", str(Path(os.__file__).parent) + os.sep, str(Path(__file__).parent) + os.sep)


def import_path(path: str, what: str = "part") -> Any:
    """Return the object at an import path, `package.module.Name` or deeper.

    Raises:
        UserError: the module is not found, cannot be imported, or has no such name; the nearest is named.
    """
    module_name, _, rest = path.rpartition(".")
    names = [rest]
    while True:
        try:
            found: Any = importlib.import_module(module_name)
            break
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if missing != module_name and not module_name.startswith(f"{missing}."):
                raise UserError(f"{what} {path}: {module_name} needs a module that is missing: {missing}") from error
            if "." not in module_name:
                raise UserError(
                    f"{what} {path}: there is no module {module_name!r} here; start the command in the folder that "
                    "holds it, or put that folder on PYTHONPATH"
                ) from error
            module_name, _, name = module_name.rpartition(".")
            names.insert(0, name)
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # a module of a user may raise anything while it is imported
            raise UserError(f"{what} {path}: {module_name} cannot be imported ({reason_of(error)})") from error
    for name in names:
        if not hasattr(found, name):
            public = [known for known in dir(found) if not known.startswith("_")]
            raise UserError(f"{what} {path}: {_name_of(found)} has no {name!r}{near(name, public)}")
        found = getattr(found, name)
    return found


def reason_of(error: BaseException) -> str:
    """Return an error in one line, with the last line of the user's own files that led to it, if there is one."""
    said = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")[:200]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_NOT_OWN) and INSTALLED not in frame.filename]
    return f"{said}; {Path(own[-1].filename).name}, line {own[-1].lineno}" if own else said


def signature_of(factory: Callable[..., Any]) -> inspect.Signature | None:
    """Return the signature of a class or function, or None of one that has none."""
    try:
        # kept, since a schedule is built in every step
        return _kept_signature(factory) if inspect.isroutine(factory) else inspect.signature(factory)
    except (TypeError, ValueError):
        return None


_kept_signature = functools.lru_cache(maxsize=64)(inspect.signature)


def parameters_of(factory: Callable[..., Any]) -> list[str] | None:
    """Return the names of keyword arguments; None where any is taken or nobody can tell."""
    signature = signature_of(factory)
    if signature is None:
        return None
    parameters = signature.parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter.name for parameter in parameters if parameter.kind in kinds]


def _name_of(thing: Any) -> str:
    return getattr(thing, "__name__", type(thing).__name__)
