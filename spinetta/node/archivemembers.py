"""One append to an archive: a gzip member whose header says how long it is, and from which id to which it goes."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from spinetta.node.archivelines import ID_IN_LINE

MEMBER_RAW_BYTES_MAX = 64 << 20  # of one member, unpacked: what is larger was not written by us
SEARCH_BYTES = 1 << 20  # read at once in search of the next whole member
_MAGIC = b"\x1f\x8b\x08\x04"  # gzip, deflate, with an extra field
_HEAD = struct.Struct("<4sIBBH2sHII16s16sI")
_EXTRA = struct.Struct("<II16s16s")
_XLEN = _EXTRA.size + 4 + 4  # the subfield's own head, and a checksum
_TAIL = struct.Struct("<II")


class Member(NamedTuple):
    """One append: where it is, and what it holds, without what is in it. Ids as numbers."""

    offset: int
    length: int
    tasks: int
    first: int
    last: int


class Scan(NamedTuple):
    """The whole members of a file; from `torn` on there is a member that was not finished, None: there is none."""

    members: tuple[Member, ...]
    torn: int | None
    end: int


def pack(lines: Sequence[bytes], now_ms: int) -> bytes:
    """A gzip member of lines that are in the order of their ids."""
    raw = b"".join(line + b"\n" for line in lines)
    packer = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = packer.compress(raw) + packer.flush()
    first, last = number_of(lines[0][ID_IN_LINE]), number_of(lines[-1][ID_IN_LINE])
    extra = _EXTRA.pack(
        _HEAD.size + len(body) + _TAIL.size, len(lines), first.to_bytes(16, "big"), last.to_bytes(16, "big")
    )
    seconds = min(max(now_ms // 1000, 0), 0xFFFFFFFF)
    head = struct.pack("<4sIBBH2sH", _MAGIC, seconds, 0, 255, _XLEN, b"SP", _EXTRA.size + 4)
    head += extra + struct.pack("<I", zlib.crc32(extra))
    return head + body + _TAIL.pack(zlib.crc32(raw), len(raw) & 0xFFFFFFFF)


def unpack(member: bytes) -> list[bytes]:
    """The lines of a member.

    Raises:
        ValueError: it is not whole, or damaged.
    """
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        raw = unpacker.decompress(member[_HEAD.size : -_TAIL.size], MEMBER_RAW_BYTES_MAX)
    except zlib.error as e:
        raise ValueError(str(e)) from e
    if not unpacker.eof or _TAIL.pack(zlib.crc32(raw), len(raw) & 0xFFFFFFFF) != member[-_TAIL.size :]:
        raise ValueError("its checksum is wrong")
    return raw.splitlines()


def _head(data: bytes, offset: int, size: int) -> Member | None:
    """The member that begins with these bytes at this offset of a file of this size; None: no whole one does."""
    found = _parsed(data, offset)
    return found if found is not None and offset + found.length <= size else None


def _parsed(data: bytes, offset: int) -> Member | None:
    if len(data) < _HEAD.size or not data.startswith(_MAGIC):
        return None
    _, _, _, _, xlen, tag, _, length, count, first, last, check = _HEAD.unpack_from(data)
    if (xlen, tag) != (_XLEN, b"SP") or check != zlib.crc32(_EXTRA.pack(length, count, first, last)):
        return None
    if length < _HEAD.size + _TAIL.size:
        return None
    return Member(offset, length, count, int.from_bytes(first, "big"), int.from_bytes(last, "big"))


def scan(fd: int, start: int = 0) -> Scan:
    """The members of a file from `start` on. What is between whole ones and is none is passed over."""
    size = os.fstat(fd).st_size
    members: list[Member] = []
    at = start
    while at < size:
        data = os.pread(fd, _HEAD.size, at)
        found = _head(data, at, size) or _search(fd, at + 1, size)
        if found is None:
            return Scan(tuple(members), at if _is_torn(fd, data, at, size) else None, at)
        members.append(found)
        at = found.offset + found.length
    return Scan(tuple(members), None, at)


def _search(fd: int, start: int, size: int) -> Member | None:
    """The next whole member."""
    at = start
    while at < size:
        data = os.pread(fd, SEARCH_BYTES + _HEAD.size, at)
        i = data.find(_MAGIC)
        while 0 <= i < SEARCH_BYTES:
            found = _head(data[i : i + _HEAD.size], at + i, size)
            if found is not None:
                return found
            i = data.find(_MAGIC, i + 1)
        at += SEARCH_BYTES
    return None


def _is_torn(fd: int, data: bytes, at: int, size: int) -> bool:
    """What is left of a file is the beginning of a member, or zeros in its place: an append that a crash cut off.

    Anything else may be worth looking at for somebody, and stays.
    """
    if len(data) < _HEAD.size:
        return data.startswith(_MAGIC) or _MAGIC.startswith(data) or not any(data)
    if _parsed(data, at) is not None:
        return True
    while at < size and not any(chunk := os.pread(fd, SEARCH_BYTES, at)):
        at += len(chunk)
    return at >= size


def number_of(task: bytes) -> int:
    """An id as a number; 0 for what is none, in a line that somebody has edited."""
    try:
        return int(task.replace(b"-", b""), 16)
    except ValueError:
        return 0
