"""Page tokens: where a list goes on. Of which list and in which order is in them, so that none is used for another."""

from __future__ import annotations

import base64
import binascii

from spinetta import validate
from spinetta.errors import UserError


def make(last: str, *, newest: bool, kind: str = "") -> str:
    """The token for what comes after the task `last`. `kind`: of the list, no digit of an id."""
    return base64.urlsafe_b64encode(f"{kind}{'n' if newest else 'o'}{last}".encode()).decode()


def parse(token: str, *, newest: bool, kind: str = "") -> str:
    """After which task; empty: from the beginning.

    Raises:
        UserError: it is no token, or of another list, or of the other order.
    """
    if not token:
        return ""
    try:
        text = base64.urlsafe_b64decode(token.encode()).decode("ascii")
    except (ValueError, binascii.Error, UnicodeError):
        text = ""
    found, order, last = text[: len(kind)], text[len(kind) : len(kind) + 1], text[len(kind) + 1 :]
    if found != kind or order not in ("n", "o") or not validate.is_task_id(last):
        raise UserError("not a page token", field="page_token", hint="use the one of the page before, unchanged")
    if (order == "n") != newest:
        raise UserError("this page token is of the other order", field="page_token", hint="keep newest_first as it was")
    return last
