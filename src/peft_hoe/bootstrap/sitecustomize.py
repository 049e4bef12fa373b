"""Imports peft_hoe right after peft, in a program started by `peft-hoe run` and in every Python process that it starts.

Python imports a module of this name at start-up when its folder is on PYTHONPATH. Another sitecustomize that this one
hides is run first.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))


class _RegistersHoE(importlib.abc.Loader):
    """peft's own loader, and peft_hoe after it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: Any) -> Any:
        """As peft's own loader does."""
        return self._inner.create_module(spec)

    def exec_module(self, module: Any) -> None:
        """Run peft, then import peft_hoe, which registers itself there."""
        self._inner.exec_module(module)
        importlib.import_module("peft_hoe")


class _WatchesForPeft(importlib.abc.MetaPathFinder):
    """The first finder that Python asks: it finds nothing but peft, as the others do, with a loader of ours around theirs."""

    _looking = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """The spec of peft; None for anything else, so that the other finders are asked."""
        # Programs also look for peft without importing it, so looking once does not end the watch.
        if fullname != "peft" or self._looking:
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec("peft")
        finally:
            self._looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _RegistersHoE(spec.loader)
        return spec


def _run_hidden_sitecustomize() -> None:
    elsewhere = [entry for entry in sys.path if os.path.abspath(entry) != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


_run_hidden_sitecustomize()
sys.meta_path.insert(0, _WatchesForPeft())
