"""How many files each process of a task may have open: what is asked for, what a node gives, and the word for both.

In a task's needs ``open-files:100000`` is what it asks for; in what a node allows, the most that it gives. A node
without such a word (of an older version) sets no limit that was asked for, so that no task that asks for one is matched
there.
"""

from __future__ import annotations

from collections.abc import Iterable

from spinetta.errors import UserError

KIND = "open-files"
SOFT_USUAL = 1024  # what programs have always been started with: beyond it select(2) writes where it must not
OPEN_FILES_MIN = 64  # less is a slip; what starts a container needs 8 itself, an interpreter with libraries some dozens
OPEN_FILES_MAX = 1 << 30  # as many as systemd lets the kernel count to: a mistyped number, not a wish


def check(number: int, field: str) -> None:
    """Raise UserError unless a task may ask for so many; 0: it asks for nothing."""
    if number and not OPEN_FILES_MIN <= number <= OPEN_FILES_MAX:
        raise UserError(
            f"{number} is out of range for a number of open files",
            field=field,
            hint=f"{OPEN_FILES_MIN} to {OPEN_FILES_MAX}; 0: the node's default",
        )


def word(number: int) -> str:
    """For a task's needs, or for what a node allows."""
    return f"{KIND}:{number}"


def number_of(text: str) -> int | None:
    """The number in such a word; None when it is another word."""
    kind, _, digits = text.partition(":")
    return int(digits) if kind == KIND and digits.isascii() and digits.isdecimal() and len(digits) <= 18 else None


def most(allows: Iterable[str]) -> int:
    """What a node with these allowances gives at most; 0: none that was asked for."""
    return max((n for text in allows if (n := number_of(text)) is not None), default=0)


def limits(asked: int, usual: int, most_here: int) -> tuple[int, int]:
    """Soft and hard limit of a task's processes.

    Args:
        asked: by the task, which is then held to just that; 0: nothing, and it gets what is usual: few at first, as
            every program expects, which it may raise itself.
        usual: the node's hard limit for those that ask for nothing.
        most_here: what the machine lets the node set.
    """
    if asked:
        return asked, asked
    hard = min(usual, most_here)
    return min(SOFT_USUAL, hard), hard
