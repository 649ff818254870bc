"""What the records of a shim that does not answer say, read without changing anything."""

from __future__ import annotations

from pathlib import Path

from spinetta.runtime.protocol import Held
from spinetta.runtime.shim.records import RECORD_BYTES_MAX, beside, is_key, unseal
from spinetta.runtime.shim.wire import Message


def attempts(folder: Path) -> list[Held]:
    """All attempts of a state directory, by key, as if they ran: unknown is not ended. OSError: it cannot be read."""
    return [_attempt(path, key) for key, path in sorted(_records(folder / "attempts").items())]


def services(folder: Path) -> tuple[str, ...]:
    """Names of services that may run there. OSError: it cannot be read."""
    return tuple(sorted(_records(folder / "services")))


def _records(folder: Path) -> dict[str, Path]:
    """Records by name; one that was just written beside another counts instead of it."""
    try:
        paths = sorted(folder.iterdir(), reverse=True)  # those that begin with a dot come last
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found = {}
    for path in paths:
        name = path.name.removeprefix(".").removesuffix(".new") if path.name.startswith(".") else path.name
        if is_key(name) and path in (folder / name, beside(folder / name)):
            found[name] = path
    return found


def _attempt(path: Path, key: str) -> Held:
    token, incarnation, started_ms = (
        (record := _read(path)).get("token"),
        record.get("incarnation"),
        record.get("started_ms"),
    )
    return Held(
        key,
        token if isinstance(token, int) else 0,
        incarnation if isinstance(incarnation, str) else "",
        started_ms if isinstance(started_ms, int) else 0,
        None,
    )


def _read(path: Path) -> Message:
    """Empty when it is damaged, or has just been replaced or removed."""
    try:
        with path.open("rb") as file:
            return unseal(file.read(RECORD_BYTES_MAX + 1))
    except (FileNotFoundError, ValueError):
        return {}
