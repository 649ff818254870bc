"""Files that people name in options."""

from __future__ import annotations

import sys
from pathlib import Path

from spinetta.errors import UserError


def read_limited(path: str, bytes_max: int) -> bytes:
    """What is in a file, or comes from standard input (``-``); one byte more than `bytes_max` when that is too little.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if path == "-":
            return sys.stdin.buffer.read(bytes_max + 1)
        with Path(path).open("rb") as file:
            return file.read(bytes_max + 1)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}", field="file", hint="check --file") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}", field="file", hint="check its permissions") from e
