"""The archive of finished tasks on a node's disk: compressed JSON lines, appended, never rewritten.

A file is a row of gzip members, so that ``zcat`` reads it. Each append is one member, whose header says in an extra
field how long it is and from which id to which it goes. That makes an index without reading what is compressed, and
tells a member that was torn by a crash from a whole one. What is damaged is left out, and hides nothing before or
after it.
"""

from __future__ import annotations

import fcntl
import heapq
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from spinetta.errors import UserError
from spinetta.node.archivelines import ID_IN_LINE, archived_ms, line_of
from spinetta.node.archivemembers import Member, Scan, number_of, pack, scan, unpack
from spinetta.node.trouble import Teller
from spinetta.store.snapshot import fsync_folder

log = logging.getLogger("spinetta.node")

SUFFIX = ".jsonl.gz"
SEGMENT_BYTES_MAX = 64 << 20  # then another file is begun: files go as a whole when there are too many bytes
SEGMENT_BYTES_MIN = 64 << 10
SEGMENTS_KEPT = 8  # at least so many files in what is kept, so that little goes at once
SCAN_MAX = 2000  # tasks looked at for one page: about half a second
INDEX_MEMBERS_MAX = 100_000  # remembered, 250 B each; of files beyond them the headers are read again
READ_S = 10.0  # for one page


@dataclass(frozen=True, slots=True)
class ArchivePage:
    """Lines in order, each task once. `last`: the id of the last one looked at; `more`: there may be others after."""

    lines: tuple[bytes, ...]
    last: str
    more: bool


