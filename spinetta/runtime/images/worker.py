"""``python -m spinetta.runtime.images.worker``: one errand about an image, told on standard input as JSON.

On standard output a line of JSON for each step (``{"phase": …, "bytes": …, "total": …}``), at last
``{"result": …}`` or ``{"refused": {"message", "reason", "hint"}}``. It dies with the daemon that started it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spinetta.runtime.images import layout as layouts
from spinetta.runtime.images import tools, tree
from spinetta.runtime.images.limits import WORKER_MEMORY_BYTES, Limits, Refused, no_space

TELL_EVERY_S = 0.2

Told = Mapping[str, Any]


class Progress:
    """Tells how far an errand is, now and then."""

    def __init__(self) -> None:
        self.phase = ""
        self._bytes = 0
        self._total = 0
        self._told_s = 0.0

    def begin(self, phase: str, total: int = 0) -> None:
        """A new phase; `total`: bytes that it will work through, 0: unknown."""
        self.phase, self._bytes, self._total = phase, 0, total
        self._tell()

    def add(self, count: int) -> None:
        """So many bytes more."""
        self.at(self._bytes + count)

    def at(self, bytes_: int) -> None:
        """So many bytes in this phase."""
        self._bytes = bytes_
        if time.monotonic() - self._told_s >= TELL_EVERY_S:
            self._tell()

    def _tell(self) -> None:
        self._told_s = time.monotonic()
        say({"phase": self.phase, "bytes": self._bytes, "total": self._total})


def say(document: object) -> None:
    """A line to the daemon."""
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


# --- errands ---------------------------------------------------------------------------------------------------------


def guess(told: Told, _: Progress) -> object:
    """What is at a path."""
    return {"kind": layouts.guess(Path(told["path"]))}


def peek(told: Told, progress: Progress) -> object:
    """A registry's manifest: its digest, and the bytes of its layers (0: not known, there are several images)."""
    progress.begin("look")
    staging = Path(told["staging"])
    raw = tools.run([*_skopeo(told), "inspect", "--raw", *_tls(told, ""), told["source"]], staging)
    total = 0
    try:
        found = json.loads(raw)
        total = sum(int(layer["size"]) for layer in found.get("layers") or ())
    except (ValueError, TypeError, KeyError, AttributeError):
        pass  # skopeo will say what is wrong with it
    return {"digest": f"sha256:{hashlib.sha256(raw).hexdigest()}", "total": total}


def fetch(told: Told, progress: Progress) -> object:
    """Copy an image into an OCI layout of its own, with all digests checked; the digest of its manifest."""
    staging, limits = Path(told["staging"]), Limits(**told["limits"])
    layout = staging / "layout"
    progress.begin("fetch", int(told.get("total", 0)))
    if told["kind"] == "rootfs":
        _room(staging, limits, 0)
        made = layouts.make(Path(told["source"]), layout, progress.add, limits)
        return {"digest": made.digest}

    def come() -> int:
        size = tools.size_of(staging)
        progress.at(size)
        if size > limits.bytes_max:
            raise Refused(f"the image has more than {limits.bytes_max} bytes", reason="too-large")
        _room(staging, limits, 0)
        return size

    come()
    copy = [
        *_skopeo(told), "copy", "--quiet", "--remove-signatures", *_tls(told, "src-"),
        "--dest-oci-accept-uncompressed-layers", told["source"], f"oci:{layout.name}:{layouts.TAG}",
    ]  # fmt: skip
    tools.run(copy, staging, watch=come, limits=limits)
    return {"digest": layouts.read_manifest(layout).blob.digest}


def _skopeo(told: Told) -> list[str]:
    command = ["skopeo", "--policy", told["policy"], "--tmpdir", told["staging"]]
    if told.get("registries_conf"):
        command += ["--registries-conf", told["registries_conf"]]
    return command


def _tls(told: Told, of: str) -> list[str]:
    return [f"--{of}tls-verify=false"] if told.get("insecure") else []


