"""What tasks ask for beyond a plain process, and what nodes allow: for people and for programs. Part of `show`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from spinetta import openfiles, units
from spinetta.container import CONTAINER, PROCESS, refusals
from spinetta.model import ContainerSpec, Mount, NodeRecord, QueueHint, TaskSpec


def container_document(c: ContainerSpec) -> dict[str, Any]:
    """How a task is contained."""
    return {
        "image": c.image,
        "network": c.network,
        "writable": c.writable,
        "user": c.user,
        "capabilities": list(c.capabilities),
        "mounts": [{"source": m.source, "target": m.target, "writable": m.writable} for m in c.mounts],
        "tmp_bytes": c.tmp_bytes,
    }


def container_lines(s: TaskSpec) -> list[tuple[str, str]]:
    """Pairs of a heading and text; what is as usual says nothing."""
    pairs = [
        ("Open files", str(s.open_files_max) if s.open_files_max else ""),
        ("Scratch", f"kept for {units.format_duration(s.keep_scratch_s)}" if s.keep_scratch_s else ""),
    ]
    c = s.container
    if c is None:
        return pairs
    details = [
        f"network {c.network}" if c.network != "none" else "",
        "writable" if c.writable else "",
        f"user {c.user}" if c.user else "",
        f"{units.format_bytes(c.tmp_bytes)} /tmp" if c.tmp_bytes else "",
    ]
    return [
        ("Image", c.image),
        ("Container", ", ".join(d for d in details if d)),
        ("Capabilities", ", ".join(c.capabilities)),
        ("Mounts", ", ".join(_mount(m) for m in c.mounts)),
        *pairs,
    ]


def _mount(m: Mount) -> str:
    target = "" if m.target == m.source else f" at {m.target}"
    return f"{m.source}{target}{' (writable)' if m.writable else ''}"


def allowed_words(allows: Collection[str]) -> list[str]:
    """What a node's administrator allows; how it runs tasks is told elsewhere."""
    return [word for word in allows if word not in (PROCESS, CONTAINER) and openfiles.number_of(word) is None]


def images_cell(node: NodeRecord) -> str:
    """How many images a node has and is getting, e.g. ``3+1``; ``-`` where no containers run, empty when unknown."""
    if CONTAINER not in node.allows:
        return "-" if node.address else ""
    return f"{len(node.images)}+{len(node.images_coming)}" if node.images_coming else str(len(node.images))


def advice(hint: QueueHint, node: NodeRecord) -> str:
    """What an administrator of a node that does not allow a task would have to do about it; begins with ``;``."""
    refused = [word for word in refusals(hint.needs, node.allows) if openfiles.number_of(word) is None]
    allows = node.allows
    if CONTAINER in refused and CONTAINER in node.runtimes:
        return "; it is set to, and cannot: see the warnings of spinetta node show " + node.name
    if CONTAINER in refused:
        return "; its administrator could add container to its setting runtimes"
    if PROCESS in refused:
        return "; name one with --image"
    near = {word: nearest(word, allowed_words(allows)) for word in refused}
    has = ", ".join(sorted({word for word in near.values() if word}))
    words = ", ".join(f'"{word}"' for word in refused)
    return (f" (but {has})" if has else "") + f"; its administrator could add {words} to its setting allow"


def nearest(need: str, allows: Collection[str]) -> str:
    """What of `allows` comes nearest to granting what it does not; empty when nothing is of that kind, or near."""
    kind, _, what = need.partition(":")
    kinds = ("mount", "mount-rw") if kind in ("mount", "mount-rw") else (kind,)
    found = sorted(word for word in allows if word.partition(":")[0] in kinds)
    if not what.startswith("/"):
        return ", ".join(word for word in found if not word.partition(":")[2].startswith("/"))
    in_common = {word: _in_common(what, word.partition(":")[2]) for word in found}
    best = max(in_common.values(), default=0)
    return next((word for word, n in in_common.items() if n == best), "") if best else ""


def _in_common(one: str, other: str) -> int:
    """How many folders, from the root on, two paths share."""
    n = 0
    for a, b in zip(one.split("/")[1:], other.split("/")[1:], strict=False):
        if a != b:
            break
        n += 1
    return n
