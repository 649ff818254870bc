"""Where this process may make control groups, and with which controllers. Tried by making some, which are removed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spinetta import ociprograms
from spinetta.runtime.shim import hierarchy
from spinetta.runtime.shim.hierarchy import LEAF, WANTED, Hierarchy

PREFIX = "spinetta-trial-"


@dataclass(frozen=True, slots=True)
class Groups:
    """What was found.

    Attributes:
        mode: v1, v2, hybrid or none.
        controllers: that our groups can have, sorted.
        problems: what keeps us from others, in words.
        trial_name: of the groups that a trial makes.
        trial_path: what to tell a container runtime of them: relative with version 1, since each hierarchy may have us
            in another group, else absolute; empty when we can make none.
        folders: where it makes them.
        crowded: of version 2, made in a group that holds processes and can pass nothing on. crun then makes that group
            a threaded one, which lasts, and in which there are no others.
    """

    mode: str
    controllers: tuple[str, ...]
    problems: tuple[str, ...]
    trial_name: str
    trial_path: str
    folders: tuple[Path, ...] = ()
    crowded: bool = False

    def remove_trials(self) -> bool:
        """Remove what a trial has left; True while something is there that cannot go yet. May be called again."""
        left = False
        for folder in self.folders:
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                left = True
        return left


def look_at_groups(proc: Path = Path("/proc/self")) -> Groups:
    """Find out. Makes and removes a group in each hierarchy; takes a millisecond.

    In a group of version 2 that was handed to us we move into a leaf of it, with all that is in there, as a node does:
    groups with limits can be made beside it only.
    """
    name = f"{PREFIX}{os.getpid()}-{os.urandom(4).hex()}"
    try:
        mountinfo, cgroup = (proc / "mountinfo").read_text(), (proc / "cgroup").read_text()
    except OSError as error:
        return Groups(ociprograms.NONE, (), (f"{proc} cannot be read: {error.strerror}",), name, "")
    mode = ociprograms.cgroup_mode(mountinfo)
    of_use, problems = hierarchy.detect(mountinfo, cgroup)
    everywhere = hierarchy.everywhere(mountinfo, cgroup)
    if mode == ociprograms.V2:
        return _unified(mode, name, of_use, problems)
    refused = {tree.mount: why for tree in everywhere if tree.version == 1 and (why := _refused(tree.own, name))}
    controllers: set[str] = set()
    for tree in of_use:
        if tree.version == 1:
            why = refused.get(tree.mount, "")
            controllers |= frozenset() if why else tree.controllers
            problems += [f"no groups can be made in {tree.own}: {why}"] if why else []
    path = name if everywhere and not refused and mode != ociprograms.NONE else ""
    folders = tuple(tree.own / name for tree in everywhere)
    return Groups(mode, tuple(sorted(controllers)), tuple(problems), name, path, folders)


def _unified(mode: str, name: str, trees: Sequence[Hierarchy], problems: list[str]) -> Groups:
    if not trees:
        return Groups(mode, (), tuple(problems), name, "")
    tree = trees[0]
    own = tree.own.parent if tree.own.name == LEAF else tree.own
    base, controllers, why_not = _passing(tree, own)
    if refused := _refused(base, name):
        problems = [*problems, *why_not, f"no groups can be made in {base}: {refused}"]
        return Groups(mode, (), tuple(problems), name, "")
    path = "/" + str((base / name).relative_to(tree.mount))
    crowded = not controllers and not _topmost(base) and bool(_words(base / "cgroup.procs"))
    return Groups(mode, tuple(sorted(controllers)), (*problems, *why_not), name, path, (base / name,), crowded)


def _passing(tree: Hierarchy, own: Path) -> tuple[Path, frozenset[str], list[str]]:
    """The group from ours upwards that can pass on controllers, as for `base_v2`; only one handed to us is changed."""
    offered = frozenset(WANTED) & _words(tree.mount / "cgroup.controllers")
    why_not: dict[str, None] = {}
    for all_of_them in (True, False):
        for group in (own, *own.parents):
            here = offered & _words(group / "cgroup.controllers")
            control = group / "cgroup.subtree_control"
            if here == offered or (here and not all_of_them):
                lacking = [f"{group} has no {', '.join(sorted(offered - here))}"] if here != offered else []
                if not os.access(control, os.W_OK):
                    why = "it belongs to another user"
                elif here <= _words(control) or not _words(group / "cgroup.procs") or _topmost(group):
                    return group, here, [*why_not, *lacking] if lacking else []
                elif group == own and hierarchy.delegated(group, tree.mount):
                    return hierarchy.base_v2(tree)
                else:
                    why = "it holds processes and is not delegated"
                why_not[f"{group} cannot pass on its controllers: {why}"] = None
            if group == tree.mount:
                break
    return own, offered & _words(own / "cgroup.subtree_control"), list(why_not)


def _topmost(group: Path) -> bool:
    """Whether it is the kernel's own: the one without a type, which may hold processes and pass on controllers, too."""
    return not (group / "cgroup.type").exists()


def _refused(group: Path, name: str) -> str:
    """Why no group can be made in one; empty when it can."""
    try:
        (group / name).mkdir()
    except OSError as error:
        return error.strerror or "refused"
    with contextlib.suppress(OSError):
        (group / name).rmdir()
    return ""


def _words(path: Path) -> frozenset[str]:
    with contextlib.suppress(OSError):
        return frozenset(path.read_text().split())
    return frozenset()
