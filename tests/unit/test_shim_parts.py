"""The shim's parts that need no shim: what it may import, its messages, its records, its words."""

from __future__ import annotations

import ast
import errno
import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import spinetta.runtime.shim as package
from spinetta.runtime.shim import child, proctable, sysapi, wire
from spinetta.runtime.shim.loop import READ, Loop, now_s
from spinetta.runtime.shim.records import Records, put_beside, put_file, read_records, seal, unseal

SOURCES = sorted(Path(package.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_shim_imports_the_standard_library_only(path: Path) -> None:
    siblings = {source.stem for source in SOURCES}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            assert node.module in siblings or {alias.name for alias in node.names} <= siblings
            continue
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "nothing above the shim's directory"
            names = [node.module or ""]
        else:
            continue
        for name in names:
            assert name.split(".")[0] in sys.stdlib_module_names


messages = st.dictionaries(
    st.text(max_size=5), st.one_of(st.text(), st.integers(), st.lists(st.text(), max_size=3), st.none()), max_size=4
)


@given(st.lists(messages, max_size=6), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_messages_survive_any_cutting_of_the_stream(sent: list[wire.Message], sizes: list[int]) -> None:
    data = b"".join(wire.encode(message) for message in sent)
    lines, got, at = wire.Lines(), [], 0
    while at < len(data):
        size = sizes[at % len(sizes)]
        got += [wire.decode(line) for line in lines.feed(data[at : at + size])]
        at += size
    assert got == sent


@given(st.integers(1, 50), st.lists(st.integers(0, 60), max_size=8), st.integers(1, 30))
def test_a_line_may_be_as_long_as_allowed_and_no_longer(most: int, lengths: list[int], chunk: int) -> None:
    data = b"".join(b"x" * length + b"\n" for length in lengths)
    lines, got = wire.Lines(most), 0
    try:
        for at in range(0, len(data), chunk):
            got += len(lines.feed(data[at : at + chunk]))
    except wire.BadMessage:
        assert max(lengths) > most
    else:
        assert max(lengths, default=0) <= most
        assert got == len(lengths)


@pytest.mark.parametrize("value", [-1, "1", True, float("nan"), [], {}])
def test_numbers_that_are_none(value: object) -> None:
    with pytest.raises(wire.BadMessage):
        wire.number({"n": value}, "n")
    with pytest.raises(wire.BadMessage):
        wire.integer({"n": value}, "n")


def test_fields() -> None:
    message = {"none": None, "n": 1.5, "i": 7, "t": "x", "l": ["a"], "m": {"a": "b"}, "k": "0190-a.1"}
    assert wire.number(message, "none") == float("inf")
    assert (wire.number(message, "n"), wire.integer(message, "i"), wire.text(message, "t")) == (1.5, 7, "x")
    assert (wire.texts(message, "l"), wire.text_map(message, "m"), wire.key(message, "k")) == (
        ["a"],
        {"a": "b"},
        "0190-a.1",
    )
    assert wire.number(message, "absent", 3.0) == 3.0
    for ask in (wire.number, wire.integer, wire.text):
        with pytest.raises(wire.BadMessage):
            ask(message, "absent")
    for bad in ({"l": "a"}, {"l": [1]}, {}):
        with pytest.raises(wire.BadMessage):
            wire.texts(bad, "l")


@pytest.mark.parametrize("name", ["a\n", "", ".", "..", "-a", "a/b", "é", "a" * 129])
def test_keys_that_are_not_safe(name: str) -> None:
    with pytest.raises(wire.BadMessage):
        wire.key({"key": name})


def test_records(tmp_path: Path) -> None:
    put_file(tmp_path / "a.1", json.dumps(seal({"v": 2})).encode())
    put_file(tmp_path / "a.1", json.dumps(seal({"v": 2, "x": 0.1})).encode())
    put_file(tmp_path / "old.1", json.dumps({"v": 1, "state": "started"}).encode())
    (tmp_path / "b.1").write_text('{"v": ')
    (tmp_path / "c.1").write_text("[]")
    (tmp_path / "d.1").write_text('{"v": 2}')
    (tmp_path / "e.1").write_text("[" * 100_000)
    (tmp_path / ".d.1.tmp").write_text("half")
    broken = ["b.1", "c.1", "d.1", "e.1"]
    assert read_records(tmp_path) == Records({"a.1": {"v": 2, "x": 0.1}, "old.1": {"v": 1, "state": "started"}}, broken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.1", *broken, "old.1"]


def test_what_was_written_beside_a_record_replaces_it_if_it_is_whole(tmp_path: Path) -> None:
    old, new = {"v": 2, "state": "started"}, {"v": 2, "state": "ended"}
    for name in ("a.1", "torn.1", "a.new"):
        put_file(tmp_path / name, json.dumps(seal(old)).encode())
    for name in ("a.1", "alone.1", "no key"):
        put_beside(tmp_path / name, json.dumps(seal(new)).encode())
    (tmp_path / ".torn.1.new").write_bytes(json.dumps(seal(new)).encode()[:-1])
    for _ in range(2):  # and stays what it is
        assert read_records(tmp_path) == Records({"a.1": new, "alone.1": new, "torn.1": old, "a.new": old})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.1", "a.new", "alone.1", "torn.1"]


def test_a_record_that_is_damaged_anywhere_is_never_taken_for_another() -> None:
    record = {"v": 2, "state": "ended", "key": "a.1", "exit": {"exit_code": 1, "message": "é\udcff"}, "pid": 1234}
    data = json.dumps(seal(record)).encode()
    assert unseal(data) == record
    for at in range(len(data)):
        cut = data[:at]
        flipped = [data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :] for bits in (1, 2, 4, 8, 16, 32, 64, 128, 255)]
        for damaged in (cut, *flipped):
            try:
                found = unseal(damaged)
            except ValueError:
                continue
            assert found == record, (at, damaged)  # e.g. a letter of an escape in the other case


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    put_file(tmp_path / "a.1", b"old")
    (tmp_path / ".a.1.tmp").mkdir()
    with pytest.raises(IsADirectoryError):
        put_file(tmp_path / "a.1", b"new")
    assert (tmp_path / "a.1").read_bytes() == b"old"


@pytest.mark.parametrize("name", ["sh", "a b", "x) S 1 2", "((", ""])
def test_the_process_table_with_any_name(name: str) -> None:
    fields = "S 17 20 30 0 -1 4194560 1 0 0 0 1 2 3 4 20 0 1 0 369751 199 3527"
    assert proctable.parse_stat(f"42 ({name}) {fields}\n") == proctable.Process(42, "S", 17, 30, 369751)


def test_the_process_table_of_this_machine() -> None:
    me = proctable.read(os.getpid())
    assert me is not None
    assert (me.pid, me.parent, me.session) == (os.getpid(), os.getppid(), os.getsid(0))
    assert me in [process for process in proctable.read_all() if process.pid == me.pid]
    assert proctable.read(1 << 22) is None


@pytest.mark.parametrize("stage", ["setup", "cgroup", "logs", "scratch", "cwd", "exec", "interpreter"])
@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.ENOEXEC, errno.E2BIG])
def test_every_failure_has_words(stage: str, number: int) -> None:
    assert child.explain(stage, number, "prog", "/dir").isprintable()


def test_timers_in_their_order_and_errors_that_do_not_end_the_loop() -> None:
    errors: list[str] = []
    loop, seen = Loop(errors.append), []
    start = now_s()
    loop.call_at(start + 0.03, loop.stop)
    loop.call_at(start + 0.02, lambda: seen.append("second"))
    loop.call_at(start + 0.01, lambda: seen.append("first"))
    loop.call_at(start + 0.015, lambda: seen.append(str(1 // 0)))
    loop.call_at(start + 0.005, lambda: seen.append("cancelled")).cancel()
    loop.call_at(start - 5, lambda: seen.append("overdue"))
    loop.run()
    assert seen == ["overdue", "first", "second"]
    assert now_s() >= start + 0.03
    assert len(errors) == 1
    assert "ZeroDivisionError" in errors[0]


def test_cancelled_timers_do_not_gather() -> None:
    loop, seen = Loop(lambda _text: None), []
    loop.call_in(3600, loop.stop)  # the earliest: what is behind it does not come to the top
    kept = [loop.call_in(86400 + i, lambda: None) for i in range(1000)]
    for _attempt in range(20_000):
        loop.call_in(7 * 86400, lambda: None).cancel()
    assert len(loop._timers) <= 4 * len(kept)
    loop.call_in(0, lambda: seen.append(sum(1 for _due, _number, each in loop._timers if each.call is not None)))
    loop.call_in(0.01, loop.stop)
    loop.run()
    assert seen == [len(kept) + 2]  # none was lost


@pytest.mark.parametrize("due_s", [1e300, float("inf")])
def test_what_is_never_due_ends_nothing(due_s: float) -> None:
    loop, seen = Loop(lambda _text: None), []
    loop.call_at(due_s, lambda: None)
    receive, send = os.pipe()

    def said(_mask: int) -> None:
        seen.append(len(os.read(receive, 1)))
        loop.call_in(0.01, loop.stop)

    loop.watch(receive, READ, said)
    os.write(send, b"x")
    loop.run()
    assert seen == [1]
    os.close(receive)
    os.close(send)


def test_memory_is_locked_only_where_nothing_will_be_refused_for_it() -> None:
    ordinary = "Name:\tx\nVmSize:\t   40000 kB\nCapEff:\t0000000000000000\n"
    privileged = ordinary.replace("CapEff:\t0000000000000000", "CapEff:\t000001fffeffffff")
    assert sysapi.may_lock(-1, ordinary)
    assert sysapi.may_lock(8 << 20, privileged)
    # More than it has now, but not more than it may come to have: it would start, and die of its first large message.
    assert not sysapi.may_lock(64 << 20, ordinary)
    assert sysapi.may_lock(1 << 30, ordinary)
    assert sysapi.may_lock(1 << 30, Path("/proc/self/status").read_text())
