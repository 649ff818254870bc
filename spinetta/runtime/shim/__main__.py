"""Entry when the directory is run by path: make this directory a package named ``shim`` and start it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType


class _Later(ModuleType):
    """A module that is loaded when something of it is wanted."""

    def __getattr__(self, name: str) -> object:
        del sys.modules[self.__name__]
        found: object = getattr(importlib.import_module(self.__name__), name)
        return found


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    # The directory itself must not be searched (its modules would shadow others); its parent comes last for the same
    # reason.
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != here] + [str(here.parent)]
    # What dataclasses imports for classes without a docstring: with all that comes with it a megabyte of each process.
    sys.modules["inspect"] = _Later("inspect")
    sys.exit(importlib.import_module("shim.main").main(sys.argv[1:]))
