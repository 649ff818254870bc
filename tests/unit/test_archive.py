"""The archive's files: what is torn or damaged hides nothing else, what is said to be durable is, all is bounded."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinetta import codec
from spinetta.errors import UserError
from spinetta.model import Outcome, State
from spinetta.node import archive
from spinetta.node.archive import Archive
from spinetta.node.archivelines import line_of, record_of
from spinetta.node.archivemembers import SEARCH_BYTES, pack, scan, unpack
from spinetta.v1 import record_pb2 as pb
from tests.builders import queued, task_id
from tests.unit.test_collect import ended, id_at

NOW_MS = 1_800_000_000_000


def record(n: int, **fields: object) -> bytes:
    task = replace(queued(n, **fields), state=State.COMPLETE, outcome=Outcome.SUCCEEDED, completed_ms=n)
    return codec.encode_task(task)


def everything(
    kept: Archive, *, limit: int = 7, matches: Callable[[bytes], bool] = lambda _: True, **options: object
) -> list[str]:
    """All ids, page by page."""
    found: list[str] = []
    after = ""
    while True:
        page = kept.page(matches, after=after, limit=limit, bytes_max=1 << 20, **options)  # type: ignore[arg-type]
        found += [line[7:43].decode() for line in page.lines]
        if not page.more:
            return found
        assert page.last != after, "no way forward"
        after = page.last


def the_file(kept: Archive) -> Path:
    (found,) = kept.directory.iterdir()
    return found


def test_what_is_archived_is_found_in_order_each_once(tmp_path: Path) -> None:
    kept = Archive(tmp_path / "archive", 0)
    numbers = list(range(1, 301))
    random.Random(1).shuffle(numbers)
    for i in range(0, 300, 10):
        batch = [record(n) for n in numbers[i : i + 10]]
        assert kept.append(batch, NOW_MS) == tuple(sorted(task_id(n) for n in numbers[i : i + 10]))
        if i % 50 == 0:
            kept.append(batch, NOW_MS)  # an answer was lost
    ids = [task_id(n) for n in range(1, 301)]
    assert everything(kept) == ids
    assert everything(kept, newest_first=True) == ids[::-1]
    assert everything(Archive(tmp_path / "archive", 0)) == ids  # another daemon


def test_people_can_read_it_and_others_cannot(tmp_path: Path) -> None:
    kept = Archive(tmp_path / "archive", 0)
    kept.append([record(1), record(2)], NOW_MS)
    kept.append([record(3)], NOW_MS)
    path = the_file(kept)
    assert path.name == "2027-01-15.0001.jsonl.gz"
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    out = subprocess.run(["zcat", str(path)], capture_output=True, check=True).stdout
    assert [json.loads(line)["id"] for line in out.splitlines()] == [task_id(n) for n in (1, 2, 3)]
    assert json.loads(out.splitlines()[0])["task"]["outcome"] == "SUCCEEDED"


def test_a_tail_torn_at_any_byte_hides_nothing_and_is_cut_off(tmp_path: Path) -> None:
    whole = Archive(tmp_path / "whole", 0)
    whole.append([record(1), record(2)], NOW_MS)
    before = the_file(whole).stat().st_size
    whole.append([record(3), record(4)], NOW_MS)
    data = the_file(whole).read_bytes()
    for size in range(len(data)):
        directory = tmp_path / str(size)
        directory.mkdir()
        path = directory / the_file(whole).name
        path.write_bytes(data[:size])
        survives = [task_id(n) for n in (1, 2)] if size >= before else []
        torn = Archive(directory, 0)
        assert everything(torn) == survives, size
        assert torn.append([record(5)], NOW_MS) == (task_id(5),)
        assert everything(torn) == [*survives, task_id(5)], size
        lines = gzip.decompress(path.read_bytes()).splitlines()  # and so for any other program
        assert [json.loads(line)["id"] for line in lines] == [*survives, task_id(5)]


def test_damage_at_any_byte_hides_one_entry_at_most(tmp_path: Path) -> None:
    whole = Archive(tmp_path / "whole", 0)
    sizes = []
    for n in (1, 2, 3):
        whole.append([record(n)], NOW_MS)
        sizes.append(the_file(whole).stat().st_size)
    data = the_file(whole).read_bytes()
    path = tmp_path / "damaged" / the_file(whole).name
    path.parent.mkdir()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        damaged = Archive(path.parent, 0)
        hit = next(i for i, end in enumerate(sizes) if at < end)
        others = [task_id(n) for i, n in enumerate((1, 2, 3)) if i != hit]
        assert [i for i in everything(damaged) if i in others] == others, at
        assert damaged.append([record(9)], NOW_MS) == (task_id(9),)
        assert [i for i in everything(damaged) if i not in (task_id(hit + 1),)] == [*others, task_id(9)], at


def test_garbage_in_the_middle_is_stepped_over(tmp_path: Path) -> None:
    kept = Archive(tmp_path / "archive", 0)
    kept.append([record(1)], NOW_MS)
    path = the_file(kept)
    rest = random.Random(2).randbytes(3 * SEARCH_BYTES) + b"\x1f\x8b\x08\x04"
    with path.open("ab") as f:
        f.write(rest)
    again = Archive(tmp_path / "archive", 0)
    assert again.append([record(2)], NOW_MS) == (task_id(2),)
    assert everything(again) == [task_id(1), task_id(2)]
    assert path.stat().st_size > len(rest), "what might be worth a look is not thrown away"


def test_zeros_in_place_of_an_append_are_cut_off(tmp_path: Path) -> None:
    kept = Archive(tmp_path / "archive", 0)
    kept.append([record(1)], NOW_MS)
    size = the_file(kept).stat().st_size
    with the_file(kept).open("ab") as f:
        f.write(bytes(5000))
    again = Archive(tmp_path / "archive", 0)
    again.append([record(2)], NOW_MS)
    assert the_file(again).stat().st_size < size + 1000
    assert everything(again) == [task_id(1), task_id(2)]


def test_killed_at_any_moment_what_was_confirmed_is_there(tmp_path: Path) -> None:
    """A process that appends and says so, killed outright, a few times."""
    program = (
        "import sys; from pathlib import Path; from spinetta.node.archive import Archive\n"
        "from tests.unit.test_archive import record, NOW_MS\n"
        "kept, n = Archive(Path(sys.argv[1]), 0), int(sys.argv[2])\n"
        "while True:\n"
        "    done = kept.append([record(n), record(n + 1)], NOW_MS)\n"
        "    print(*done, flush=True); n += 2\n"
    )
    confirmed: list[str] = []
    for life in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "archive"), str(1 + 100_000 * life)],
            stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        ) as process:  # fmt: skip
            assert process.stdout is not None
            for _ in range(10 + 7 * life):
                confirmed += process.stdout.readline().split()
            process.kill()
            confirmed += process.stdout.read().rpartition("\n")[0].split()
    found = set(everything(Archive(tmp_path / "archive", 0), limit=1000))
    assert len(confirmed) > 60
    assert set(confirmed) <= found


@pytest.mark.parametrize("call", ["write", "fsync", "open"])
def test_a_full_disk_is_told_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    kept = Archive(tmp_path / "archive", 0)
    kept.append([record(1)], NOW_MS)
    data = the_file(kept).read_bytes()
    real = os.write

    def full(*args: object, **_: object) -> int:
        if call == "write" and len(args[1]) > 10:  # type: ignore[arg-type]
            return real(args[0], args[1][:10])  # type: ignore[arg-type,index]
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full if call != "write" else lambda fd, data: full(fd, data))
        if call == "write":
            patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left") as raised:
            kept.append([record(2)], NOW_MS)
    assert raised.value.reason == "archive-unwritable"
    assert "No space left" in kept.trouble
    assert the_file(kept).read_bytes() == data
    assert kept.append([record(3)], NOW_MS) == (task_id(3),)
    assert kept.trouble == ""
    assert everything(kept) == [task_id(1), task_id(3)]


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    import fcntl

    kept = Archive(tmp_path / "archive", 0)
    kept.append([record(1)], NOW_MS)
    with the_file(kept).open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="cannot be written"):
            kept.append([record(2)], NOW_MS)
    assert kept.append([record(2)], NOW_MS) == (task_id(2),)


def test_it_is_bounded_and_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "SEGMENT_BYTES_MIN", 2000)
    kept = Archive(tmp_path / "archive", 16_000)
    for n in range(1, 301):
        kept.append([record(n, name=random.Random(n).randbytes(40).hex())], NOW_MS)
        assert sum(p.stat().st_size for p in kept.directory.iterdir()) <= 17_000
    found = everything(kept, limit=100)
    assert 30 < len(found) < 300
    assert found == [task_id(n) for n in range(301 - len(found), 301)]


def test_without_a_limit_all_are_kept_in_files_that_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "SEGMENT_BYTES_MAX", 4000)
    monkeypatch.setattr(archive, "SEGMENT_BYTES_MIN", 1000)
    kept = Archive(tmp_path / "archive", 0)
    for n in range(1, 101):
        kept.append([record(n)], NOW_MS + n * 3_600_000)  # over several days
    assert len(list(kept.directory.iterdir())) > 4
    assert everything(kept) == [task_id(n) for n in range(1, 101)]


def test_files_of_another_node_may_be_put_there(tmp_path: Path) -> None:
    kept, gone = Archive(tmp_path / "kept", 0), Archive(tmp_path / "gone", 0)
    kept.append([record(1), record(3)], NOW_MS)
    gone.append([record(2), record(3)], NOW_MS)
    assert everything(kept) == [task_id(1), task_id(3)]
    the_file(gone).rename(kept.directory / "from-n7.jsonl.gz")
    assert everything(kept) == [task_id(1), task_id(2), task_id(3)]


def test_of_two_records_of_one_id_the_later_counts(tmp_path: Path) -> None:
    """It was submitted again after it had been collected, or the cluster restored from a backup."""
    for times in ((1, 2), (2, 1)):
        kept = Archive(tmp_path / f"{times}", 0)
        for name, at_ms in zip("ab", times, strict=True):
            kept.append([record(1, name=name)], NOW_MS + at_ms)
        for newest in (False, True):
            (line,) = kept.page(lambda _: True, after="", limit=9, bytes_max=9999, newest_first=newest).lines
            assert pb.Task.FromString(record_of(line) or b"").spec.name == "ab"[times.index(2)]


def test_pages_keep_to_their_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Archive(tmp_path / "archive", 0)
    kept.append([record(n) for n in range(1, 51)], NOW_MS)
    page = kept.page(lambda _: True, after="", limit=100, bytes_max=1000)
    assert sum(map(len, page.lines)) <= 1000
    assert (len(page.lines), page.more) == (3, True)
    monkeypatch.setattr(archive, "SCAN_MAX", 20)
    page = kept.page(lambda _: False, after="", limit=100, bytes_max=1000)
    assert (page.lines, page.last, page.more) == ((), task_id(20), True)
    wanted = task_id(43).encode()
    assert everything(kept, matches=lambda line: wanted in line) == [task_id(43)]


def test_entries_that_overlap_take_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids that somebody has made up: each entry goes from the first to the last of all times."""
    monkeypatch.setattr(archive, "SCAN_MAX", 10)
    kept = Archive(tmp_path / "archive", 0)
    for n in range(1, 31):
        kept.append([record(m) for m in range(n, 301, 30)], NOW_MS)
    ids = [task_id(n) for n in range(1, 301)]
    assert everything(kept) == ids
    assert everything(kept, newest_first=True) == ids[::-1]


