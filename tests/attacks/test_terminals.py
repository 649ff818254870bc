"""Names, reasons and messages that would steer a terminal or forge a line: in tables, in JSON, in the audit log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from spinetta.cli import output
from spinetta.cli.audit import audit
from spinetta.trust.audit import Entry, open_log
from spinetta.trust.auditreading import read, verify

EVIL = (
    "\x1b[2J\x1b[31mok\x1b[0m",  # clears the screen
    "\x1b]0;title\x07",
    "\x1b]52;c;ZXZpbA==\x07",  # writes the clipboard
    "a\r\nnode root ok",
    "a\nb",
    "\x9b31m",  # the same in one byte, for terminals of eight bits
    "\u202egnp.exe",  # right to left
    "\x00",
    "\x7f\x08\x08",
    "\u2028line",
)


def is_tame(text: str) -> bool:
    return all(c.isprintable() for line in text.split("\n") for c in line)


@pytest.mark.parametrize("evil", EVIL)
def test_the_audit_log_keeps_what_was_said_on_one_line_and_shows_it_tamed(tmp_path: Path, evil: str) -> None:
    log = open_log(tmp_path / "audit", "n1")
    log.record("cancel", f"user {evil}", evil, f"denied: {evil}", detail=evil)
    log.record("cancel", "user ann", "x", "ok")
    log.close()
    lines = b"".join(p.read_bytes() for p in (tmp_path / "audit").iterdir()).splitlines()
    assert len(lines) == 2
    assert all(0x20 <= byte < 0x7F for line in lines for byte in line)
    assert [e.object for e in read(tmp_path / "audit")] == [evil, "x"]
    assert not verify(tmp_path / "audit").faults
    shown = CliRunner().invoke(audit, ["show", "--data-dir", str(tmp_path)])
    assert shown.exit_code == 0
    assert len(shown.output.strip("\n").split("\n")) == 3  # a heading, and a line for each
    assert is_tame(shown.output)


@pytest.mark.parametrize("evil", EVIL)
def test_tables_and_remarks_are_tame(evil: str, capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("NAME", "REASON"), [(evil, evil), ("a", "b")])
    shown = capsys.readouterr().out
    assert len(shown.strip("\n").split("\n")) == 3
    assert is_tame(shown)
    output.tell(f"task failed: {evil}")
    told = capsys.readouterr().err.replace("\x1b[31m", "").replace("\x1b[0m", "")  # our own colours
    assert is_tame(told)
    output.put_json_line({"name": evil})
    line = capsys.readouterr().out
    assert is_tame(line)
    assert json.loads(line) == {"name": evil}


@pytest.mark.parametrize(
    "nonsense", [b"[" * 60_000, b'{"seq":' * 8000, b"\xff" * 100, b"9" * 5000, b'"' + b"x" * 70_000]
)
def test_a_line_made_to_break_its_reader_is_a_fault_like_any_other(tmp_path: Path, nonsense: bytes) -> None:
    directory = tmp_path / "audit"
    log = open_log(directory, "n1")
    for n in range(3):
        log.record("cancel", "user ann", str(n), "ok")
    log.close()
    [path] = directory.iterdir()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join((lines[0], nonsense + b"\n", *lines[1:])))
    assert verify(directory).faults
    assert [e.object for e in read(directory)] == ["0", "1", "2"]
    open_log(directory, "n1").close()


def test_lines_removed_at_the_beginning_show_in_where_the_log_begins(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    log = open_log(directory, "n1")
    for n in range(5):
        log.record("cancel", "user ann", str(n), "ok")
    log.close()
    [path] = directory.iterdir()
    assert verify(directory).first_seq == 1
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[3:]))
    assert verify(directory).first_seq == 4


def test_a_log_of_another_node_put_in_the_place_of_this_ones_is_noticed(tmp_path: Path) -> None:
    heads: dict[str, tuple[int, str]] = {}
    for node in ("n1", "n2"):
        log = open_log(tmp_path / node, node)
        log.record("cancel", "user ann", node, "ok")
        log.close()
        heads[node] = verify(tmp_path / node).head
    assert verify(tmp_path / "n2", (heads["n1"],)).faults


def test_every_field_is_in_the_hash(tmp_path: Path) -> None:
    log = open_log(tmp_path / "audit", "n1")
    log.record("cancel", "user ann", "x", "ok", 7, "because")
    log.close()
    [path] = (tmp_path / "audit").iterdir()
    whole: dict[str, Any] = json.loads(path.read_bytes())
    for name in Entry.__slots__:
        value = whole[name]
        path.write_text(json.dumps(whole | {name: value + 1 if isinstance(value, int) else value + "x"}) + "\n")
        assert verify(tmp_path / "audit").faults, name
