"""What people and programs read: aligned tables, plain when piped, one JSON document when asked."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COLOURS = {
    "red": "31",
    "green": "32",
    "yellow": "33",
    "blue": "34",
    "dim": "2",
    "bold": "1",
}

# What steers a terminal and JSON does not escape by itself: controls of eight bits, ends of lines, directions of text.
_STEERING = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_STRANGE_ESCAPE = re.compile(r"\x1b(?!\[\d{1,2}m)")


def say(text: str = "") -> None:
    """A line to standard output."""
    sys.stdout.write(text + "\n")


def tell(text: str) -> None:
    """To standard error: progress and remarks, which must not get into a pipe.

    What it quotes may be other people's (a task's message); only our own colours and ends of lines get through.
    """
    safe = "".join(c if c.isprintable() or c in "\n\x1b" else f"\\x{ord(c):02x}" for c in text)
    sys.stderr.write(_STRANGE_ESCAPE.sub(r"\\x1b", safe) + "\n")
    sys.stderr.flush()


def put_json(document: object) -> None:
    """One JSON document, on a line of its own when piped, indented for people."""
    indent = 2 if sys.stdout.isatty() else None
    sys.stdout.write(_json(document, indent) + "\n")


def put_json_line(document: object) -> None:
    """One line of a stream of JSON documents, sent at once."""
    sys.stdout.write(_json(document) + "\n")
    sys.stdout.flush()


def _json(document: object, indent: int | None = None) -> str:
    text = json.dumps(document, indent=indent, ensure_ascii=False)
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def in_colour(stream: Any = None) -> bool:
    """Whether to use colours: on a terminal that can, unless NO_COLOR is set."""
    stream = stream or sys.stdout
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, *, on: bool | None = None) -> str:
    """The text in a colour of `COLOURS`, if colours are on."""
    if not colour or not (in_colour() if on is None else on):
        return text
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m"


def width(text: str) -> int:
    """How many columns a terminal shows it in."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def printable(text: str) -> str:
    """The text without what would move a terminal's cursor or change its colours."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Iterable[int] = (),
    colours: Mapping[tuple[int, int], str] | None = None,
) -> None:
    """Aligned columns, two spaces apart. On a terminal the last column is cut at its width; piped, nothing is.

    `right`: columns to align right. `colours`: by (row, column).
    """
    lines = [[printable(cell) for cell in row] for row in rows]
    widths = [max([width(h), *(width(line[i]) for line in lines)]) for i, h in enumerate(header)]
    aligned_right = frozenset(right)
    terminal = sys.stdout.isatty()
    columns = shutil.get_terminal_size().columns if terminal else 0
    coloured = in_colour()

    def shown(cells: Sequence[str], row: int) -> str:
        out: list[str] = []
        used = 0
        for i, cell in enumerate(cells):
            last = i == len(cells) - 1
            room = columns - used if terminal and last else 0
            text = cell if room <= 0 or width(cell) <= room else _cut(cell, room)
            gap = " " * (widths[i] - width(text))
            colour = (colours or {}).get((row, i), "bold" if row < 0 else "")
            painted = paint(text, colour, on=coloured)
            out.append(gap + painted if i in aligned_right else painted + ("" if last else gap))
            used += widths[i] + 2
        return "  ".join(out).rstrip()

    say(shown(header, -1))
    for n, line in enumerate(lines):
        say(shown(line, n))


def _cut(text: str, room: int) -> str:
    out, used = "", 0
    for c in text:
        used += width(c)
        if used > max(room - 1, 1):
            break
        out += c
    return out + "…"
