"""Containers in a simulated world: what tasks ask for, what nodes allow, and hints that lie about it; and open files.

In some seeds only (`has_containers`, `has_files`), and drawn apart, so that all others tell what they told before.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import replace
from pathlib import PurePosixPath

from spinetta.model import ContainerSpec, Mount, TaskSpec
from tests.sim.faults import Plan

ALLOWED = ("network:host", "user:root", "mount:/data", "mount-rw:/data/out")
SOURCES = ("/data", "/data/out/x", "/database")  # the last begins like the first, and nobody allows it
FILES = (4096, 65536, 1 << 20)  # open files that tasks ask for, and that nodes give at most
RUNTIMES = ((), ("process",), ("process", "container"), ("process", "container"), ("container",))


def has_containers(seed: int) -> bool:
    """Whether a seed draws them: one of eleven, and none that a story or a fault of the code is named after."""
    return seed % 11 == 7


def has_files(seed: int) -> bool:
    """Whether a seed draws limits of open files: half of those with containers."""
    return has_containers(seed) and random.Random(f"files {seed}").random() < 0.5


def with_containers(plan: Plan) -> Plan:
    """The plan with containers, if its seed is one of those."""
    if not has_containers(plan.seed):
        return plan
    submits = tuple(
        (at_s, replace(spec, container=_asked(plan.seed, spec), open_files_max=_files(plan.seed, spec)))
        for at_s, spec in plan.submits
    )
    lying, bombing = random.Random(f"lies {plan.seed}"), random.Random(f"bombs {plan.seed}")
    contained = [spec.id for _, spec in submits if spec.container is not None]
    return replace(
        plan,
        machines=tuple(replace(m, allows=_allows(plan.seed, m.name)) for m in plan.machines),
        submits=submits,
        lying=frozenset(task for task in contained if lying.random() < 0.3),
        bombs=frozenset(contained[:1] if bombing.random() < 0.5 else ()),
    )


def _allows(seed: int, name: str) -> tuple[str, ...]:
    chance = random.Random(f"allows {seed} {name}")
    runtimes = chance.choice(RUNTIMES)
    more = [word for word in ALLOWED if chance.random() < 0.6]
    allows = (*runtimes, *more) if "container" in runtimes else runtimes
    if not allows or not has_files(seed):
        return allows  # of a version before there were any
    return (*allows, f"open-files:{random.Random(f'gives {seed} {name}').choice(FILES)}")


def _files(seed: int, spec: TaskSpec) -> int:
    return random.Random(f"opens {seed} {spec.id}").choice((0, *FILES)) if has_files(seed) else 0


def _asked(seed: int, spec: TaskSpec) -> ContainerSpec | None:
    chance = random.Random(f"container {seed} {spec.id}")
    if chance.random() < 0.4:
        return None
    sources = [source for source in SOURCES if chance.random() < 0.15]
    return ContainerSpec(
        "tools",
        network="host" if chance.random() < 0.3 else "none",
        user="root" if chance.random() < 0.2 else "",
        mounts=tuple(Mount(source, f"/in{i}", chance.random() < 0.4) for i, source in enumerate(sources)),
    )


def allowed(spec: TaskSpec, allows: Collection[str]) -> bool:
    """Whether a node that allows this may run a task, by its container and open files: said anew here, to judge what is
    claimed.
    """
    asked = spec.container
    most = [int(word.removeprefix("open-files:")) for word in allows if word.startswith("open-files:")]
    if spec.open_files_max and (not most or most[0] < spec.open_files_max):
        return False
    if asked is None:
        return not allows or "process" in allows
    mounts = all(_mountable(m, allows) for m in asked.mounts)
    network = asked.network == "none" or f"network:{asked.network}" in allows
    return "container" in allows and network and mounts and (asked.user != "root" or "user:root" in allows)


def _mountable(mount: Mount, allows: Collection[str]) -> bool:
    kinds = ("mount-rw:",) if mount.writable else ("mount:", "mount-rw:")
    tops = [word.removeprefix(kind) for word in allows for kind in kinds if word.startswith(kind)]
    return any(PurePosixPath(mount.source).is_relative_to(top) for top in tops)
