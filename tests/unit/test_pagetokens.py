"""Tokens of pages: only for the list, and the order, that they are of."""

from __future__ import annotations

import base64
from itertools import product

import pytest

from spinetta.errors import UserError
from spinetta.node.services import pagetokens
from tests.builders import task_id

KINDS = ("", "a")


@pytest.mark.parametrize(("newest", "kind"), list(product((False, True), KINDS)))
def test_a_token_says_where_its_own_list_goes_on(newest: bool, kind: str) -> None:
    token = pagetokens.make(task_id(7), newest=newest, kind=kind)
    assert pagetokens.parse(token, newest=newest, kind=kind) == task_id(7)
    with pytest.raises(UserError, match="of the other order"):
        pagetokens.parse(token, newest=not newest, kind=kind)
    (other,) = set(KINDS) - {kind}
    with pytest.raises(UserError, match="not a page token"):
        pagetokens.parse(token, newest=newest, kind=other)


@pytest.mark.parametrize("text", ["x", "n", "nothing", "é" * 8, f"x{task_id(1)}"])
def test_what_is_none(text: str) -> None:
    for token in (text, base64.urlsafe_b64encode(text.encode()).decode()):
        for kind in KINDS:
            with pytest.raises(UserError, match="not a page token"):
                pagetokens.parse(token, newest=True, kind=kind)
    assert pagetokens.parse("", newest=True) == ""