def test_since_and_before_are_times_of_ids(tmp_path: Path) -> None:
    kept = Archive(tmp_path / "archive", 0)
    ids = [id_at(NOW_MS + i) for i in range(10)]
    kept.append([codec.encode_task(ended(i, 1)) for i in ids], NOW_MS)
    for newest in (False, True):
        found = everything(kept, since_ms=NOW_MS + 3, before_ms=NOW_MS + 7, newest_first=newest, limit=2)
        assert found == sorted(ids[3:7], reverse=newest)


def test_what_is_no_task_is_not_confirmed(tmp_path: Path) -> None:
    kept = Archive(tmp_path / "archive", 0)
    assert kept.append([b"\xff", b"", codec.encode_task(ended(task_id(1), 1))[:20]], NOW_MS) == ()
    assert kept.append([record(1), b"\xff"], NOW_MS) == (task_id(1),)


def test_a_directory_that_is_none_and_one_that_is_empty(tmp_path: Path) -> None:
    assert everything(Archive(tmp_path / "none", 0)) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        Archive(tmp_path / "file", 0).append([record(1)], NOW_MS)
    assert everything(Archive(tmp_path / "file", 0)) == []


def test_lines_keep_what_a_later_version_wrote(tmp_path: Path) -> None:
    plain = record(1)
    later = plain + b"\xfa\x3f\x03new"  # field 1023
    assert b'"record"' not in (line_of(plain, 1) or b"")
    for each in (plain, later):
        line = line_of(each, 1)
        assert line is not None
        again = record_of(line)
        assert again is not None
        assert pb.Task.FromString(again) == pb.Task.FromString(each)
    assert record_of(line_of(later, 1) or b"") == later


