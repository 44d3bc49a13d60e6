"""The signature and the docstring of a class of vqdist, read from its file: to import it would import torch.

The command line is made of them, so that `--help` and a misspelt option are answered at once.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import inspect
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
# modules of vqdist that import no torch, so that what others import of them can be had
LIGHT = ("vqdist.errors", "vqdist.options", "vqdist.parts", "vqdist.registries", "vqdist.schedules", "vqdist.sizes")
OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.BitOr: operator.or_,
    ast.Div: operator.truediv,
    ast.Mult: operator.mul,
    ast.Pow: operator.pow,
    ast.Sub: operator.sub,
}


class _Unknown(Exception):
    """A name that only an import of torch could explain."""


@functools.cache
def declared(module: str, name: str) -> type:
    """Return a class with the constructor's signature and the docstrings of one of vqdist's, and nothing in it.

    Annotations that torch explains are `Any`. Where a file is not there to be read, or says a default in terms of
    torch, the class itself is imported and returned.

    Args:
        module: its module, as "vqdist.models.vqgan".
        name: the class, with a constructor of its own.
    """
    try:
        return _stand_in(_Source.of(module), name)
    except (OSError, KeyError, _Unknown):
        return getattr(importlib.import_module(module), name)


class _Source:
    """A module as it is written.

    Attributes:
        defined: statements that define a name at the top of the module, by name.
    """

    def __init__(self, tree: ast.Module):
        self.defined: dict[str, ast.stmt] = {}
        for node in tree.body:
            for name in _names_of(node):
                self.defined[name] = node

    @classmethod
    @functools.cache
    def of(cls, module: str) -> _Source:
        """Read a module of vqdist; raise `OSError` if its file is not there."""
        path = ROOT.joinpath(*module.split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        return cls(ast.parse(path.read_text(encoding="utf-8")))

    def value(self, node: ast.expr) -> Any:
        """Return the value of an expression; raise `_Unknown` for one that only an import of torch could explain."""
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                return self.named(node.id)
            case ast.Attribute():
                return getattr(self.value(node.value), node.attr)
            case ast.Subscript():
                return self.value(node.value)[self.value(node.slice)]
            case ast.Tuple():
                return tuple(map(self.value, node.elts))
            case ast.List():
                return list(map(self.value, node.elts))
            case ast.Dict():
                return {self.value(key): self.value(item) for key, item in zip(node.keys, node.values) if key}
            case ast.BinOp() if type(node.op) in OPERATORS:
                return OPERATORS[type(node.op)](self.value(node.left), self.value(node.right))
            case ast.UnaryOp(op=ast.USub()):
                return -self.value(node.operand)
        raise _Unknown(ast.unparse(node))

    def named(self, name: str) -> Any:
        """Return what a name at the top of the module is; raise `_Unknown` as `value` does."""
        node = self.defined.get(name)
        if node is None and hasattr(builtins, name):
            return getattr(builtins, name)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
            return _light(original) if isinstance(node, ast.Import) else _imported(str(node.module), original)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            return self.value(node.value)
        raise _Unknown(name)


def _imported(module: str, name: str) -> Any:
    if module.startswith("vqdist.") and module not in LIGHT:
        return _Source.of(module).named(name)
    return getattr(_light(module), name)


def _light(module: str) -> Any:
    """Import a module of the standard library, or one of vqdist that imports no torch."""
    if module not in LIGHT and module.partition(".")[0] not in sys.stdlib_module_names:
        raise _Unknown(module)
    return importlib.import_module(module)


def _names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return [node.name] if isinstance(node, (ast.ClassDef, ast.FunctionDef)) else []


def _stand_in(source: _Source, name: str) -> type:
    found = source.defined[name]
    if not isinstance(found, ast.ClassDef):
        raise KeyError(name)
    members: dict[str, Any] = {"__doc__": ast.get_docstring(found), "__module__": __name__}
    for node in found.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            members["__init__"] = _constructor(source, node)
        if isinstance(node, ast.AnnAssign) and _names_of(node) == ["part_options"] and node.value is not None:
            members["part_options"] = source.value(node.value)
    if "__init__" not in members:
        raise KeyError(f"{name}.__init__")
    return type(f"{name}Options", (), members)  # a name of its own: jsonargparse asks the package for that of a class


def _constructor(source: _Source, node: ast.FunctionDef) -> Callable[..., None]:
    """Return a function of the same signature that does nothing; `**kwargs` are left out."""
    said = node.args
    plain = [*said.posonlyargs, *said.args]
    of_plain = [*[None] * (len(plain) - len(said.defaults)), *said.defaults]
    kinds: list[tuple[Any, ast.arg, ast.expr | None]]
    kinds = [(inspect.Parameter.POSITIONAL_OR_KEYWORD, *one) for one in zip(plain, of_plain, strict=True)]
    kinds += [(inspect.Parameter.KEYWORD_ONLY, *one) for one in zip(said.kwonlyargs, said.kw_defaults, strict=True)]
    parameters = [
        inspect.Parameter(
            argument.arg,
            kind,
            default=inspect.Parameter.empty if default is None else source.value(default),
            annotation=_annotation(source, argument.annotation),
        )
        for kind, argument, default in kinds
    ]

    def constructor(self: Any) -> None:
        raise NotImplementedError("a stand-in is never built")

    stand_in: Any = constructor
    stand_in.__name__ = "__init__"  # by which jsonargparse knows it
    stand_in.__signature__ = inspect.Signature(parameters)
    stand_in.__annotations__ = {one.name: one.annotation for one in parameters if one.annotation is not one.empty}
    return stand_in


def _annotation(source: _Source, expression: ast.expr | None) -> Any:
    if expression is None:
        return inspect.Parameter.empty
    try:
        return source.value(expression)
    except _Unknown:
        return Any
