"""Reading an audit log, from its files: all of it, as it grows, and whether its chain is whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from spinetta.errors import UserError
from spinetta.trust.audit import GENESIS, TORN, Entry, digest, files, order, parse


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check of the chain has found.

    Attributes:
        entries: good lines read, until the first fault.
        first_seq, head: where the chain begins (older files may have been removed) and ends.
        faults: in words, with file and line; empty: the chain is whole.
    """

    entries: int = 0
    first_seq: int = 0
    head: tuple[int, str] = (0, GENESIS)
    faults: tuple[str, ...] = ()


def read(directory: Path) -> Iterator[Entry]:
    """All lines that can be read, the oldest first. Does not check the chain.

    Raises:
        UserError: there is no audit log, or it cannot be read.
    """
    for path in _existing(directory):
        for raw in _lines(path):
            try:
                yield parse(raw)
            except ValueError:
                continue


class Tail:
    """Lines as they come: each `read` goes on where the one before has stopped."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path: Path | None = None
        self._offset = 0

    def read(self) -> Iterator[Entry]:
        """Whole lines that were added since; those that cannot be read are left out.

        Raises:
            UserError: there is no audit log, or it cannot be read.
        """
        for path in _existing(self._directory):
            if self._path is not None and order(path) < order(self._path):
                continue
            if path != self._path:
                self._path, self._offset = path, 0
            try:
                with path.open("rb") as file:
                    file.seek(self._offset)
                    for raw in file:
                        if not raw.endswith(b"\n"):  # is being written: the rest comes
                            break
                        self._offset += len(raw)
                        try:
                            yield parse(raw.rstrip(b"\n"))
                        except ValueError:
                            continue
            except OSError as e:
                raise UserError(f"{path} cannot be read: {e.strerror}", reason="audit") from e


def verify(directory: Path, heads: Iterator[tuple[int, str]] | tuple[tuple[int, str], ...] = ()) -> Verdict:
    """Check the chain from its beginning to its end.

    Args:
        directory: DATA/audit of a node.
        heads: numbers and hashes of lines that were noted elsewhere before: each must be there.

    Raises:
        UserError: there is no audit log, or it cannot be read.
    """
    wanted = dict(heads)
    count, first_seq, seq, prev = 0, 0, 0, ""
    broken: tuple[str, str] | None = None  # where, and the hash of, a line that cannot be read
    for path in _existing(directory):
        for number, raw in enumerate(_lines(path), start=1):
            where = f"{path.name}, line {number}"
            try:
                entry = parse(raw)
            except ValueError:
                if broken is not None:
                    return _faulty(count, first_seq, (seq, prev), f"{broken[0]}: not a line of an audit log")
                broken = (where, hashlib.sha256(raw).hexdigest())
                continue
            fault = _fault(entry, seq, prev, broken)
            if fault:
                return _faulty(count, first_seq, (seq, prev), f"{where}: {fault}")
            broken = None
            count, first_seq, seq, prev = count + 1, first_seq or entry.seq, entry.seq, entry.hash
            if wanted.pop(seq, prev) != prev:
                return _faulty(count, first_seq, (seq, prev), f"{where}: line {seq} is not the one of the given head")
    faults = [f"{broken[0]}: the last line is not whole"] if broken is not None else []
    missing = sorted(n for n in wanted if n >= first_seq)
    if missing:
        faults.append(
            f"line {missing[-1]} of a given head is not there, the last one is {seq}: lines have been cut off, or the "
            "head is another log's"
        )
    return Verdict(count, first_seq, (seq, prev or GENESIS), tuple(faults))


def _fault(entry: Entry, seq: int, prev: str, broken: tuple[str, str] | None) -> str:
    if digest(asdict(entry)) != entry.hash:
        return f"line {entry.seq} has been altered"
    if prev and (entry.seq != seq + 1 or entry.prev != prev):
        return f"line {entry.seq} does not follow line {seq}: lines have been removed, added or altered"
    if not prev and entry.seq == 1 and entry.prev != GENESIS:
        return "the first line is not the first one of this log"
    if broken is not None and (entry.call != TORN or entry.detail != broken[1]):
        return f"the line before ({broken[0]}) is not a line of an audit log"
    return ""


def _faulty(count: int, first_seq: int, head: tuple[int, str], fault: str) -> Verdict:
    return Verdict(count, first_seq, head, (fault,))


def _existing(directory: Path) -> list[Path]:
    try:
        found = files(directory)
    except OSError as e:
        raise UserError(
            f"there is no audit log in {directory}: {e.strerror}", hint="name a node's data directory", reason="audit"
        ) from e
    if not found:
        raise UserError(f"there is no audit log in {directory}", hint="name a node's data directory", reason="audit")
    return found


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            for raw in file:
                yield raw.rstrip(b"\n")
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}", reason="audit") from e
