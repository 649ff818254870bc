"""Containers in a simulated world: what tasks ask for, what nodes allow, and hints that lie about it.

In some seeds only (`has_containers`), and drawn apart, so that all others tell what they told before.
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
RUNTIMES = ((), ("process",), ("process", "container"), ("process", "container"), ("container",))


def has_containers(seed: int) -> bool:
    """Whether a seed draws them: one of eleven, and none that a story or a fault of the code is named after."""
    return seed % 11 == 7


def with_containers(plan: Plan) -> Plan:
    """The plan with containers, if its seed is one of those."""
    if not has_containers(plan.seed):
        return plan
    submits = tuple((at_s, replace(spec, container=_asked(plan.seed, spec))) for at_s, spec in plan.submits)
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
    return (*runtimes, *more) if "container" in runtimes else runtimes


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


def allowed(asked: ContainerSpec | None, allows: Collection[str]) -> bool:
    """Whether a node that allows this may run a task with this container: said anew here, to judge what is claimed."""
    if asked is None:
        return not allows or "process" in allows
    mounts = all(_mountable(m, allows) for m in asked.mounts)
    network = asked.network == "none" or f"network:{asked.network}" in allows
    return "container" in allows and network and mounts and (asked.user != "root" or "user:root" in allows)


def _mountable(mount: Mount, allows: Collection[str]) -> bool:
    kinds = ("mount-rw:",) if mount.writable else ("mount:", "mount-rw:")
    tops = [word.removeprefix(kind) for word in allows for kind in kinds if word.startswith(kind)]
    return any(PurePosixPath(mount.source).is_relative_to(top) for top in tops)
