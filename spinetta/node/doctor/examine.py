"""All checks in order, each with a limit, and what they share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from spinetta.checkup import Finding, Level
from spinetta.config import Settings
from spinetta.container import CONTAINER, PROCESS
from spinetta.node.doctor import disk, host, network, ports, programs, standing
from spinetta.runtime.detect import ContainerSupport, container_support

CHECK_S = 90.0  # longer than any of them waits by itself
CLOCK_S = 1.0  # the least to watch the clocks for

Check = Callable[["Patient"], Awaitable[list[Finding]]]
Progress = Callable[[str], None]


@dataclass
class Patient:
    """The machine, and the settings of the node that is on it or is to be.

    Attributes:
        begun: the clocks when it began.
        measure_s: how long the disk's speed is measured.
    """

    settings: Settings
    measure_s: float = disk.MEASURE_S
    begun: host.Clocks = field(default_factory=host.clocks)
    _containers: asyncio.Future[ContainerSupport] | None = None

    @property
    def data_dir(self) -> Path:
        """Of the node."""
        return Path(self.settings.data_dir)

    async def containers(self) -> ContainerSupport:
        """What containers can do here; found out once."""
        if self._containers is None:
            s = self.settings
            found = container_support(self.data_dir, program=s.container_program, first_id=s.container_ids)
            self._containers = asyncio.ensure_future(found)
        return await self._containers


def _about_containers(name: str) -> Check:
    async def check(patient: Patient) -> list[Finding]:
        found = [f for f in (await patient.containers()).findings if f.check == name]
        return [_weighed(f, patient.settings.runtimes) for f in found]

    return check


def _weighed(finding: Finding, runtimes: Collection[str]) -> Finding:
    """A node that is to run containers only cannot do without; one that is not to run any can."""
    if finding.check == "cgroups" or finding.level is not Level.WARNING:
        return finding
    if CONTAINER not in runtimes:
        return replace(finding, level=Level.NOTE)
    return (
        replace(finding, level=Level.PROBLEM) if PROCESS not in runtimes and "not taken" in finding.weakens else finding
    )


def _alone(check: Callable[[], Awaitable[list[Finding]]]) -> Check:
    """A check that needs to know nothing."""

    async def run(_: Patient) -> list[Finding]:
        return await check()

    return run


async def _clock(patient: Patient) -> list[Finding]:
    rest_s = CLOCK_S - (time.monotonic() - patient.begun.steady_s)
    await asyncio.sleep(max(rest_s, 0.0))
    return host.clock(patient.begun)


# name → (what it looks at, the check itself), in the order of the table. Those of one thing stand together.
CHECKS: Mapping[str, tuple[str, Check]] = {
    "python": ("the Python that this runs on", _alone(programs.python)),
    "kernel": ("Linux", _alone(host.kernel)),
    "etcd": ("etcd's program and its version", lambda p: programs.etcd(p.settings)),
    "runtime": ("runc or crun, by running a container", _about_containers("runtime")),
    "init": ("process 1 of containers", _about_containers("init")),
    "namespaces": ("user, pid and mount namespaces, by making some", _about_containers("namespaces")),
    "ids": ("users and groups for containers", _about_containers("ids")),
    "overlay": ("overlays, by mounting some", _about_containers("overlay")),
    "cgroups": ("limits for tasks, by making groups", _about_containers("cgroups")),
    "network": ("the network bridge of containers, by making one", lambda p: network.network(p.settings)),
    "images": ("skopeo and umoci, which bring images in", lambda p: programs.images(p.settings)),
    "data-dir": ("rights on the data directory, by writing there", lambda p: disk.data_dir(p.data_dir)),
    "disk": ("room on its disk", lambda p: disk.space(p.data_dir)),
    "disk-speed": (
        "how long a small write takes to last, by making some",
        lambda p: disk.speed(p.data_dir, p.measure_s, voter=p.settings.candidate),
    ),
    "memory": ("memory, less what limits take away", _alone(host.memory)),
    "swap": ("swap", _alone(host.swap)),
    "files": ("open files that a process may have", _alone(host.files)),
    "clock": ("steps and synchronisation of the clock", _clock),
    "ports": ("addresses to listen on, by listening", lambda p: ports.ports(p.settings)),
    "node": ("the node on the data directory, and its etcd, by asking them", lambda p: standing.node(p.settings)),
}


async def examine(patient: Patient, only: Collection[str], progress: Progress) -> AsyncGenerator[Finding, None]:
    """Findings as they come. `progress` is told what is looked at next; `only` empty: all checks."""
    for name, (what, check) in CHECKS.items():
        if only and name not in only:
            continue
        progress(what)
        try:
            async with asyncio.timeout(CHECK_S):
                found = await check(patient)
        except TimeoutError:
            found = [
                Finding(
                    name, Level.WARNING, f"this check did not end within {CHECK_S:g} s", "nothing is known of it",
                    f"spinetta doctor --only {name}",
                )
            ]  # fmt: skip
        for finding in found:
            yield finding
