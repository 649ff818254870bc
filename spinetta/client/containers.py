"""What people write of a task's container, as a `ContainerSpec`. Part of `specs`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spinetta import names, units
from spinetta.container import ContainerSpec
from spinetta.container import Mount as Mount
from spinetta.errors import UserError

Mounts = str | Mount | Sequence[str | Mount | Mapping[str, Any]]
"""``"SOURCE[:TARGET][:rw]"`` (several with commas between), a `Mount`, a table with the names of its parts, or a list
of these."""

_FORM = "SOURCE[:TARGET][:rw], e.g. /data/genomes or /srv/out:/results:rw"


def container_spec(
    image: str,
    *,
    network: str,
    writable: bool,
    user: str,
    capabilities: Sequence[str],
    mounts: Mounts,
    tmp: int | str,
) -> ContainerSpec | None:
    """The container asked for; None for a plain process. Whether it can be had is checked by `check_container`.

    Raises:
        UserError: something is asked for that only a container has, and no image; or it cannot be read.
    """
    found_mounts = read_mounts(mounts)
    tmp_bytes = units.parse_bytes(tmp, "tmp")
    if not image:
        needing = {
            "network": network,
            "writable": writable,
            "user": user,
            "capabilities": capabilities,
            "mounts": found_mounts,
            "tmp": tmp_bytes,
        }
        for key, value in needing.items():
            if value:
                raise UserError(
                    f"{key} is for tasks in containers, and no image is named",
                    field=key,
                    hint="name one (--image), or leave it away",
                )
        return None
    return ContainerSpec(
        image=image,
        network=network or "none",
        writable=writable,
        user=user,
        capabilities=tuple(sorted({_capability(name) for name in capabilities})),
        mounts=found_mounts,
        tmp_bytes=tmp_bytes,
    )


def words(given: Any) -> Any:
    """What may be text with commas or a list, with all other sequences as lists: text is a sequence of text, too."""
    return given if isinstance(given, str | list) or not isinstance(given, Iterable) else list(given)


def read_mounts(given: Mounts) -> tuple[Mount, ...]:
    """Mounts as people write them, by target.

    Raises:
        UserError: one is written in no such way.
    """
    if isinstance(given, str):
        items: list[Any] = [item.strip() for item in given.split(",") if item.strip()]
    else:
        items = [given] if isinstance(given, Mount | Mapping) else words(given)
    if not isinstance(items, list):
        raise UserError(f"mounts must be a list, not {type(items).__name__}", field="mounts", hint=_FORM)
    return tuple(sorted((_mount(item, f"mounts[{i}]") for i, item in enumerate(items)), key=lambda m: m.target))


def _mount(given: Any, field: str) -> Mount:
    if isinstance(given, Mount):
        return given
    if isinstance(given, Mapping):
        return _mount_of_table(given, field)
    if not isinstance(given, str):
        raise UserError("a mount must be text or a table", field=field, hint=_FORM)
    parts = given.split(":")
    mode = parts.pop() if len(parts) > 1 and parts[-1] in ("ro", "rw") else "ro"
    if len(parts) > 2 or not all(parts):
        raise UserError(f"not a mount: {names.quoted(given)}", field=field, hint=_FORM)
    source, target = _plain(parts[0]), _plain(parts[-1])
    return Mount(source, target, mode == "rw")


def _mount_of_table(table: Mapping[str, Any], field: str) -> Mount:
    parts = ("source", "target", "writable")
    for key in table:
        if key not in parts:
            raise UserError(
                f"a mount has no {names.quoted(str(key))}", field=field, hint=names.did_you_mean(str(key), parts)
            )
    source = table.get("source")
    target, writable = table.get("target", source), table.get("writable", False)
    if not isinstance(source, str) or not isinstance(target, str) or not isinstance(writable, bool):
        raise UserError(
            "a mount is a table of a source, a target and whether it is writable",
            field=field,
            hint="{source: /data, target: /data, writable: false}; source is required",
        )
    return Mount(_plain(source), _plain(target), writable)


def _plain(path: str) -> str:
    """Without the slash that completion leaves at the end of a directory."""
    return path.rstrip("/") or path


def _capability(name: str) -> str:
    return name.upper().removeprefix("CAP_")