@pytest.mark.parametrize(
    "line", [b"", b"{}", b"[]", b'{"id":"x"}', b'{"id":"' + b"0" * 36 + b'","task":{}}', b"\xff" * 60]
)
def test_lines_that_somebody_has_edited_are_left_out(line: bytes) -> None:
    assert record_of(line) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sets(st.integers(1, 60), min_size=1, max_size=12), max_size=12), st.booleans(), st.integers(1, 9))
def test_any_batches_come_out_sorted_and_once(
    tmp_path_factory: pytest.TempPathFactory, batches: list[set[int]], newest: bool, limit: int
) -> None:
    kept = Archive(tmp_path_factory.mktemp("archive"), 0)
    for batch in batches:
        kept.append([record(n) for n in batch], NOW_MS)
    wanted = sorted({task_id(n) for batch in batches for n in batch}, reverse=newest)
    assert everything(kept, newest_first=newest, limit=limit) == wanted


def test_a_member_is_a_gzip_member() -> None:
    lines = [line for n in (1, 2) if (line := line_of(record(n), 5)) is not None]
    member = pack(lines, NOW_MS)
    assert gzip.decompress(member).splitlines() == unpack(member) == lines
    fd = os.memfd_create("archive")
    try:
        os.write(fd, member + member)
        assert [m.tasks for m in scan(fd).members] == [2, 2]
    finally:
        os.close(fd)
