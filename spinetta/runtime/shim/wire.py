"""What goes over the shim's socket: one JSON object a line, both ways.

A request is ``{"id": n, "op": name, ...}``; its answer carries the same id and either ``"ok": true`` or
``"error": code`` with ``"message"``. What the shim sends of its own accord carries ``"event"`` instead of an id.
"""

from __future__ import annotations

import json
import re
from typing import Any

PROTOCOL_VERSION = 2  # 2: containers, and limits of logs and scratch; 1 knew none of their fields
PROTOCOL_OLDEST = 1  # that each side can do with: the one before
CONTAINERS_SINCE = 2
LOG_LIMIT, DISK_LIMIT = "log-limit", "disk-limit"  # limits that the kernel does not set
LIMITS = (LOG_LIMIT, DISK_LIMIT)  # capabilities that every shim of this code has
OPEN_FILES_LIMIT = "open-files-limit"
LIMITS_SINCE = 2  # those that did not say so yet had these two all the same
SOCKET_NAME = "shim.sock"
IDENTITY_NAME = "shim.json"
MESSAGE_BYTES_MAX = 16 << 20  # the longest argv and environment that the kernel takes, 2 MiB, escaped at its worst
OUTPUT_BYTES_MAX = 8 << 20  # what a slow reader may owe us: all exits of a full shim (4096 x 1 KiB) and some answers
EXECS_MAX = 64  # commands beside attempts, with a connection each
EXECS_PER_ATTEMPT_MAX = 8  # they share its limits
CONNECTIONS_MAX = 16 + EXECS_MAX  # a daemon, its successor, and people looking
SIDE_MAX = 1000  # rows or columns of a terminal; more no screen has
DESCRIPTORS_MAX = 3  # that come along with one message
ATTEMPTS_MAX = 4096  # running or not yet forgotten; beyond it nothing more is started
SERVICES_MAX = 16
PAGE_ATTEMPTS = 256  # attempts in one answer to `held`
MESSAGE_CHARS_MAX = 2000  # of an exit's message
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")

Message = dict[str, Any]


class BadMessage(Exception):
    """The other side sent something that is no message of this protocol."""


def encode(message: Message) -> bytes:
    """One line. Non-UTF-8 bytes of arguments travel as lone surrogates, escaped."""
    return json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n"


def decode(line: bytes) -> Message:
    """The object on one line, or BadMessage."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadMessage(f"not JSON: {error}") from None
    if not isinstance(message, dict):
        raise BadMessage("not a JSON object")
    return message


class Lines:
    """Cuts a byte stream into lines of bounded length."""

    def __init__(self, bytes_max: int = MESSAGE_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._buffer = bytearray()
        self._searched = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The lines completed by `data`. BadMessage when one is too long."""
        self._buffer += data
        lines: list[bytes] = []
        while True:
            end = self._buffer.find(b"\n", self._searched)
            if (end if end >= 0 else len(self._buffer)) > self._bytes_max:
                raise BadMessage(f"a message is longer than {self._bytes_max} bytes")
            if end < 0:
                self._searched = len(self._buffer)
                return lines
            lines.append(bytes(self._buffer[:end]))
            del self._buffer[: end + 1]
            self._searched = 0


_MISSING = object()


def text(message: Message, name: str, default: object = _MISSING) -> str:
    """The text field `name`."""
    value = message.get(name, default)
    if not isinstance(value, str):
        raise BadMessage(f"{name} must be a text")
    return value


def number(message: Message, name: str, default: object = _MISSING) -> float:
    """The number field `name`, not negative; null means no limit."""
    value = message.get(name, default)
    if value is None:
        return float("inf")
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise BadMessage(f"{name} must be a number, not negative")
    return float(value)


def integer(message: Message, name: str, default: object = _MISSING) -> int:
    """The whole number field `name`, not negative, below 2^63."""
    value = message.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise BadMessage(f"{name} must be a whole number, not negative")
    return value


def key(message: Message, name: str = "key") -> str:
    """A name that is safe as that of a file and of a cgroup."""
    value = text(message, name)
    if not KEY.match(value):
        raise BadMessage(
            f"{name} must be 1 to 128 letters, digits, '.', '_' or '-', and begin with one of the first two"
        )
    return value


def texts(message: Message, name: str) -> list[str]:
    """A list of texts."""
    value = message.get(name)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadMessage(f"{name} must be a list of texts")
    return value


def text_map(message: Message, name: str) -> dict[str, str]:
    """A mapping of texts to texts."""
    value = message.get(name)
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise BadMessage(f"{name} must be an object of texts")
    return value
