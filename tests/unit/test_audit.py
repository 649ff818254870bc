"""The audit log: what is changed in it is noticed, what a crash leaves is told from what a hand has done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinetta.errors import UserError
from spinetta.trust import audit, auditreading


def written(directory: Path, count: int = 5, **options: int) -> None:
    log = audit.open_log(directory, "n1", **options)
    for i in range(count):
        log.record("submit", "user ann", f"task {i}", "done", 100 + i)
    log.close()


def only_file(directory: Path) -> Path:
    (found,) = directory.iterdir()
    return found


def test_what_is_recorded_is_read_back_and_whole(tmp_path: Path) -> None:
    written(tmp_path)
    entries = list(auditreading.read(tmp_path))
    assert [(e.seq, e.identity, e.call, e.object, e.outcome, e.revision) for e in entries] == [
        (i + 1, "user ann", "submit", f"task {i}", "done", 100 + i) for i in range(5)
    ]
    verdict = auditreading.verify(tmp_path)
    assert (verdict.entries, verdict.first_seq, verdict.faults) == (5, 1, ())
    assert verdict.head == (5, entries[-1].hash)


def test_a_log_goes_on_after_a_restart(tmp_path: Path) -> None:
    written(tmp_path)
    written(tmp_path)
    assert auditreading.verify(tmp_path).entries == 10
    assert auditreading.verify(tmp_path).faults == ()


@settings(max_examples=60, deadline=None)
@given(line=st.integers(0, 4), name=st.sampled_from(sorted(audit.Entry.__slots__)), data=st.data())
def test_an_altered_field_is_noticed(
    line: int, name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("audit")
    written(directory)
    path = only_file(directory)
    lines = path.read_text().splitlines()
    fields = json.loads(lines[line])
    old = fields[name]
    fields[name] = data.draw(st.integers(0, 999) if isinstance(old, int) else st.text("abc", max_size=3))
    if fields[name] == old:
        return
    lines[line] = json.dumps(fields)
    path.write_text("\n".join(lines) + "\n")
    assert len(auditreading.verify(directory).faults) == 1


@pytest.mark.parametrize("line", range(4))
def test_a_removed_line_is_noticed(tmp_path: Path, line: int) -> None:
    written(tmp_path)
    path = only_file(tmp_path)
    lines = path.read_text().splitlines()
    del lines[line]
    path.write_text("\n".join(lines) + "\n")
    if line == 0:  # as after the removal of old files, but for the number in the file's name
        assert auditreading.verify(tmp_path).first_seq == 2
    else:
        assert "does not follow" in auditreading.verify(tmp_path).faults[0]


def test_lines_put_in_another_order_or_twice_are_noticed(tmp_path: Path) -> None:
    written(tmp_path)
    path = only_file(tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]) + "\n")
    assert auditreading.verify(tmp_path).faults
    path.write_text("\n".join([*lines, lines[-1]]) + "\n")
    assert auditreading.verify(tmp_path).faults


def test_lines_cut_off_at_the_end_are_noticed_by_a_kept_head(tmp_path: Path) -> None:
    written(tmp_path)
    head = auditreading.verify(tmp_path).head
    path = only_file(tmp_path)
    path.write_text("\n".join(path.read_text().splitlines()[:3]) + "\n")
    assert auditreading.verify(tmp_path).faults == ()
    assert "cut off" in auditreading.verify(tmp_path, (head,)).faults[0]


def test_a_line_rewritten_with_a_fresh_hash_is_noticed_by_a_kept_head(tmp_path: Path) -> None:
    written(tmp_path)
    head = auditreading.verify(tmp_path).head
    path = only_file(tmp_path)
    lines = path.read_text().splitlines()
    last = json.loads(lines[-1])
    last["outcome"] = "denied"
    last["hash"] = audit.digest(last)
    path.write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    assert auditreading.verify(tmp_path).faults == ()
    assert "is not the one of the given head" in auditreading.verify(tmp_path, (head,)).faults[0]


def test_a_line_that_a_crash_has_cut_short_is_told_and_not_a_fault(tmp_path: Path) -> None:
    written(tmp_path)
    path = only_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    written(tmp_path, 1)
    assert [e.call for e in auditreading.read(tmp_path)] == ["submit"] * 4 + [audit.TORN, "submit"]
    assert auditreading.verify(tmp_path).faults == ()


def test_a_garbled_line_that_no_crash_has_left_is_a_fault(tmp_path: Path) -> None:
    written(tmp_path)
    path = only_file(tmp_path)
    lines = path.read_text().splitlines()
    lines[2] = "{}"
    path.write_text("\n".join(lines) + "\n")
    assert auditreading.verify(tmp_path).faults


def test_files_are_begun_anew_and_the_oldest_go(tmp_path: Path) -> None:
    for _ in range(6):
        written(tmp_path, 4, file_bytes_max=500, files_max=3)
    assert len(list(tmp_path.iterdir())) == 3
    verdict = auditreading.verify(tmp_path)
    assert verdict.faults == ()
    assert verdict.first_seq > 1
    assert verdict.head[0] == 24


def test_long_texts_are_cut_and_nothing_is_lost(tmp_path: Path) -> None:
    log = audit.open_log(tmp_path, "n1")
    log.record("cancel", "user ann", "x" * 100_000, "done", detail='"\n\u2028\\' * 3000)
    log.close()
    (entry,) = auditreading.read(tmp_path)
    assert len(entry.object) == audit.TEXT_MAX
    assert auditreading.verify(tmp_path).faults == ()


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    written(tmp_path / "audit")
    assert (tmp_path / "audit").stat().st_mode & 0o777 == 0o700
    assert only_file(tmp_path / "audit").stat().st_mode & 0o777 == 0o600


def test_there_is_no_log(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no audit log"):
        auditreading.verify(tmp_path / "none")
    with pytest.raises(UserError, match="no audit log"):
        list(auditreading.read(tmp_path))


def test_a_full_disk_loses_nothing_once_there_is_room(tmp_path: Path) -> None:
    log = audit.open_log(tmp_path, "n1")
    path = tmp_path / "audit-00000001.jsonl"
    path.mkdir()  # a directory in the file's place: writing fails as on a full disk
    log.record("submit", "user ann", "task 1", "done")
    while not log.trouble:
        pass
    path.rmdir()
    log.close()
    assert [e.object for e in auditreading.read(tmp_path)] == ["task 1"]
