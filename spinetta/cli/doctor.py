"""``spinetta doctor``: what a machine lacks for a node."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from spinetta.cli import exits, output
from spinetta.cli.base import Finished, config_option, json_option
from spinetta.cli.node import resolved_node, setting_options
from spinetta.errors import UserError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from spinetta.checkup import Finding
    from spinetta.config import Resolved, Settings

PROBLEMS = exits.TASK_FAILED
COLOURS = {"ok": "green", "note": "blue", "warning": "yellow", "problem": "red"}
LINE_MIN = 40  # of text beside the names; narrower terminals wrap by themselves
PLURALS = {"note": "notes", "warning": "warnings", "problem": "problems"}


def complete_checks(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of checks, after what stands before the last comma."""
    from click.shell_completion import CompletionItem

    from spinetta.node.doctor.examine import CHECKS

    before, comma, begun = incomplete.rpartition(",")
    given = before.split(",")
    return [CompletionItem(f"{before}{comma}{name}") for name in CHECKS if name.startswith(begun) and name not in given]


@click.command()
@click.option(
    "--only",
    "only",
    metavar="NAME,…",
    multiple=True,
    shell_complete=complete_checks,
    help="These checks only; --only list names all.",
)
@json_option
@setting_options
@config_option
def doctor(only: tuple[str, ...], as_json: bool, config_file: str | None, **flags: str | None) -> None:
    """Check this machine, before it runs a node or while it does.

    It looks, and where looking is not enough tries: it runs a container, mounts overlays, makes control groups,
    listens on the node's ports, writes to the disk of the data directory for three seconds. All of it is undone. No
    running node is needed; the one on --data-dir, if there is one, is asked how it is.

    Settings are those of `spinetta node join`, so that what is checked is what would be started. Run it as the user of
    the node: what that user may do is what counts.

    \b
    A finding is
      ok       as it should be
      note     worth knowing
      warning  a node runs, with less than it could have; `weakens` tells what
      problem  a node does not run, or not for long
    `mend` tells what to do.

    \b
    Exit codes:
      0  nothing is worse than a warning
      1  there is a problem

    \b
    Examples:
      spinetta doctor
      spinetta doctor --data-dir /srv/n1 --address 10.0.0.6:7220
      spinetta doctor --only runtime,cgroups,disk-speed
      spinetta doctor --json | jq '.findings[] | select(.level != "ok")'
    """
    import asyncio

    from spinetta.checkup import Level, worst
    from spinetta.node.doctor.examine import CHECKS

    wanted = _wanted(only, CHECKS)
    if wanted == ["list"]:
        output.table(("CHECK", "OF WHAT"), [(name, what) for name, (what, _) in CHECKS.items()])
        return
    resolved = resolved_node(dict(flags), config_file)
    settings = _of_the_node(resolved)
    findings = asyncio.run(_examined(settings, wanted, as_json=as_json))
    if as_json:
        output.put_json(
            {
                "data_dir": settings.data_dir,
                "worst": worst(findings).word,
                "findings": [_document(f) for f in findings],
                "warnings": list(resolved.warnings),
            }
        )
    else:
        for warning in resolved.warnings:
            output.tell(f"warning: {warning}")
        output.say(_summary(findings))
    if worst(findings) is Level.PROBLEM:
        raise Finished(PROBLEMS)


def _wanted(only: Iterable[str], known: Iterable[str]) -> list[str]:
    """The names that were asked for.

    Raises:
        UserError: there is no such check.
    """
    from spinetta.names import did_you_mean, quoted

    names = [name.strip() for item in only for name in item.split(",") if name.strip()]
    for name in names:
        if name not in known and names != ["list"]:
            raise UserError(f"there is no check {quoted(name)}", field="only", hint=did_you_mean(name, known))
    return names


def _of_the_node(resolved: Resolved) -> Settings:
    """The settings; where none names them, address and name are those that the node on the data directory has."""
    from dataclasses import replace
    from pathlib import Path

    from spinetta.node.entry import remembered_any

    try:
        known = remembered_any(Path(resolved.settings.data_dir))
    except (UserError, OSError):
        known = None  # the check of the node tells
    settings = resolved.settings
    if known is not None and known.address and resolved.origins["address"].kind == "default":
        settings = replace(settings, address=known.address)
    return settings


async def _examined(settings: Settings, wanted: list[str], *, as_json: bool) -> list[Finding]:
    from contextlib import aclosing

    from spinetta.node.doctor.examine import Patient, examine

    line = _Line(on=sys.stderr.isatty())
    findings = []
    try:
        async with aclosing(examine(Patient(settings), wanted, line.show)) as coming:
            async for finding in coming:
                findings.append(finding)
                line.clear()
                if not as_json:
                    _show(finding)
    finally:
        line.clear()
    return findings


class _Line:
    """One line on a terminal that tells what is being done, and goes when there is something to read."""

    def __init__(self, *, on: bool) -> None:
        self._on = on

    def show(self, text: str) -> None:
        """Put it there."""
        if self._on:
            columns = shutil.get_terminal_size().columns
            sys.stderr.write(f"\r\x1b[K{f'looking at {text} …'[: columns - 1]}")
            sys.stderr.flush()

    def clear(self) -> None:
        """Take it away."""
        if self._on:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _show(finding: Finding) -> None:
    from spinetta.node.doctor.examine import CHECKS

    word = finding.level.word
    level_width, name_width = max(map(len, COLOURS)), max(map(len, CHECKS))
    room = shutil.get_terminal_size().columns - level_width - name_width - 4 if sys.stdout.isatty() else 0
    lines = _wrapped(finding.seen, room)
    if finding.weakens:
        lines += _wrapped(f"weakens: {finding.weakens}", room)
    if finding.mend:
        lines += _wrapped(f"mend: {finding.mend}", room)
    gap = " " * (level_width - len(word))
    output.say(f"{output.paint(word, COLOURS[word])}{gap}  {finding.check.ljust(name_width)}  {lines[0]}")
    for line in lines[1:]:
        output.say(f"{' ' * (level_width + name_width + 4)}{line}")
    sys.stdout.flush()


def _wrapped(text: str, room: int) -> list[str]:
    text = output.printable(text)
    if room < LINE_MIN:
        return [text]
    return textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]


def _summary(findings: Iterable[Finding]) -> str:
    words = [f.level.word for f in findings]
    counts = [f"{words.count('ok')} ok"]
    for word, plural in PLURALS.items():
        if number := words.count(word):
            counts.append(f"{number} {word if number == 1 else plural}")
    return ", ".join(counts)


def _document(finding: Finding) -> dict[str, Any]:
    return {
        "check": finding.check,
        "level": finding.level.word,
        "seen": finding.seen,
        "weakens": finding.weakens,
        "mend": finding.mend,
    }
