"""Task files: many tasks as a YAML or JSON list or as JSON lines, each refusal with entry and line."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinetta.cli.files import read_limited
from spinetta.client.specs import spec_from_entry
from spinetta.errors import UserError
from spinetta.model import TaskSpec

FORMATS = ("yaml", "json", "jsonl")
FILE_BYTES_MAX = 256 << 20  # read whole into memory
ENTRIES_MAX = 200_000  # a few hundred requests; more should be split by whoever makes the file
_BY_ENDING = {".yaml": "yaml", ".yml": "yaml", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry as it was read, and the line it begins at; 0 when that is not known."""

    value: object
    line: int = 0


def read_specs(path: str, format_: str | None, defaults: Mapping[str, Any]) -> list[TaskSpec]:
    """The tasks of a file (``-``: standard input).

    Args:
        path: the file.
        format_: one of `FORMATS`; None: by the file's ending.
        defaults: for what entries do not say, by the same keys.

    Raises:
        UserError: names file, entry, line and key.
    """
    chosen = format_ or _BY_ENDING.get(Path(path).suffix.lower())
    if chosen is None:
        what = "standard input" if path == "-" else f"a file called {Path(path).name}"
        raise UserError(
            f"the format of {what} is not known",
            field="file",
            hint=f"--format {', '.join(FORMATS[:-1])} or {FORMATS[-1]}",
        )
    name = "standard input" if path == "-" else path
    text = _read(path, name)
    entries = {"yaml": _yaml, "json": _json, "jsonl": _json_lines}[chosen](text, name)
    specs: list[TaskSpec] = []
    for n, entry in enumerate(entries):
        if n >= ENTRIES_MAX:
            raise UserError(
                f"{name}: more than {ENTRIES_MAX} entries", field="file", hint="split the file", reason="too-large"
            )
        specs.append(_spec(entry, n, name, defaults))
    if not specs:
        raise UserError(f"{name}: there are no tasks", field="file", hint="a list with one entry for each task")
    _check_ids(specs, name)
    return specs


def _spec(entry: Entry, n: int, name: str, defaults: Mapping[str, Any]) -> TaskSpec:
    try:
        return spec_from_entry(entry.value, defaults)
    except UserError as e:
        place = f"{name}, entry {n + 1}" + (f" (line {entry.line})" if entry.line else "")
        part = f".{e.field}" if e.field else ""
        raise UserError(f"{place}: {e.message}", field=f"tasks[{n}]{part}", hint=e.hint, reason=e.reason) from e


def _check_ids(specs: list[TaskSpec], name: str) -> None:
    seen: dict[str, int] = {}
    for n, spec in enumerate(specs):
        first = seen.setdefault(spec.id, n)
        if first != n:
            raise UserError(
                f"{name}, entry {n + 1}: the id of entry {first + 1} again",
                field=f"tasks[{n}].id",
                hint="give each task its own id, or none",
            )


def _read(path: str, name: str) -> str:
    data = read_limited(path, FILE_BYTES_MAX)
    if len(data) > FILE_BYTES_MAX:
        raise UserError(f"{name} is larger than 256 MiB", field="file", hint="split it", reason="too-large")
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise UserError(f"{name} is not UTF-8 (line {line})", field="file", hint="save it as UTF-8") from None


# --- YAML --------------------------------------------------------------------------------------------------------


def _yaml(text: str, name: str) -> Iterator[Entry]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        top = loader.get_single_node()
        if top is None:
            return
        if not isinstance(top, yaml.SequenceNode):
            raise UserError(f"{name} must be a list of tasks", field="file", hint="begin each task with '- command: …'")
        for node in top.value:
            _check_keys(node, name)
            yield Entry(loader.construct_object(node, deep=True), node.start_mark.line + 1)
    except yaml.YAMLError as e:
        raise UserError(f"{name} is not YAML: {_yaml_problem(e)}", field="file", hint="mend that line") from e
    except (RecursionError, ValueError) as e:  # nested beyond sense; a date such as 2024-13-45
        raise UserError(f"{name} cannot be read as YAML: {e}", field="file", hint="put text in quotes") from e
    finally:
        loader.dispose()


def _yaml_problem(error: Any) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "it cannot be read"
    return f"{problem} (line {mark.line + 1})" if mark is not None else str(problem)


def _check_keys(node: Any, name: str) -> None:
    """Refuse a key given twice, of which YAML would silently keep the last."""
    import yaml

    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[Hashable] = set()
    for key, value in node.value:
        if key.value in seen if isinstance(key.value, str) else False:
            raise UserError(
                f"{name}: key {key.value!r} is given twice (line {key.start_mark.line + 1})",
                field="file",
                hint="give it once",
            )
        if isinstance(key.value, str):
            seen.add(key.value)
        _check_keys(value, name)


# --- JSON --------------------------------------------------------------------------------------------------------


class _Twice(ValueError):
    """A key is given twice in one object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Twice(f"key {key!r} is given twice")
        found[key] = value
    return found


def _load(text: str, fail: Callable[[str, int], UserError]) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as e:
        raise fail(e.msg, e.lineno) from e
    except _Twice as e:
        raise fail(str(e), 0) from e
    except (RecursionError, ValueError) as e:
        raise fail(str(e), 0) from e


def _json(text: str, name: str) -> Iterator[Entry]:
    def fail(message: str, line: int) -> UserError:
        place = f" (line {line})" if line else ""
        return UserError(f"{name} is not JSON: {message}{place}", field="file", hint="a list: [{…}, {…}]")

    if not text.strip():
        return
    found = _load(text, fail)
    if not isinstance(found, list):
        raise UserError(
            f"{name} must be a list of tasks", field="file", hint="[{…}, {…}]; for lines use --format jsonl"
        )
    yield from map(Entry, found)


def _json_lines(text: str, name: str) -> Iterator[Entry]:
    # Not splitlines(): it also splits at characters that may stand inside a JSON text, such as U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue

        def fail(message: str, _: int, number: int = number) -> UserError:
            return UserError(
                f"{name}, line {number}: not JSON: {message}", field="file", hint="one object on each line"
            )

        yield Entry(_load(line, fail), number)
