"""Imports of other libraries without what they import for features that are rarely used."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from typing import Any


@contextlib.contextmanager
def deferred_imports(*modules: str) -> Iterator[None]:
    """Within the block, `import MODULE` binds a module that imports the real one when one of its
    attributes is used after the block, and `from MODULE import function` binds a function that
    imports it when it is called.

    Args:
        modules: full names. Those that are imported already, or not installed, are left alone.
    """
    stand_ins = {
        name: _StandIn(name)
        for name in modules
        if name not in sys.modules and importlib.util.find_spec(name.partition(".")[0])
    }
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in stand_ins.items():
            module.importing = False
            del sys.modules[name]


class _StandIn(types.ModuleType):
    """What stands in for the module of that name."""

    def __init__(self, name: str):
        super().__init__(name)
        self.importing = True
        self.__spec__ = ModuleSpec(name, loader=None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if not self.importing:
            return getattr(importlib.import_module(self.__name__), name)

        def call(*args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(self.__name__), name)(*args, **kwargs)

        return call
