"""The documents hold together: links lead somewhere, commands and options that they show exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from spinetta.cli.app import root

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("examples/*/*.md"), ROOT / "bench/README.md"]
)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
PROMPT = re.compile(r"^\w*\$ ")  # "$ ", and "n1$ " where there are several machines
FENCE = re.compile(r"^(?:```[^\n]*\n(.*?)^```|((?:^    [^\n]*\n)+))", re.M | re.S)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_lead_somewhere(document: Path) -> None:
    broken = []
    for link in LINK.findall(document.read_text()):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    assert broken == []


def shown_commands(document: Path) -> Iterator[list[str]]:
    """`spinetta …` lines of the code blocks, as words; without a prompt, comments, pipes and what follows ``--``."""
    for fenced, indented in FENCE.findall(document.read_text()):
        for line in (fenced or indented).replace("\\\n", " ").splitlines():
            line = PROMPT.sub("", line.strip())
            if line.startswith("spinetta ") and "…" not in line:
                words = shlex.split(line, comments=True)
                ends = [i for i, word in enumerate(words) if word in ("--", "|", ">", "&&", ";", "<")]
                yield words[: min(ends, default=len(words))]


def unknown_words(words: list[str]) -> list[str]:
    """Sub-commands and options in a command line that do not exist."""
    command: click.Command = root
    context = click.Context(root)
    for i, word in enumerate(words[1:], 1):
        if not isinstance(command, click.Group):
            known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
            if command.context_settings.get("ignore_unknown_options"):
                return []
            given = [w.partition("=")[0] for w in words[i:] if w.startswith("-") and not re.fullmatch(r"-\d.*", w)]
            return [w for w in given if w not in known]
        if word.startswith("-"):
            continue
        found = command.get_command(context, word)
        if found is None:
            return [word]
        command = found
    return []


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_commands_that_are_shown_exist(document: Path) -> None:
    wrong = {shlex.join(words): bad for words in shown_commands(document) if (bad := unknown_words(words))}
    assert wrong == {}


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_scripts_that_are_named_exist(document: Path) -> None:
    named_here = set(re.findall(r"\b((?:scripts|examples/variants|bench)/[\w.-]+\.(?:sh|py))\b", document.read_text()))
    assert [name for name in sorted(named_here) if not (ROOT / name).is_file()] == []


def test_every_decision_is_listed() -> None:
    listed = set(LINK.findall((ROOT / "docs/adr/README.md").read_text()))
    assert listed == {p.name for p in (ROOT / "docs/adr").glob("0*.md")}