class Archive:
    """A node's archive. Its methods block and may be called from any thread."""

    def __init__(self, directory: Path, keep_bytes: int) -> None:
        """`keep_bytes`: what all files may take together; 0: any amount."""
        self.directory = directory
        self._keep_bytes = keep_bytes
        self._lock = threading.Lock()  # of what is written, and of the index
        self.trouble = ""
        """Why nothing can be written now; empty when all is well, or nothing has been tried."""
        self._sound = ""  # the file whose end is known to be whole
        self._index: dict[str, tuple[int, Scan]] = {}  # by name: inode, and what is in it
        self._teller = Teller(log)

    # --- writing ---

    def append(self, records: Sequence[bytes], now_ms: int) -> tuple[str, ...]:
        """Write tasks down (the values of their keys); the ids of those that are now on the disk to stay.

        What cannot be read as a task is left out. Writing a task again does no harm.

        Raises:
            UserError: nothing was written (reason ``archive-unwritable``).
        """
        lines = sorted({line[ID_IN_LINE]: line for r in records if (line := line_of(r, now_ms)) is not None}.items())
        if not lines:
            return ()
        member = pack([line for _, line in lines], now_ms)
        with self._lock:
            try:
                self._write(member, now_ms)
            except OSError as e:
                self._sound = ""
                self.trouble = f"finished tasks cannot be archived here: {e.strerror or e}"
                raise UserError(
                    f"the archive {self.directory} cannot be written: {e.strerror or e}",
                    hint="make room on its disk; the tasks stay in the cluster's store until then",
                    reason="archive-unwritable",
                ) from e
            self.trouble = ""
            try:
                self._trim()
            except OSError as e:
                self._teller.tell(f"the oldest files of the archive cannot be removed: {e}", logging.WARNING)
        return tuple(i.decode() for i, _ in lines)

    def _write(self, member: bytes, now_ms: int) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._current(now_ms)
        is_new = not path.exists()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # somebody who mends it by hand, for example
            if self._sound != path.name:
                self._mend(fd, path)
            before = os.fstat(fd).st_size
            try:
                written = 0
                while written < len(member):
                    written += os.write(fd, member[written:])
                os.fsync(fd)
            except OSError:
                self._sound = ""
                os.ftruncate(fd, before)
                raise
            if is_new:
                fsync_folder(self.directory)
            self._sound = path.name
        finally:
            os.close(fd)

    def _current(self, now_ms: int) -> Path:
        day = time.strftime("%Y-%m-%d", time.gmtime(now_ms / 1000))
        ours = [p for p in self._files() if p.name.startswith(day)]
        number = 1
        if ours:
            last = ours[-1]
            middle = last.name.removeprefix(day).removesuffix(SUFFIX).removeprefix(".")
            number = int(middle) if middle.isdecimal() else len(ours)
            number += last.stat().st_size >= self._segment_bytes
        return self.directory / f"{day}.{number:04}{SUFFIX}"

    @property
    def _segment_bytes(self) -> int:
        share = self._keep_bytes // SEGMENTS_KEPT if self._keep_bytes else SEGMENT_BYTES_MAX
        return min(max(share, SEGMENT_BYTES_MIN), SEGMENT_BYTES_MAX)

    def _mend(self, fd: int, path: Path) -> None:
        """Cut off what a crash has torn: it has never counted, and would hide what follows from ``zcat``."""
        found = scan(fd)
        if found.torn is not None:
            log.warning("the archive %s ended in the middle of an entry, which is cut off", path)
            os.ftruncate(fd, found.torn)
            os.fsync(fd)

    def _trim(self) -> None:
        if not self._keep_bytes:
            return
        files = self._files()
        sizes = [p.stat().st_size for p in files]
        total = sum(sizes)
        for path, size in list(zip(files, sizes, strict=True))[:-1]:  # the one that is written stays
            if total <= self._keep_bytes:
                return
            path.unlink(missing_ok=True)
            self._index.pop(path.name, None)
            total -= size
            log.warning("removed %s: the archive may take %d bytes (archive_keep)", path, self._keep_bytes)

    def _files(self) -> list[Path]:
        """Oldest first; those too that somebody has put there, from a node that is gone for example."""
        try:
            with os.scandir(self.directory) as found:
                names = [e.name for e in found if e.name.endswith(SUFFIX) and e.is_file(follow_symlinks=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [self.directory / name for name in sorted(names)]

    # --- reading ---

    def page(
        self,
        matches: Callable[[bytes], bool],
        *,
        after: str,
        limit: int,
        bytes_max: int,
        newest_first: bool = False,
        since_ms: int = 0,
        before_ms: int = 0,
    ) -> ArchivePage:
        """Some of the tasks that match, in the order of their ids, which is that of submission.

        Args:
            matches: told a line.
            after: exclusive; empty: from the beginning (with `newest_first` from the end).
            limit: of tasks.
            bytes_max: of lines together; a single larger one comes alone.
            newest_first: the other order.
            since_ms: submitted then or later, as ids tell. 0: any time.
            before_ms: submitted before then. 0: any time.

        Raises:
            UserError: it cannot be read now (reason ``archive-unreadable``).
        """
        try:
            return self._page(matches, after, limit, bytes_max, _Order(newest_first, after, since_ms, before_ms))
        except OSError as e:
            raise UserError(
                f"the archive {self.directory} cannot be read: {e.strerror or e}", reason="archive-unreadable"
            ) from e

    def _page(
        self, matches: Callable[[bytes], bool], after: str, limit: int, bytes_max: int, order: _Order
    ) -> ArchivePage:
        lines: list[bytes] = []
        looked_at, room, last = 0, bytes_max, after
        walk = _Walk(self._members(order), order, self._unpack)
        for line in walk.run(time.monotonic() + READ_S):
            task = line[ID_IN_LINE].decode()
            if task == last:
                continue  # archived twice
            if looked_at == SCAN_MAX or len(lines) == limit:
                return ArchivePage(tuple(lines), last, more=True)
            looked_at += 1
            if matches(line):
                if lines and len(line) > room:
                    return ArchivePage(tuple(lines), last, more=True)
                room -= len(line)
                lines.append(line)
            last = task
        return ArchivePage(tuple(lines), last, more=walk.cut)

    def _members(self, order: _Order) -> list[tuple[int, int, Path, Member]]:
        """Those that may hold what is asked for, by where they begin in that order."""
        found = []
        for path in self._files():
            for m in self._scanned(path).members:
                one, other = order.key(m.first), order.key(m.last)
                low, high = min(one, other), max(one, other)
                if high >= order.low and low <= order.high:
                    found.append((low, high, path, m))
        return sorted(found)

    def _scanned(self, path: Path) -> Scan:
        with self._lock:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return Scan((), None, 0)  # removed meanwhile
            try:
                stat = os.fstat(fd)
                inode, known = self._index.get(path.name, (0, Scan((), None, 0)))
                if inode != stat.st_ino or known.end > stat.st_size:
                    known = Scan((), None, 0)
                if known.end < stat.st_size:
                    more = scan(fd, known.end)
                    known = Scan(known.members + more.members, more.torn, more.end)
            finally:
                os.close(fd)
            self._index[path.name] = (stat.st_ino, known)
            while sum(len(s.members) for _, s in self._index.values()) > INDEX_MEMBERS_MAX and len(self._index) > 1:
                del self._index[next(iter(self._index))]
            return known

    def _unpack(self, path: Path, member: Member) -> list[bytes]:
        """The lines of a member; none when it is damaged, which is said."""
        try:
            with path.open("rb") as f:
                return unpack(os.pread(f.fileno(), member.length, member.offset))
        except FileNotFoundError:
            return []  # removed meanwhile, as the oldest
        except ValueError as e:
            self._teller.tell(f"an entry of the archive {path} is damaged and left out: {e}", logging.WARNING)
            return []


# --- the order of a page -----------------------------------------------------------------------------------------


class _Order:
    """Ids as numbers that grow in the order asked for, and between which of them the page lies (both included)."""

    def __init__(self, newest_first: bool, after: str, since_ms: int, before_ms: int) -> None:
        self._sign = -1 if newest_first else 1
        low, high = since_ms << 80, (before_ms << 80) - 1 if before_ms else (1 << 128) - 1
        if after:
            low, high = (low, min(high, number_of(after.encode()) - 1)) if newest_first else (
                max(low, number_of(after.encode()) + 1), high,
            )  # fmt: skip
        self.low, self.high = (-high, -low) if newest_first else (low, high)

    def key(self, number: int) -> int:
        """Where an id is in this order."""
        return self._sign * number


class _Walk:
    """The lines of members in order. Those that overlap are merged; `cut`: not all could be, there are more."""

    def __init__(
        self,
        members: Sequence[tuple[int, int, Path, Member]],
        order: _Order,
        read: Callable[[Path, Member], list[bytes]],
    ) -> None:
        self._members = members
        self._order = order
        self._read = read
        self._high = order.high
        self.cut = False

    def run(self, until_s: float) -> Iterator[bytes]:
        """Line by line."""
        pool: list[tuple[int, int, bytes]] = []
        for low, _, path, member in self._members:
            while pool and pool[0][0] < low:
                yield heapq.heappop(pool)[-1]
            if low > self._high:
                break
            if time.monotonic() > until_s:
                raise UserError("the archive is too slow to be read now", reason="archive-unreadable")
            for line in self._read(path, member):
                key = self._order.key(number_of(line[ID_IN_LINE]))
                if self._order.low <= key <= self._high:
                    heapq.heappush(pool, (key, -archived_ms(line), line))  # of two alike the later one comes first
            if len(pool) > 4 * SCAN_MAX:  # of more than SCAN_MAX none is looked at
                pool = heapq.nsmallest(2 * SCAN_MAX, pool)
                self._high, self.cut = pool[-1][0], True
        while pool:
            yield heapq.heappop(pool)[-1]
