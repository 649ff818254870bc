"""The node's part in containers' networks: the folder before the shim starts, the network itself, the end of both."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from spinetta.config import Settings
from spinetta.container import BRIDGE, CONTAINER
from spinetta.errors import RuntimeUnavailable, UserError
from spinetta.node.lock import DirectoryLock
from spinetta.runtime import netplace
from spinetta.runtime.netgates import NetworkSettings
from spinetta.runtime.network import Network
from spinetta.runtime.protocol import ShimRuntime

log = logging.getLogger("spinetta.node")

HELD_S = 5.0  # for the shim to tell what it holds


def is_wanted(settings: Settings) -> bool:
    """Whether an administrator allows containers a network of their own."""
    return BRIDGE in settings.allow and CONTAINER in settings.runtimes


@asynccontextmanager
async def network_place(settings: Settings, data_dir: Path) -> AsyncIterator[None]:
    """Around the life of the node's shim: the folder whose mounts that is to see, removed when nothing needs it."""
    place = netplace.place_of(data_dir)
    if is_wanted(settings) and os.geteuid() == 0:
        try:
            await asyncio.to_thread(netplace.make, place)
        except OSError as error:  # told of when the network is opened
            log.debug("%s: %s", place.folder, error.strerror)
    try:
        yield
    finally:
        await asyncio.to_thread(_leave, place, data_dir / "shim")


def _leave(place: netplace.Place, shims: Path) -> None:
    """A shim that lives on will not see another folder; without one, and without networks, it is of no use."""
    with contextlib.suppress(OSError):  # it ends with the machine anyway
        is_empty = place.folder.is_dir() and not place.names() and not place.subnet.exists()
        if is_empty and not netplace.living_shims(shims):
            netplace.remove(place)


@asynccontextmanager
async def open_network(
    settings: Settings, data_dir: Path, shim: ShimRuntime
) -> AsyncIterator[tuple[Network | None, str]]:
    """The network for containers, and why new ones get none; neither where it is not wanted nor was before."""
    place, wanted = netplace.place_of(data_dir), is_wanted(settings)
    if os.geteuid() != 0:
        yield None, "only root makes networks" if wanted else ""
        return
    if not await asyncio.to_thread(place.folder.is_dir):
        yield None, f"{place.folder} cannot be made" if wanted else ""
        return
    why = ""
    if not await asyncio.to_thread(netplace.is_shared, place):
        why = f"{place.folder} cannot be mounted"
    elif not await asyncio.to_thread(_is_seen, place, shim.state_dir):
        why = (
            f"the node's shim does not see {place.folder}: it was started before that was there; it ends with its "
            "tasks, or stop the node and start it again (spinetta node stop)"
        )
    given = NetworkSettings(
        settings.name, settings.network_subnet, settings.network_nameservers, settings.network_refuse
    )
    held = await _held(shim, data_dir / "shim")
    async with Network.open(place, given, keep=held, wanted=wanted and not why) as network:
        try:
            yield network, (why or network.trouble) if wanted else ""
        finally:
            still = await _held(shim, data_dir / "shim")
            if still is not None:
                network.keep_only(still)


async def clear(data_dir: Path) -> None:
    """A node was stopped whose daemon had died before: remove what containers' networks are left, if no shim lives."""
    place = netplace.place_of(data_dir)
    if os.geteuid() != 0 or not place.folder.is_dir():
        return
    try:
        if netplace.living_shims(data_dir / "shim"):
            return
        with DirectoryLock(data_dir):
            async with Network.open(place, NetworkSettings(""), keep=(), wanted=False):
                pass
            await asyncio.to_thread(_leave, place, data_dir / "shim")
    except UserError:  # another daemon has come, and sees to it
        return
    except OSError as error:  # whether a shim lives is not known: the next start of the node sees to it
        log.warning("networks of containers are left as they are: %s", error)


def _is_seen(place: netplace.Place, state_dir: Path) -> bool:
    pid = netplace.shim_pid(state_dir)
    return pid != 0 and netplace.passes_on_to(place, pid)


async def _held(shim: ShimRuntime, state_dir: Path) -> set[str] | None:
    """What the shims hold, each of which may have a network; None: they do not say."""
    try:
        if not await asyncio.to_thread(netplace.living_shims, state_dir):
            return set()
        async with asyncio.timeout(HELD_S):
            return {held.key for held in await shim.held()}
    except (RuntimeUnavailable, OSError):  # TimeoutError is one
        return None
