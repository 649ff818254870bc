"""Entry when the directory is run by path: make this directory a package named ``shim`` and start it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    # The directory itself must not be searched (its modules would shadow others); its parent comes last for the same
    # reason.
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != here] + [str(here.parent)]
    sys.exit(importlib.import_module("shim.main").main(sys.argv[1:]))
