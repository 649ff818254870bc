"""Making the end of a member's write-ahead log count, when it is the only member left.

A member has in its log what the majority had agreed on before it has heard of the agreement: it is told with the next
message. If all others are lost in between, etcd's ``--force-new-cluster`` would throw away writes that were answered.
So the log is given one more record, which says that all of it is agreed upon. What nobody had agreed on comes with it:
of such a write nobody has been told anything, and it may as well have happened.

For copies of data only, of an etcd that does not run. The format is the same from 3.0 to 3.6, see `wal`.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

from spinetta.store.wal import message_of

ENTRY, STATE, CHECKSUM = 2, 3, 4  # types of records
CHECKED_MAX = 64  # records at the end whose checksums are compared: a write that was cut short is one of the last
SEGMENT_BYTES_MAX = 1 << 30  # etcd begins a new file after 64 MiB


@dataclass(frozen=True, slots=True)
class _Record:
    kind: int
    checksum: int  # of all data up to and with this one
    data: bytes


@dataclass(slots=True)
class _End:
    """What the last file of a log says. `at`: where its last whole record ends; `is_cut`: something follows it."""

    at: int = 0
    checksum: int = 0
    term: int = 0
    vote: int = 0
    commit: int = 0
    last_term: int = 0
    last_index: int = 0
    is_cut: bool = False


def commit_tail(data_dir: Path) -> int:
    """Let all of the log count; how many entries did not before. 0, too, when the log is not as expected: it is left.

    Raises:
        OSError: it cannot be read or written.
    """
    logs = sorted(each for each in (data_dir / "member" / "wal").iterdir() if each.suffix == ".wal")
    if not logs:
        return 0
    log = logs[-1]
    size = log.stat().st_size
    if size > SEGMENT_BYTES_MAX:
        return 0
    try:
        end = _read(log.read_bytes())
        first_index = int(log.stem.rpartition("-")[2], 16)
    except (ValueError, IndexError, KeyError, TypeError):
        return 0
    last_index = end.last_index or first_index - 1
    if last_index <= end.commit or not end.term:
        if end.is_cut:
            _write(log, end.at, b"", size)
        return 0
    state = b"".join(
        _varint(number << 3) + _varint(value)
        for number, value in ((1, max(end.term, end.last_term)), (2, end.vote), (3, last_index))
    )
    _write(log, end.at, _framed(STATE, _crc32c(end.checksum, state), state), size)
    return last_index - end.commit


def _write(log: Path, at: int, data: bytes, size: int) -> None:
    """Write at the end of the whole records, and nothing behind: what was cut short must not be read any more."""
    with log.open("r+b") as file:
        file.truncate(at)
        file.seek(at)
        file.write(data)
        file.truncate(max(size, at + len(data)))
        file.flush()
        os.fsync(file.fileno())


def _read(data: bytes) -> _End:
    end, before_last, at = _End(), _End(), 0
    recent = deque[tuple[int, _Record]](maxlen=CHECKED_MAX)
    while at + 8 <= len(data):
        field = int.from_bytes(data[at : at + 8], "little")
        if not field:
            break
        length, padding = field & ((1 << 56) - 1), (field >> 56) & 7 if field >> 63 else 0
        record = _record(data[at + 8 : at + 8 + length]) if at + 8 + length + padding <= len(data) else None
        if record is None:
            end.is_cut = True
            break
        at += 8 + length + padding
        recent.append((record.checksum if record.kind == CHECKSUM else end.checksum, record))
        before_last = replace(end)
        end.at, end.checksum = at, record.checksum
        _take(end, record)
    bad = [n for n, (before, record) in enumerate(recent) if _crc32c(before, record.data) != record.checksum]
    if not bad:
        return end
    if bad != [len(recent) - 1]:
        raise ValueError("a checksum is wrong")
    before_last.is_cut = True
    return before_last


def _record(data: bytes) -> _Record | None:
    try:
        fields = message_of(data)
    except (ValueError, IndexError):
        return None
    kind, checksum, body = fields.get(1, 0), fields.get(2, 0), fields.get(3, b"")
    if not isinstance(kind, int) or not isinstance(checksum, int) or not isinstance(body, bytes):
        return None
    return _Record(kind, checksum, body)


def _take(end: _End, record: _Record) -> None:
    if record.kind not in (ENTRY, STATE):
        return
    fields = {k: v for k, v in message_of(record.data).items() if isinstance(v, int)}
    if record.kind == STATE:
        end.term, end.vote, end.commit = fields.get(1, 0), fields.get(2, 0), fields.get(3, 0)
    else:
        end.last_term, end.last_index = fields.get(2, 0), fields.get(3, 0)


def _framed(kind: int, checksum: int, data: bytes) -> bytes:
    record = b"\x08" + _varint(kind) + b"\x10" + _varint(checksum) + b"\x1a" + _varint(len(data)) + data
    padding = -len(record) % 8
    field = len(record) | ((0x80 | padding) << 56 if padding else 0)
    return field.to_bytes(8, "little") + record + bytes(padding)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _table() -> tuple[int, ...]:
    made = []
    for n in range(256):
        crc = n
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 if crc & 1 else crc >> 1
        made.append(crc)
    return tuple(made)


_CASTAGNOLI = _table()


def _crc32c(crc: int, data: bytes) -> int:
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CASTAGNOLI[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF
