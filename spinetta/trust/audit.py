"""Who did what at this node: JSON lines in files that only grow, each line bound to the one before it by its hash.

A line that is changed, removed, added in between or put elsewhere breaks the chain for all that follow. Lines cut off
at the *end* do not, and a log written anew from its beginning is whole in itself. No node looks after another's log:
an administrator keeps the latest line's number and hash (`head`) elsewhere, and gives it to `verify` the next time
(`trust.auditreading`).

Lines are written by a thread of their own, so that no call waits for a disk; after a crash of the machine the last
moments may be missing, never something in the middle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import re
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spinetta.errors import UserError

log = logging.getLogger("spinetta.node")

FILE_BYTES_MAX = 64 << 20  # then a new file is begun: about 200,000 lines, which an editor still opens
FILES_MAX = 64  # the oldest go first: 4 GiB; whoever must keep more moves finished files away
WAITING_MAX = 10_000  # lines that wait for the disk: a second of the busiest node; past it they are counted, and told
LINE_BYTES_MAX = 65_536  # five texts of `TEXT_MAX`, each character six bytes as JSON
TEXT_MAX = 1024  # characters of one field: the ids of a long call are cut, not the line lost
FLUSH_S = 0.05  # lines of that time go to the disk together
GENESIS = "0" * 64

TORN = "audit.torn"  # a line was cut short by a crash; `detail` is the hash of what was left of it
GAP = "audit.gap"  # `detail` tells how many lines could not be written

_FILE = re.compile(r"audit-([0-9]{8,18})\.jsonl", re.ASCII)  # eight digits, or as many as the number takes


@dataclass(frozen=True, slots=True)
class Entry:
    """One line. `hash` covers all other fields, and by `prev` all lines before it."""

    seq: int
    time_ms: int
    node: str
    identity: str
    call: str
    object: str
    outcome: str
    revision: int
    detail: str
    prev: str
    hash: str


def digest(fields: dict[str, Any]) -> str:
    """The hash of a line: SHA-256 over its canonical JSON without the hash itself."""
    body = {k: v for k, v in fields.items() if k != "hash"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(slots=True)
class _Waiting:
    time_ms: int
    identity: str
    call: str
    object: str
    outcome: str
    revision: int
    detail: str


@dataclass(slots=True)
class _Chain:
    """Where the log stands."""

    seq: int = 0
    hash: str = GENESIS
    path: Path | None = None
    torn: str = ""
    lost: int = field(default=0)


class AuditLog:
    """The audit log of one node. Made by `open_log`; `close` it, or the last lines may be missing."""

    def __init__(self, directory: Path, node: str, chain: _Chain, *, file_bytes_max: int, files_max: int) -> None:
        self._directory = directory
        self._node = node
        self._chain = chain
        self._file_bytes_max = file_bytes_max
        self._files_max = files_max
        self._waiting: queue.Queue[_Waiting | None] = queue.Queue(WAITING_MAX)
        self._lost = 0
        self._counting = threading.Lock()
        self.trouble = ""  # why lines cannot be written at present; for the node's warnings
        self._thread = threading.Thread(target=self._write_all, name="audit", daemon=True)
        self._thread.start()

    @property
    def head(self) -> tuple[int, str]:
        """Number and hash of the latest line on disk."""
        return self._chain.seq, self._chain.hash

    def record(self, call: str, identity: str, object_: str, outcome: str, revision: int = 0, detail: str = "") -> None:
        """Write a line soon. Never blocks; a line too many is counted, and the log tells of it."""
        now_ms = time.time_ns() // 1_000_000
        line = _Waiting(now_ms, _cut(identity), _cut(call), _cut(object_), _cut(outcome), revision, _cut(detail))
        try:
            self._waiting.put_nowait(line)
        except queue.Full:
            with self._counting:
                self._lost += 1

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what waits, and stop. May be called twice."""
        try:
            self._waiting.put(None, timeout=timeout_s)
        except queue.Full:
            log.error("the audit log cannot be written: %s", self.trouble or "the disk does not answer")
            return
        self._thread.join(timeout_s)

    # --- in the thread ---

    def _write_all(self) -> None:
        while True:
            lines, ended = self._gather()
            while lines:
                try:
                    self._append(lines)
                except OSError as e:
                    self._say(f"the audit log cannot be written: {e.strerror}")
                    if ended:
                        return
                    time.sleep(1.0)  # the thread's own pace, not synchronisation: a full disk does not mend faster
                else:
                    self._say("")
                    lines = []
            if ended:
                return

    def _gather(self) -> tuple[list[_Waiting], bool]:
        first = self._waiting.get()
        if first is None:
            return [], True
        lines = [first]
        end_s = time.monotonic() + FLUSH_S
        while len(lines) < WAITING_MAX:
            try:
                line = self._waiting.get(timeout=max(0.0, end_s - time.monotonic()))
            except queue.Empty:
                break
            if line is None:
                return lines, True
            lines.append(line)
        return lines, False

    def _append(self, lines: list[_Waiting]) -> None:
        with self._counting:
            lost = self._lost
        now_ms = time.time_ns() // 1_000_000
        extra = []
        if self._chain.torn:
            extra.append(_Waiting(now_ms, "node", TORN, "", "found", 0, self._chain.torn))
        if lost:
            extra.append(_Waiting(now_ms, "node", GAP, "", "lost", 0, f"{lost} lines could not be written"))
        seq, prev = self._chain.seq, self._chain.hash
        out = bytearray()
        for line in (*extra, *lines):
            seq += 1
            fields: dict[str, Any] = {"seq": seq, "node": self._node, **asdict(line), "prev": prev}
            fields["hash"] = prev = digest(fields)
            out += json.dumps(fields, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"
        path = self._current(seq)
        _append_whole(path, bytes(out))
        self._chain = _Chain(seq, prev, path)
        with self._counting:
            self._lost -= lost

    def _current(self, seq: int) -> Path:
        path = self._chain.path
        if path is not None and path.exists() and path.stat().st_size < self._file_bytes_max:
            return path
        old_files = files(self._directory)
        for old in old_files[: max(0, len(old_files) + 1 - self._files_max)]:
            old.unlink(missing_ok=True)
        return self._directory / f"audit-{seq:08d}.jsonl"

    def _say(self, trouble: str) -> None:
        if trouble != self.trouble:
            self.trouble = trouble
            if trouble:
                log.error("%s", trouble)
            else:
                log.warning("the audit log is written again")


def open_log(
    directory: Path, node: str, *, file_bytes_max: int = FILE_BYTES_MAX, files_max: int = FILES_MAX
) -> AuditLog:
    """Go on with a node's audit log, or begin it. Blocks: reads the latest file.

    A last line that a crash has cut short is ended, and the next line tells of it.

    Raises:
        UserError: the directory cannot be used, or the latest file has been altered.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        chain = _resume(directory)
    except OSError as e:
        raise UserError(f"the audit log in {directory} cannot be used: {e.strerror}", reason="audit") from e
    return AuditLog(directory, node, chain, file_bytes_max=file_bytes_max, files_max=files_max)


def _resume(directory: Path) -> _Chain:
    for path in reversed(files(directory)):
        data = path.read_bytes()
        whole, _, rest = data.rpartition(b"\n")
        torn = hashlib.sha256(rest).hexdigest() if rest else ""
        if rest:
            _append_whole(path, b"\n")
        for raw in reversed(whole.split(b"\n")):
            try:
                entry = parse(raw)
            except ValueError:  # an earlier torn line: whether it is one, `verify` says
                continue
            return _Chain(entry.seq, entry.hash, path, torn)
    return _Chain()


def parse(raw: bytes) -> Entry:
    """A line of a log.

    Raises:
        ValueError: it is none.
    """
    if len(raw) > LINE_BYTES_MAX:
        raise ValueError("too long")
    try:
        found = json.loads(raw)
    except RecursionError:  # brackets in brackets in brackets …
        raise ValueError("not an entry") from None
    if not isinstance(found, dict) or set(found) != set(Entry.__slots__):
        raise ValueError("not an entry")
    for name, value in found.items():
        if type(value) is not (int if name in ("seq", "time_ms", "revision") else str):
            raise ValueError(f"{name} is {value!r}")
    return Entry(**found)


def files(directory: Path) -> list[Path]:
    """The files of a log, the oldest first."""
    return sorted((p for p in directory.iterdir() if _FILE.fullmatch(p.name)), key=order)


def order(path: Path) -> tuple[int, str]:
    """By which the files of a log follow one another: a longer number is a larger one."""
    return len(path.name), path.name


def _append_whole(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(fd).st_size
        try:
            written = os.write(fd, data)
            while written < len(data):
                written += os.write(fd, data[written:])
            os.fsync(fd)
        except OSError:
            os.ftruncate(fd, size)  # half a batch would break the chain for the next try
            raise
    finally:
        os.close(fd)


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_MAX else text[: TEXT_MAX - 1] + "…"
