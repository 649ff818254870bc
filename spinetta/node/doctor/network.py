"""The network bridge of containers: would it work? Tried in a network namespace that ends at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from pathlib import Path

from spinetta import network as rules
from spinetta.checkup import Finding, Level, ok
from spinetta.config import Settings
from spinetta.container import BRIDGE
from spinetta.errors import UserError
from spinetta.node.networks import is_wanted
from spinetta.runtime import netcommands, netgates, netplace
from spinetta.runtime.netcommands import CommandFailed, Commands
from spinetta.runtime.netgates import NetworkSettings
from spinetta.runtime.network import Network

CHECK = "network"
FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
WEAKENS = "tasks that ask for the network bridge are not taken"
ALLOW = f'to have it: allow = ["{BRIDGE}"]'


async def network(settings: Settings) -> list[Finding]:
    """Plugins, tools and kernel by making a container's network; then what the machine itself adds to it."""
    wanted = is_wanted(settings)
    level = Level.WARNING if wanted else Level.NOTE
    if os.geteuid() != 0:
        return [Finding(CHECK, level, "only root makes networks for containers", WEAKENS, "run the node as root")]
    try:
        netcommands.plugins_folder()
        netcommands.tools()
    except UserError as e:
        return [Finding(CHECK, level, e.message, WEAKENS, e.hint)]
    if trouble := await _tried(settings):
        mend = "a kernel with network namespaces, veth, nf_tables, connection tracking and masquerading (Debian's has)"
        return [Finding(CHECK, level, f"a trial of a container's network failed: {trouble}", WEAKENS, mend)]
    found = [ok(CHECK, "a container's network was made and taken down" + ("" if wanted else f"; {ALLOW}"))]
    if wanted and (await asyncio.to_thread(FORWARD.read_text)).strip() != "1":
        found.append(
            Finding(
                CHECK, Level.NOTE, "this machine forwards nothing now; the node turns that on (net.ipv4.ip_forward)",
                "nothing: between the interfaces that are there the node's rules refuse it, and it is turned off again",
            )
        )  # fmt: skip
    if wanted and (chain := await _dropping()):
        found.append(
            Finding(
                CHECK, Level.WARNING, f"another firewall (chain {chain}) drops what is forwarded unless it knows it",
                "containers on the network bridge may reach nothing", "let them pass: docs/containers.md says how",
            )
        )  # fmt: skip
    return found


async def _dropping() -> str:
    """A chain of another firewall that drops what is forwarded; empty: none is known of."""
    with tempfile.NamedTemporaryFile(prefix="spinetta-network-") as lock:
        try:
            listed = await Commands(Path(lock.name)).json((netcommands.tools()["nft"], "-j", "list", "chains"))
        except (CommandFailed, UserError):
            return ""
    return rules.forward_drops(netgates.entries(listed))


async def _tried(settings: Settings) -> str:
    """Why a container's network cannot be made; empty when it can. Nothing of the machine's own network is touched."""
    given = NetworkSettings(settings.name, nameservers=settings.network_nameservers, refused=settings.network_refuse)
    with tempfile.TemporaryDirectory(prefix="spinetta-network-") as folder:
        place, outer = netplace.place_of(Path(folder), Path(folder) / "run"), Path(folder) / "outer"
        tools = netcommands.tools()
        try:
            await asyncio.to_thread(netplace.make, place)
            outer.touch()
            await Commands(place.commands).well((tools["unshare"], f"--net={outer}", "true"))
            async with Network.open(place, given, keep=(), prefix=("nsenter", f"--net={outer}")) as made:
                return made.trouble
        except (CommandFailed, OSError) as e:
            return str(e)
        finally:
            await asyncio.to_thread(_clean_up, place, outer)


def _clean_up(place: netplace.Place, outer: Path) -> None:
    with contextlib.suppress(OSError):  # what is still mounted ends with the machine
        for name in place.names():
            netplace.drop(place, name)
        netplace.unmount(outer)
        netplace.remove(place)
