"""Limits of open files: what may be asked for, who gives it, and what is said of those who do not."""

from __future__ import annotations

from typing import Any

import pytest

from spinetta import openfiles
from spinetta.cli import show
from spinetta.client.specs import make_spec
from spinetta.config import resolve
from spinetta.container import ContainerSpec, check_allowance, needs, refusals
from spinetta.errors import UserError
from spinetta.match import Obstacle, why_never
from spinetta.model import QueueHint, Resources
from spinetta.openfiles import OPEN_FILES_MAX, OPEN_FILES_MIN, limits
from tests.unit.test_config import DEFAULTS

ROOM = Resources.of(4000)
GIVES = ("container", "open-files:65536", "process")


@pytest.mark.parametrize(
    ("asked", "usual", "most", "found"),
    [
        (0, 65536, 1 << 20, (1024, 65536)),  # as every program is started, and may raise
        (0, 512, 1 << 20, (512, 512)),
        (0, 65536, 4096, (1024, 4096)),  # what the machine does not let us give is not asked of it
        (0, 0, 1 << 20, (0, 0)),  # nothing is said of it
        (20000, 65536, 1 << 20, (20000, 20000)),  # held to just that, and from the start
        (64, 65536, 1 << 20, (64, 64)),
        (100_000, 65536, 1 << 20, (100_000, 100_000)),
        (100_000, 65536, 4096, (100_000, 100_000)),  # not matched there; and should it be, never less than asked for
    ],
)
def test_limits(asked: int, usual: int, most: int, found: tuple[int, int]) -> None:
    assert limits(asked, usual, most) == found


def test_a_number_is_a_need_and_matched_as_one() -> None:
    assert needs(None, 0) == ()
    assert needs(None, 5000) == ("open-files:5000",)
    assert needs(ContainerSpec("docker://a.test/b"), 5000) == (
        "container",
        "image:docker://a.test/b",
        "open-files:5000",
    )
    for asked, allows, refused in (
        (65536, GIVES, []),
        (65537, GIVES, ["open-files:65537"]),
        (5000, ("process",), ["open-files:5000"]),  # a node from before
        (5000, (), ["open-files:5000"]),
        (5000, ("container", "open-files:65536"), ["process"]),
    ):
        assert refusals(needs(None, asked), allows) == refused
    assert QueueHint.of(make_spec("a", open_files=5000)).needs == ("open-files:5000",)


@pytest.mark.parametrize(
    "text", ["open-files:", "open-files:x", "open-files:-1", "open-files:²", "open-files:" + "9" * 19]
)
def test_what_is_no_such_word(text: str) -> None:
    assert openfiles.number_of(text) is None
    assert openfiles.most((text,)) == 0
    assert refusals((text,), GIVES) == [text]


def test_nobody_allows_it_by_a_setting() -> None:
    with pytest.raises(UserError, match="not an allowance"):
        check_allowance("open-files:100")


def test_reasons() -> None:
    hint = QueueHint.of(make_spec("a", open_files=100_000))
    reason = why_never(hint, ROOM, frozenset(), (), GIVES)
    assert reason is not None
    assert reason.obstacle is Obstacle.TOO_LARGE
    assert reason.detail == "100000 open files wanted, at most 65536 there"
    reason = why_never(hint, ROOM, frozenset(), (), ("process",))
    assert reason is not None
    assert reason.detail == "the node is of a version that sets no limit on open files"
    both = QueueHint.of(make_spec("a", open_files=100_000, image="docker://a.test/b", network="host"))
    reason = why_never(both, ROOM, frozenset(), (), GIVES)
    assert reason is not None
    assert (reason.obstacle, reason.detail) == (Obstacle.NOT_ALLOWED, "the node does not allow network:host")
    assert why_never(QueueHint.of(make_spec("a", open_files=65536)), ROOM, frozenset(), (), GIVES) is None


@pytest.mark.parametrize("number", [OPEN_FILES_MIN, 1024, OPEN_FILES_MAX])
def test_numbers_that_may_be_asked_for(number: int) -> None:
    made = make_spec("a", open_files=number)
    assert made.open_files_max == number
    assert show.spec_document(made)["open_files_max"] == number
    assert (
        resolve({"open_files": "64", "open_files_max": str(number)}, {}, [], DEFAULTS).settings.open_files_max == number
    )


@pytest.mark.parametrize("number", [-1, 1, OPEN_FILES_MIN - 1, OPEN_FILES_MAX + 1, "many", 1.5, True])
def test_numbers_that_may_not(number: Any) -> None:
    with pytest.raises(UserError) as caught:
        make_spec("a", open_files=number)
    assert caught.value.field == "open_files"


def test_settings_agree() -> None:
    defaults = resolve({}, {}, [], DEFAULTS).settings
    assert (defaults.open_files, defaults.open_files_max) == (65536, 1 << 20)
    with pytest.raises(UserError, match=r"open_files 65536 .* is more than open_files_max 4096") as caught:
        resolve({"open_files_max": "4096"}, {}, [], DEFAULTS)
    assert caught.value.field == "node.open_files"
