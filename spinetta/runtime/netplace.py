"""Where the networks of a node's containers are kept: a folder below /run, whose mounts the node's shim sees as well.

::

    /run/spinetta/
      lock                one node at a time chooses its subnet, or turns forwarding on or off
      XXXXXXXXXXXX/       of one node, by its data directory: a mount of itself that passes on what is mounted below
        subnet            of this node, as long as it has containers or a daemon, and the network namespace it is in
        forwarding.json   what the machine forwarded before
        commands.lock     held by each program that changes a network, for as long as it runs
        attempts/KEY/     what was made or is being made for an attempt: network.json, result.json, hosts, resolv.conf
        netns/KEY         its network namespace, mounted on a file
        sys/KEY/          a /sys that shows this namespace
        leases/           addresses in use, as the plugin keeps them

All of it ends with the machine, as network namespaces do; so it does not lie in the data directory, where it would
outlive a restart. The mount must be there before the shim starts: that has mounts of its own, and gets to see from then
on what is mounted below such a folder. Calls block shortly.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spinetta.runtime import generations
from spinetta.runtime.shim.remains import identity_of, living_pid, read_identity

RUN = Path("/run/spinetta")
_MS_BIND, _MS_SHARED = 4096, 1 << 20
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount: where, of what kind, and by what number it is shared (or follows others); empty: it is not."""

    path: str
    kind: str
    peers: str
    follows: str


@dataclass(frozen=True, slots=True)
class Place:
    """The folder of a node."""

    folder: Path

    @property
    def lock(self) -> Path:
        """Of all nodes of the machine."""
        return self.folder.parent / "lock"

    @property
    def attempts(self) -> Path:
        """A folder for each attempt that has, had or is getting a network."""
        return self.folder / "attempts"

    @property
    def leases(self) -> Path:
        """The plugin's."""
        return self.folder / "leases"

    @property
    def commands(self) -> Path:
        """Held while a network is changed."""
        return self.folder / "commands.lock"

    @property
    def subnet(self) -> Path:
        """The subnet that this node has taken."""
        return self.folder / "subnet"

    @property
    def forwarding(self) -> Path:
        """What the machine forwarded before."""
        return self.folder / "forwarding.json"

    def of(self, key: str) -> Path:
        """What is known of an attempt's network."""
        return self.attempts / key

    def netns(self, key: str) -> Path:
        """Its namespace."""
        return self.folder / "netns" / key

    def sys(self, key: str) -> Path:
        """Its view of /sys."""
        return self.folder / "sys" / key

    def names(self) -> list[str]:
        """All attempts of which there is anything."""
        found: set[str] = set()
        for folder in (self.attempts, self.folder / "netns", self.folder / "sys"):
            if folder.is_dir():
                found |= {path.name for path in folder.iterdir()}
        found |= {_holder(path) for path in _leases(self)}
        return sorted(key for key in found if key and "/" not in key and not key.startswith("."))


def place_of(data_dir: Path, run: Path = RUN) -> Place:
    """The place of the node on a data directory."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(data_dir))).hexdigest()[:12]
    return Place(run / name)


def make(place: Place) -> None:
    """Make the folder, and have its mounts passed on. May be repeated. OSError: that cannot be had."""
    place.folder.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    # Passed through by containers' root: hosts, resolv.conf and /sys are mounted out of it.
    for path in (place.folder, place.attempts, place.folder / "netns", place.folder / "sys"):
        path.mkdir(mode=0o711, exist_ok=True)
    place.leases.mkdir(mode=0o700, exist_ok=True)
    here = _at(place.folder)
    if here is None:
        _mount(place.folder, place.folder, _MS_BIND)
    if here is None or not here.peers:
        _mount(None, place.folder, _MS_SHARED)


def passes_on_to(place: Place, pid: int) -> bool:
    """Whether a process sees what is mounted below the folder from now on."""
    here, there = _at(place.folder), _at(place.folder, pid)
    return here is not None and there is not None and here.peers != "" and here.peers in (there.peers, there.follows)


def is_shared(place: Place) -> bool:
    """Whether anybody can see what is mounted below the folder: this may be where nothing can be mounted."""
    here = _at(place.folder)
    return here is not None and here.peers != ""


def is_namespace(path: Path) -> bool:
    """Whether a network namespace is mounted on a file."""
    here = _at(path)
    return here is not None and here.kind == "nsfs"


def unmount(path: Path) -> None:
    """Unmount whatever is mounted there, once or several times. OSError: it cannot be."""
    for _ in range(8):
        if _libc.umount2(os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
            number = ctypes.get_errno()
            if number in (22, 2):  # nothing is mounted there, or nothing is there
                return
            raise OSError(number, os.strerror(number), str(path))


def drop(place: Place, key: str) -> None:
    """Unmount and remove all files of an attempt, and give its address back. May be repeated."""
    unmount(place.sys(key))
    if place.sys(key).is_dir():
        place.sys(key).rmdir()
    unmount(place.netns(key))
    place.netns(key).unlink(missing_ok=True)
    for lease in _leases(place):
        if _holder(lease) == key:
            lease.unlink(missing_ok=True)
    if place.of(key).is_dir():
        shutil.rmtree(place.of(key))


def _leases(place: Place) -> list[Path]:
    """A file for each address in use, as the plugin keeps them."""
    return list(place.leases.glob("*/*.*.*.*"))


def _holder(lease: Path) -> str:
    """The attempt that has an address; empty: it cannot be told."""
    try:
        return lease.read_text().splitlines()[0].strip()
    except (OSError, IndexError, ValueError):
        return ""


def remove(place: Place) -> None:
    """Remove the folder, if nothing is in use. OSError: something is mounted below."""
    if not place.folder.is_dir():
        return
    unmount(place.folder)
    below = [m.path for m in _mounts() if m.path.startswith(f"{place.folder}/")]
    if below:
        raise OSError(16, "still mounted", below[0])
    shutil.rmtree(place.folder)


def living_shims(state_dir: Path) -> list[int]:
    """Pids of shims that live with this state directory, or with one of a later generation. OSError: not known."""
    return [pid for folder in generations.folders(state_dir) if (pid := living_pid(identity_of(folder)))]


def shim_pid(state_dir: Path) -> int:
    """The pid of the shim of a state directory; 0: none lives, or it cannot be seen."""
    return living_pid(read_identity(state_dir))


def _mounts(pid: int | str = "self") -> Iterator[Mounted]:
    try:
        text = Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape")
    except OSError:
        return
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        words = before.split()
        if len(words) < 6 or not after:
            continue
        told = dict(word.partition(":")[::2] for word in words[6:])
        yield Mounted(words[4], after.split()[0], told.get("shared", ""), told.get("master", ""))


def _at(path: Path, pid: int | str = "self") -> Mounted | None:
    """The topmost mount at a path."""
    found = None
    for mounted in _mounts(pid):
        if mounted.path == str(path):
            found = mounted
    return found


def _mount(source: Path | None, target: Path, flags: int) -> None:
    origin = None if source is None else os.fsencode(source)
    if _libc.mount(origin, os.fsencode(target), None, ctypes.c_ulong(flags), None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))
