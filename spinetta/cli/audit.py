"""``spinetta audit``: who did what at a node."""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spinetta.cli import exits, output
from spinetta.cli.base import Finished, config_option, json_option
from spinetta.errors import UserError

if TYPE_CHECKING:
    from spinetta.trust.audit import Entry

FOLLOW_EVERY_S = 0.5
HEADS_MAX = 100


@click.group(epilog=exits.HELP)
def audit() -> None:
    """Read and check the audit log of a node on this machine.

    Each node writes down who asked it for what, whether it was allowed, and at which revision of the store it was
    done. Lines are bound to each other by hashes, so that one that was changed or removed is found.

    \b
    Examples:
      spinetta audit show --since 1h --identity "user ann"
      spinetta audit show --follow
      spinetta audit verify
    """


def _directory(data_dir: str | None, config_file: str | None) -> Path:
    from spinetta.cli.node import resolved_node

    return Path(resolved_node({"data_dir": data_dir}, config_file).settings.data_dir) / "audit"


@audit.command()
@click.option("--data-dir", metavar="PATH", help="Of the node [SPINETTA_DATA_DIR].")
@click.option("--since", metavar="TIME", help="Only lines of the last so long, e.g. 2h.")
@click.option("--identity", metavar="TEXT", help="Only lines of, e.g., 'user ann' or ann.")
@click.option("--call", metavar="TEXT", help="Only lines of this call, e.g. cancel.")
@click.option("--refused", is_flag=True, help="Only lines of what was not allowed or did not work.")
@click.option("--follow", "-f", is_flag=True, help="Wait for more; Ctrl-C ends.")
@json_option
@config_option
def show(
    data_dir: str | None,
    since: str | None,
    identity: str | None,
    call: str | None,
    refused: bool,
    follow: bool,
    as_json: bool,
    config_file: str | None,
) -> None:
    """Print the lines of the log, the oldest first. With --json each line is a document.

    \b
    Examples:
      spinetta audit show --refused --since 1d
      spinetta audit show --json | jq 'select(.call == "tokens")'
    """
    from spinetta.units import parse_duration

    if call:
        _check_call(call)
    since_ms = int((time.time() - parse_duration(since, "since")) * 1000) if since else 0

    def wanted(e: Entry) -> bool:
        return (
            e.time_ms >= since_ms
            and (not identity or identity in (e.identity, e.identity.partition(" ")[2]))
            and (not call or call.lower() == e.call.lower())
            and not (refused and e.outcome in ("ok", "begun"))
        )

    from spinetta.trust.auditreading import Tail

    tail = Tail(_directory(data_dir, config_file))
    lines = tail.read()
    first = next(lines, None)  # a wrong directory is told before anything is printed
    if not as_json:
        output.say(_HEADER)
    try:
        while True:
            for entry in lines if first is None else itertools.chain((first,), lines):
                if wanted(entry):
                    _put(entry, as_json=as_json)
            if not follow:
                return
            sys.stdout.flush()
            time.sleep(FOLLOW_EVERY_S)
            first, lines = None, tail.read()
    except KeyboardInterrupt:
        raise Finished(exits.INTERRUPTED) from None


def _check_call(call: str) -> None:
    """Refuse what no line has: an empty table would look like an answer."""
    from spinetta.rights import Call
    from spinetta.trust.audit import GAP, TORN

    known = [*(c.value for c in Call), TORN, GAP]
    if call.lower() not in known:
        raise UserError(f"there is no call {call[:80]!r}", field="call", hint=f"one of {', '.join(known)}")


_WIDTHS = (24, 18, 16, 16, 9)
_HEADINGS = ("TIME", "WHO", "CALL", "OUTCOME", "REVISION")
_HEADER = "  ".join([*(h.ljust(w) for h, w in zip(_HEADINGS, _WIDTHS, strict=True)), "WHAT"])


def _put(e: Entry, *, as_json: bool) -> None:
    if as_json:
        from dataclasses import asdict

        output.put_json_line(asdict(e))
        return
    from spinetta.cli.show import moment

    outcome, _, words = e.outcome.partition(": ")  # of a refusal the reason; its words are as long as they are
    what = " ".join(part for part in (e.object, *(f"({more})" for more in (words, e.detail) if more)) if part)
    cells = (moment(e.time_ms), e.identity, e.call, outcome, str(e.revision or ""))
    line = "  ".join(output.printable(c).ljust(w) for c, w in zip(cells, _WIDTHS, strict=True))
    output.say(f"{line}  {output.printable(what)}".rstrip())


@audit.command()
@click.option("--data-dir", metavar="PATH", help="Of the node [SPINETTA_DATA_DIR].")
@click.option("--head", "heads", multiple=True, metavar="NUMBER:HASH", help="A line that was noted elsewhere before.")
@json_option
@config_option
def verify(data_dir: str | None, heads: tuple[str, ...], as_json: bool, config_file: str | None) -> None:
    """Check that no line was changed, removed or added in between; exit code 1 when one was.

    What was cut off at the end can only be told by a line that was noted elsewhere before: --head NUMBER:HASH, as
    this command prints it.

    \b
    Examples:
      spinetta audit verify
      spinetta audit verify --data-dir /var/lib/spinetta --head 1041:5f0c…
    """
    from spinetta.trust.auditreading import verify as check

    if len(heads) > HEADS_MAX:
        raise UserError(f"{len(heads)} heads", field="head", hint=f"at most {HEADS_MAX}")
    found = check(_directory(data_dir, config_file), tuple(_head(text) for text in heads))
    seq, digest = found.head
    if as_json:
        output.put_json(
            {
                "whole": not found.faults,
                "entries": found.entries,
                "first": found.first_seq,
                "head": {"number": seq, "hash": digest},
                "faults": list(found.faults),
            }
        )
    else:
        for fault in found.faults:
            output.tell(f"{output.paint('fault:', 'red')} {fault}")
        if not found.faults:
            output.say(f"{found.entries} lines, from {found.first_seq} to {seq}: whole")
            output.say(f"head {seq}:{digest}")
    if found.faults:
        raise Finished(exits.TASK_FAILED)


def _head(text: str) -> tuple[int, str]:
    number, colon, digest = text.partition(":")
    if not colon or not number.isdecimal() or len(number) > 18 or len(digest) != 64:
        raise UserError(f"not NUMBER:HASH: {text[:80]!r}", field="head", hint="as `spinetta audit verify` prints it")
    return int(number), digest.lower()
