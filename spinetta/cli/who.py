"""What commands about rights share: words from options, documents and cells of tables, completion of names."""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from spinetta.cli import output
from spinetta.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from click.shell_completion import CompletionItem

    from spinetta.access import GroupMapping, UserAcl
    from spinetta.client.admin import Access
    from spinetta.client.aio import AsyncClient

E = TypeVar("E", bound=enum.IntEnum)

UNREADABLE_TOLD_MAX = 20  # records: more than that is one cause, and a screen is full
COMPLETION_LIMIT_S = "1s"  # somebody has pressed Tab and waits


def words(given: Iterable[str]) -> tuple[str, ...]:
    """Options that may be repeated or hold commas, as sorted words: ``-c a,b -c c`` → a, b, c."""
    return tuple(sorted({w.strip() for text in given for w in text.split(",") if w.strip()}))


def labels(given: Iterable[str], field: str = "clearance") -> tuple[str, ...]:
    """The same for clearance labels.

    Raises:
        UserError: one is none.
    """
    from spinetta.names import check_clearance

    return tuple(check_clearance(label, field) for label in words(given))


def role_word(role: enum.IntEnum) -> str:
    """As people write it."""
    return role.name.lower()


def rights_words(given: UserAcl | GroupMapping) -> str:
    """What a user, or a member of an issuer's group, may do."""
    parts = [role_word(given.role)]
    if given.projects:
        parts.append(f"projects {', '.join(given.projects)}")
    if given.clearances:
        parts.append(f"cleared for {', '.join(given.clearances)}")
    return "; ".join(parts)


def role_of(kind: type[E], word: str) -> E:
    """The role of a word from a list of choices."""
    return kind[word.upper()]


def document(value: Any, *, without: Sequence[str] = ()) -> Any:
    """A record as plain data for JSON: roles as words, bytes in hexadecimal."""
    if is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: document(getattr(value, f.name), without=without) for f in fields(value) if f.name not in without
        }
    if isinstance(value, tuple | list):
        return [document(item, without=without) for item in value]
    if isinstance(value, enum.IntEnum):
        return role_word(value)
    if isinstance(value, bytes):
        return value.hex()
    return value


def cell(given: Sequence[str]) -> str:
    """Words in a table."""
    return ",".join(given)


def confirm(question: str, *, yes: bool, as_json: bool) -> None:
    """Ask before what cannot be undone.

    Raises:
        UserError: nobody can be asked, and --yes was not given.
        click.Abort: the answer is no.
    """
    if yes:
        return
    if as_json or not sys.stdin.isatty():
        raise UserError(f"{question} Nobody is here to say so", field="yes", hint="add --yes")
    click.confirm(question, abort=True, err=True)


def done(text: str, found: object, *, as_json: bool) -> None:
    """Say what was done: a line, or a document."""
    if as_json:
        output.put_json(found)
    else:
        output.say(text)


def tell_unreadable(those: Sequence[str]) -> None:
    """Warn of records that a list does not show, with what to do about them."""
    for key in those[:UNREADABLE_TOLD_MAX]:
        output.tell(f"warning: {output.printable(key)} cannot be read, and nobody has rights by it")
    if len(those) > UNREADABLE_TOLD_MAX:
        output.tell(f"warning: and {len(those) - UNREADABLE_TOLD_MAX} more cannot be read: --json names all")
    if those:
        output.tell("On a voter: spinetta etcdctl del KEY; then make it anew")


def _completing(pick: Callable[[Access], Iterable[str]], incomplete: str) -> list[CompletionItem]:
    """Names that begin so, asked of the cluster; nothing when it does not answer at once."""

    async def names(client: AsyncClient) -> Iterable[str]:
        return pick(await client.admin.members())

    return _completing_by(names, incomplete)


def _completing_by(
    names: Callable[[AsyncClient], Coroutine[Any, Any, Iterable[str]]], incomplete: str
) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from spinetta.cli.base import with_client
    from spinetta.errors import SpinettaError

    try:
        found = with_client(names, None, COMPLETION_LIMIT_S, None)
    except SpinettaError:
        return []
    return [CompletionItem(name) for name in found if name.startswith(incomplete)]


def complete_running_node(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Nodes that `spinetta node list` shows."""

    async def names(client: AsyncClient) -> Iterable[str]:
        return [info.record.name for info in (await client.nodes()).nodes]

    return _completing_by(names, incomplete)


def complete_node(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Approved nodes."""
    return _completing(lambda a: (n.name for n in a.nodes), incomplete)


def complete_request(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Nodes that wait for approval."""
    return _completing(lambda a: (r.name for r in a.requests), incomplete)


def complete_user(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Users."""
    return _completing(lambda a: (u.name for u in a.users), incomplete)


def complete_group(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Groups."""
    return _completing(lambda a: (g.name for g in a.groups), incomplete)
