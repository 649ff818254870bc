"""Containers on this node: what the machine can do, what its administrator allows, and the images that are here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from spinetta import ociconfig, ocirequest
from spinetta.config import Settings
from spinetta.container import BRIDGE, CONTAINER, PROCESS, ROOT
from spinetta.errors import RuntimeUnavailable, UserError
from spinetta.node.networks import open_network
from spinetta.ociprograms import ID_COUNT
from spinetta.runtime.detect import ContainerSupport, container_support
from spinetta.runtime.images.store import ImageStore, StoreSettings
from spinetta.runtime.protocol import Runtime, ShimRuntime
from spinetta.runtime.runc import TASK_USER, RuncRuntime, Site
from spinetta.runtime.shim.container import CAPABILITY

log = logging.getLogger("spinetta.node")


@dataclass(frozen=True, slots=True)
class Containers:
    """How tasks run here.

    Attributes:
        runtime: for all of them.
        images: None where no containers run.
        allows: for the node's record.
        warnings: why there are none, or what is weaker than it should be.
    """

    runtime: Runtime
    images: ImageStore | None
    allows: tuple[str, ...]
    warnings: tuple[str, ...]

    def described(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The digests that are here and that are coming, as they belong into the node's record."""
        if self.images is None:
            return (), ()
        return self.images.digests(), self.images.coming()


@asynccontextmanager
async def open_containers(settings: Settings, data_dir: Path, shim: ShimRuntime) -> AsyncIterator[Containers]:
    """Find out what this machine can do, and open the store of images.

    What cannot be had is told as a warning, and by what the node allows: it then runs plain processes only.

    Raises:
        UserError: plain processes are not wanted here, and containers cannot be had.
    """
    processes = (PROCESS,) if PROCESS in settings.runtimes else ()
    if CONTAINER not in settings.runtimes:
        yield Containers(shim, None, processes, ())
        return
    support = await container_support(data_dir, program=settings.container_program, first_id=settings.container_ids)
    if trouble := _why_none(support, shim):
        if not processes:
            raise UserError(
                f"this machine runs no containers: {trouble}",
                field="node.runtimes",
                hint="see: spinetta doctor; or let tasks run as plain processes as well: --runtimes process,container",
                reason="no-containers",
            )
        log.warning("no containers here: %s", trouble)
        yield Containers(shim, None, processes, (f"no containers here: {trouble}",))
        return
    base = support.first_uid if support.ids == "range" else None
    async with contextlib.AsyncExitStack() as stack:
        try:
            images = await stack.enter_async_context(
                ImageStore.open(data_dir / "images", store_settings(settings, base))
            )
        except UserError as e:
            if not processes:
                raise
            log.warning("no containers here: %s", e)
            yield Containers(shim, None, processes, (f"no containers here: {e}",))
            return
        with contextlib.suppress(RuntimeUnavailable):  # then all that was in use stays so until it is forgotten
            images.keep_only(held.key for held in await shim.held())
        hosts_path = await asyncio.to_thread(_write_hosts, data_dir, settings.name)
        rules = ocirequest.hardening(lacks_fixes=support.lacks_fixes, rootless=support.rootless)
        network, no_network = await stack.enter_async_context(open_network(settings, data_dir, shim))
        refused = {BRIDGE: no_network, ROOT: "" if rules.root_inside else "not with this version of runc"}
        withheld = {word: why for word, why in refused.items() if why and word in settings.allow}
        allowed = tuple(word for word in settings.allow if word not in withheld)
        site = site_of(support, settings, rules, hosts_path, frozenset((*processes, CONTAINER, *allowed)))
        yield Containers(
            RuncRuntime(shim, images, site, network),
            images,
            (*processes, CONTAINER, *allowed),
            (
                *support.warnings,
                *(network.warnings if network is not None else ()),
                *(f"{word} is in `allow`, but: {why}; see spinetta doctor" for word, why in withheld.items()),
            ),
        )


def store_settings(settings: Settings, base: int | None) -> StoreSettings:
    """Of the store of images; `base`: the first of the containers' ids."""
    return StoreSettings(
        keep_bytes=settings.image_keep_bytes,
        keep_s=settings.image_keep_s,
        registries_conf=settings.registries_conf,
        unpacks=settings.image_unpacks,
        base=base,
    )


def site_of(
    support: ContainerSupport,
    settings: Settings,
    rules: ocirequest.Hardening,
    hosts_path: str,
    allows: frozenset[str],
) -> Site:
    """What containers get here."""
    if support.ids == "range":
        uids = ocirequest.IdRange(0, support.first_uid, ID_COUNT)
        gids = ocirequest.IdRange(0, support.first_gid, ID_COUNT)
    else:
        uids, gids = ocirequest.IdRange(0, os.geteuid(), 1), ocirequest.IdRange(0, os.getegid(), 1)
    return Site(
        program=support.program,
        init=support.init,
        host=ocirequest.Host(
            arch=os.uname().machine,
            cgroup_namespace=Path("/proc/self/ns/cgroup").exists(),
            recursive_read_only=_kernel() >= (5, 12),
            seccomp=Path("/proc/sys/kernel/seccomp").is_dir(),
            rootless=support.rootless,
        ),
        rules=rules,
        uids=(uids,),
        gids=(gids,),
        overlay=support.overlay,
        allows=allows,
        devices=dict(settings.devices),
        tmp_bytes=settings.tmp_bytes,
        hostname=settings.name,
        hosts_path=hosts_path,
        task_user=TASK_USER if support.ids == "range" else (0, 0),
    )


def _write_hosts(data_dir: Path, hostname: str) -> str:
    """A container knows itself by name, network or not: many programs look that up when they start."""
    path = data_dir / "hosts"
    new = path.with_suffix(".new")
    try:
        new.write_text(ociconfig.hosts_text(hostname))
        new.chmod(0o644)
        new.replace(path)
    except OSError as error:
        log.warning("containers cannot look up their own name: %s: %s", path, error.strerror)
        return ""
    return str(path)


def _kernel() -> tuple[int, int]:
    numbers = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def _why_none(support: ContainerSupport, shim: ShimRuntime) -> str:
    if not support.works:
        return "; ".join(support.warnings) or "runc does not work here, see spinetta doctor"
    if CAPABILITY not in shim.capabilities():
        return next((w for w in shim.warnings() if w.startswith(CAPABILITY)), "the node's shim is of an older version")
    return ""
