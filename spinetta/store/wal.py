"""Whose etcd data is this? Read from the head of the write-ahead log, without starting etcd.

Each file of the log begins with a checksum record and a metadata record. A record is a length (8 bytes, little endian;
the highest byte holds padding) and a protobuf message: 1 type, 2 checksum, 3 data. The metadata's data is another
message: 1 member id, 2 cluster id. The format is the same from 3.0 to 3.6.
"""

from __future__ import annotations

from pathlib import Path

from spinetta.errors import UserError

HEAD_BYTES = 4096  # the two records take less than 100
METADATA = 1  # type of the record
RECORDS_MAX = 4


def wal_owner(data_dir: Path) -> tuple[str, str] | None:
    """Member id and cluster id (hexadecimal) of etcd's data; None when there is none.

    Raises:
        UserError: there is something, but it cannot be understood.
    """
    folder = data_dir / "member" / "wal"
    try:
        logs = sorted(each for each in folder.iterdir() if each.suffix == ".wal")
        if not logs:
            return None
        with logs[0].open("rb") as file:
            head = file.read(HEAD_BYTES)
        return _owner(head)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, IndexError) as error:
        raise UserError(
            f"the etcd data in {data_dir} cannot be read: {error}",
            hint="restore the directory from a backup, or remove this member from the cluster and join anew",
            reason="data-damaged",
        ) from error


def _owner(head: bytes) -> tuple[str, str] | None:
    at = 0
    for _ in range(RECORDS_MAX):
        field = int.from_bytes(head[at : at + 8], "little")
        if not field:
            break
        padding = (field >> 56) & 7 if field >> 63 else 0
        length = field & ((1 << 56) - 1)
        if at + 8 + length > len(head):
            raise ValueError("a record is cut short")
        record = message_of(head[at + 8 : at + 8 + length])
        if record.get(1) == METADATA:
            metadata = message_of(_bytes(record[3]))
            return f"{_int(metadata[1]):x}", f"{_int(metadata[2]):x}"
        at += 8 + length + padding
    raise ValueError("the log does not begin with metadata")


def message_of(data: bytes) -> dict[int, int | bytes]:
    """The fields of a protobuf message: numbers and byte strings are all there are."""
    found: dict[int, int | bytes] = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 == 0:
            found[tag >> 3], at = _varint(data, at)
        elif tag & 7 == 2:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise ValueError("a record is cut short")
            found[tag >> 3] = data[at : at + length]
            at += length
        else:
            raise ValueError(f"unexpected wire type {tag & 7}")
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _int(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("not a number")
    return value


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("not bytes")
    return value
