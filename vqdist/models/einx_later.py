"""einx is imported when one of its functions is called, not when a library that knows it is imported."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class _EinxLater(ModuleType):
    """Stands for einx in the modules that are imported meanwhile: a name of it is a function that calls einx's."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):  # what the import system asks for
            raise AttributeError(name)
        return functools.partial(_call, name)


def _call(name: str, *arguments: Any, **keywords: Any) -> Any:
    return getattr(importlib.import_module("einx"), name)(*arguments, **keywords)


@contextmanager
def einx_later() -> Iterator[None]:
    """Within this context, modules that import einx get a stand-in, which imports it on the first call.

    vector-quantize-pytorch and x-transformers call einx in a few places only, which most models never reach. Its
    import brings sympy, and tells torch._dynamo of its functions, which takes longer than to import torch.

    After the context `import einx` means einx again. A thread that imports it meanwhile gets functions that work, too.
    Both libraries are bounded in setup.py to versions that only call functions of einx.
    """
    if "einx" in sys.modules:
        yield
        return
    later = _EinxLater("einx")
    sys.modules["einx"] = later
    try:
        yield
    finally:
        if sys.modules.get("einx") is later:
            del sys.modules["einx"]