def _room(directory: Path, limits: Limits, wanted: int) -> None:
    free = tools.free_bytes(directory)
    if free < wanted + limits.free_min_bytes:
        needs = f"{wanted >> 20} MiB" if wanted else "more"
        raise no_space(f"{needs}: {free >> 20} MiB are free, and {limits.free_min_bytes >> 20} MiB are left for others")


def unpack(told: Told, progress: Progress) -> object:
    """Unpack the layout in the staging directory to ``rootfs`` beside it; all that is to be remembered of it."""
    staging, limits = Path(told["staging"]), Limits(**told["limits"])
    layout, root, listing = staging / "layout", staging / "rootfs", staging / "files.gz"
    base, ids = int(told["base"]), int(told["ids"])
    manifest = layouts.read_manifest(layout)
    config = layouts.read_config(manifest, layout)
    progress.begin("check", 0)
    tally = layouts.check_layers(manifest, layout, limits, ids, progress.add)
    _room(staging, limits, tally.size_bytes)
    if tools.free_inodes(staging) < tally.files:
        raise no_space(f"{tally.files} files")
    layouts.made_plain(manifest, layout)
    progress.begin("unpack", tally.size_bytes)
    before = tools.free_bytes(staging)

    def unpacked() -> int:
        done = max(before - tools.free_bytes(staging), 0)  # others write, too: good enough to see it go on
        progress.at(done)
        _room(staging, limits, 0)
        return done

    # The map is for files as they are in the image. Without root there is one owner for all.
    owners = ["--uid-map", f"0:{base}:{ids}", "--gid-map", f"0:{base}:{ids}"] if told["shift"] else ["--rootless"]
    command = ["umoci", "--log=error", "raw", "unpack", *owners, "--image", f"{layout.name}:{layouts.TAG}", root.name]
    tools.run(command, staging, watch=unpacked, confine=staging, limits=limits)
    layouts.discard_blobs(layout)  # from here on its room is not needed any more
    tree.prepare(root, base, base) if told["shift"] else tree.prepare(root, os.getuid(), os.getgid())
    progress.begin("list", tally.size_bytes)
    measured, digest = tree.settle(root, limits, base if told["shift"] else 0, listing, progress.add)
    try:
        user, trouble = tree.user_ids(root, config["user"], ids), ""
    except Refused as e:  # a task may ask for another user
        user, trouble = None, e.message
    progress.begin("sync")
    tools.sync(staging)
    return {
        "config": config,
        "user": asdict(user) if user is not None else None,
        "user_trouble": trouble,
        "files": measured.files,
        "size_bytes": measured.disk_bytes,
        "left_out": measured.removed,
        "tree": digest,
    }


def verify(told: Told, progress: Progress) -> object:
    """How an unpacked image differs from the list made when it was unpacked."""
    progress.begin("verify", int(told.get("total", 0)))
    found = tree.compare(Path(told["root"]), int(told["base"]), Path(told["listing"]), told["tree"], progress.add)
    return {"differences": found}


ERRANDS: Mapping[str, Callable[[Told, Progress], object]] = {
    "guess": guess,
    "peek": peek,
    "fetch": fetch,
    "unpack": unpack,
    "verify": verify,
}


def main() -> int:
    """Do what standard input says."""
    told = json.loads(sys.stdin.buffer.readline())
    tools.die_with_parent(int(told["parent"]))
    os.umask(0o022)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > WORKER_MEMORY_BYTES:
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY_BYTES, hard))
    try:
        result = ERRANDS[told["errand"]](told, Progress())
    except Refused as e:
        say({"refused": {"message": e.message, "reason": e.reason, "hint": e.hint}})
    except OSError as e:
        refused = _trouble(e)
        say({"refused": {"message": refused.message, "reason": refused.reason, "hint": refused.hint}})
    else:
        say({"result": result})
    return 0


def _trouble(e: OSError) -> Refused:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space()
    if e.errno in (errno.ENOENT, errno.ENOTDIR):
        return Refused(
            f"there is no {e.filename}", reason="not-found", hint="paths are those of the node that is asked"
        )
    words = f"{e.filename}: {e.strerror}" if e.filename else str(e)
    return Refused(words, reason="unreadable", hint="see to the node's disk and the rights of its files")


if __name__ == "__main__":
    sys.exit(main())
