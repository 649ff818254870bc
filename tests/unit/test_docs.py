"""The documents hold together: links lead somewhere, commands and options that they show exist."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from spinetta import keys
from spinetta.cli.app import root
from spinetta.v1 import api_pb2, trust_pb2

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


def test_the_architecture_names_every_pure_module_and_every_prefix_of_the_store() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    modules = {p.stem for p in (ROOT / "spinetta").glob("*.py")} - {"__init__"}
    assert modules - set(re.findall(r"`([a-z]+)`", text)) == set()
    prefixes = {v for k, v in vars(keys).items() if k.isupper() and isinstance(v, str) and v.startswith("/")}
    assert {p for p in prefixes if f"`{p}" not in text} <= {keys.BLOCKED}  # nothing is there yet


def test_the_api_page_names_every_call_and_every_field_of_an_error() -> None:
    text = (ROOT / "docs/api.md").read_text()
    calls = {
        method.name
        for file in (api_pb2, trust_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        if service.name != "Peer"
        for method in service.methods
    }
    fields = {f.name for f in api_pb2.ErrorDetail.DESCRIPTOR.fields}
    assert {name for name in calls | fields if f"`{name}`" not in text} == set()


def said_in_the_code() -> str:
    """All texts of the package, one after the other; what is filled in is left out."""
    parts = []
    for path in (ROOT / "spinetta").rglob("*.py"):
        if "v1" not in path.parts:
            tree = ast.parse(path.read_text())
            parts += [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return "\0".join(parts)


def test_messages_that_the_operating_page_quotes_are_said() -> None:
    """Of each message the longest run of words that are not filled in."""
    text = (ROOT / "docs/operating.md").read_text()
    rows = re.findall(r"^\| (`[^|]+) \|", text.partition("## What can go wrong at the start")[2], re.M)
    filled_in = re.compile(r"…|\S*\d\S*|'\S+'|\bX\b|^the API\b|Address already in use")
    said, unknown = said_in_the_code(), []
    for message in (m for row in rows for m in re.findall(r"`([^`]+)`", row)):
        runs = re.findall(r"[A-Za-z]{2,}(?:[ ,']+[A-Za-z]+)+", filled_in.sub("|", message))
        if runs and max(runs, key=len) not in said:
            unknown.append(message)
    assert len(rows) > 25
    assert unknown == []
