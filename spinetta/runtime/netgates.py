"""What a node's containers share on a machine: a subnet, one table of rules, and that the machine forwards at all."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinetta import network
from spinetta.network import Subnet
from spinetta.runtime import netcommands, netforward
from spinetta.runtime.netcommands import Commands
from spinetta.runtime.netforward import Before
from spinetta.runtime.netplace import Place

log = logging.getLogger("spinetta.runtime")

RESOLV_FILES = ("/etc/resolv.conf", network.SYSTEMD_RESOLV)
MTU_MIN = 576  # what every machine must take
RESOLV_BYTES_MAX = 64 << 10


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """What an administrator says.

    Attributes:
        hostname: of containers.
        subnet: for containers; empty: a free part of `network.POOL`.
        nameservers: for containers; empty: the machine's own, as far as they can be reached.
        refused: where containers may not connect to, beside `network.REFUSED_ALWAYS`.
    """

    hostname: str
    subnet: str = ""
    nameservers: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


class Gates:
    """See the module. All of it is done under the lock of the machine's nodes.

    Attributes:
        subnet: of this node; None before `open`.
        mtu: of the way out; 0: not known.

    Raises, wherever it is asked for something:
        UserError: a tool is not installed, or the subnet is taken.
        CommandFailed: the kernel refuses.
    """

    def __init__(self, place: Place, settings: NetworkSettings, commands: Commands) -> None:
        self._place = place
        self._settings = settings
        self._commands = commands
        tools = netcommands.tools()
        self._ip, self._nft = tools["ip"], tools["nft"]
        self._own: frozenset[str] = frozenset()
        self._bridges: Sequence[str] = ()
        self._rules = b""
        self.mtu = 0
        self.subnet: Subnet | None = None

    async def open(self, *, keep: bool, cables: Collection[str]) -> Subnet:
        """Choose the subnet, put the rules in place, and only then let the machine forward.

        Args:
            keep: containers of before have addresses of the subnet that was chosen then.
            cables: the machine's ends of theirs; others of this node are cut.
        """
        async with netcommands.locked(self._place.lock, "another node on this machine is not done with its networks"):
            tables = await self._tables()
            routes = await self._commands.json((self._ip, "-j", "-4", "route", "show", "table", "all"))
            self._own = network.own_addresses(routes)
            self.mtu = await self._mtu(network.default_interface(routes))
            links = await self._commands.json((self._ip, "-j", "-d", "link", "show"))
            self._bridges = network.bridges_out(links, routes)
            space = await self._space()
            mine = read_subnet(self._place)
            if mine is not None and space != _read_space(self._place):
                self._forget()
                mine = None
            if mine is not None:
                await self._cut_all_but(mine, cables)
            others = {name: marked for name, marked in tables.items() if name != _name(mine)}
            if mine is not None and keep:
                self.subnet = mine
            else:
                if mine is not None:
                    await self._remove_table(mine)
                self.subnet = network.choose(self._settings.subnet, others, routes)
            await asyncio.to_thread(netforward.replace, self._place.subnet, f"{self.subnet} {space}")
            await self._put_rules(self.subnet, others, space)
            return self.subnet

    async def shut(self) -> None:
        """The last container is gone: no rules any more, and the machine forwards what it forwarded before."""
        subnet = self.subnet or read_subnet(self._place)
        if subnet is None:
            return
        async with netcommands.locked(self._place.lock, "another node on this machine is not done with its networks"):
            if await self._space() != _read_space(self._place):
                self._forget()  # that machine, or what played it, is not to be reached from here
                return
            others = [name for name in await self._tables() if name != _name(subnet)]
            await self._cut_all_but(subnet, ())
            before = netforward.read(self._place.forwarding)
            if before is not None and not others:
                links = await self._commands.json((self._ip, "-j", "link", "show"))
                if set(network.uplinks(str(link.get("ifname")) for link in links)) <= set(before.there):
                    await netforward.turn_off(self._commands, before)
                else:  # a Docker, perhaps, that found it on and would have turned it on itself
                    log.warning("net.ipv4.ip_forward stays on: this machine has got interfaces that may rely on it")
            await self._remove_table(subnet)
            self._forget()

    async def mend(self) -> None:
        """Put the rules back if somebody has removed them, as `flush ruleset` does, with which nftables.conf begins."""
        if self.subnet is None or not self._rules:
            return
        seen = await self._commands.run((self._nft, "list", "chain", "inet", _name(self.subnet), "input"))
        if seen.code == 0 and b"iifgroup" in seen.out:
            return
        await self._commands.well((self._nft, "-f", "-"), data=self._rules)
        log.warning(
            "somebody had removed the rules of containers' networks (inet %s); they are back", _name(self.subnet)
        )

    async def resolv(self) -> str:
        """A resolv.conf for containers, as the machine's is now."""
        texts = await asyncio.to_thread(_read_resolvs)
        return network.resolv_text(self._own, self._settings.nameservers, texts)

    async def warnings(self) -> tuple[str, ...]:
        """What will not work as one might expect."""
        found = []
        if not network.has_nameserver(await self.resolv()):
            found.append(
                "containers on the network bridge look up no names: the nameservers of this machine are its own, or "
                "have IPv6 addresses; set network_nameservers"
            )
        if self._settings.subnet and self._settings.subnet != str(self.subnet):
            found.append(
                f"containers on the network bridge keep the subnet {self.subnet}: some of before still run; the next "
                f"start without them takes {self._settings.subnet}"
            )
        chains = entries(await self._commands.json((self._nft, "-j", "list", "chains")))
        if (chain := network.forward_drops(chains)) and self.subnet is not None:
            found.append(
                f"a firewall of this machine (chain {chain}) drops what is forwarded unless it knows it: containers on "
                f"the network bridge may reach nothing unless it lets interfaces of group "
                f"{network.group_of(self.subnet)} pass"
            )
        return tuple(found)

    # --- parts ---

    async def _space(self) -> str:
        """The network namespace that the machine's network is in."""
        return (await self._commands.well(("readlink", "/proc/self/ns/net"))).decode(errors="replace").strip()

    def _forget(self) -> None:
        for path in (self._place.forwarding, self._place.subnet):
            path.unlink(missing_ok=True)

    async def _put_rules(self, subnet: Subnet, others: dict[str, bool], space: str) -> None:
        forwards = (await self._commands.well(("cat", netforward.FORWARD))).strip() == b"1"
        before = netforward.read(self._place.forwarding)
        if before is None and any(others.values()):  # another node has turned it on
            before = _of_others(self._place, space)
        elif before is None and not forwards:
            links = await self._commands.json((self._ip, "-j", "link", "show"))
            ours: set[str] = set()
            for name in (*others, _name(subnet)):
                ours |= await self._cables(network.subnet_of(name))
            there = [n for link in links if (n := str(link.get("ifname"))) not in ours]
            before = await netforward.seen(self._commands, there)
        if before is not None:
            await asyncio.to_thread(netforward.write, self._place.forwarding, before)
        text = network.rules(
            subnet,
            refused=self._settings.refused,
            was_off=before is not None,
            between=before.shut if before is not None else (),
            there=before.there if before is not None else (),
            bridges=self._bridges,
        )
        self._rules = text.encode()
        await self._commands.well((self._nft, "-f", "-"), data=self._rules)
        if not forwards:
            await netforward.turn_on(self._commands)

    async def _tables(self) -> dict[str, bool]:
        """Tables of nodes of this machine, and of each whether it says that nothing was forwarded before."""
        chains = entries(await self._commands.json((self._nft, "-j", "list", "chains")))
        tables = entries(await self._commands.json((self._nft, "-j", "list", "tables")))
        marked = {c["chain"].get("table") for c in chains if (c.get("chain") or {}).get("name") == network.MARK}
        names = [str(t["table"].get("name")) for t in tables if "table" in t]
        return {name: name in marked for name in names if network.subnet_of(name) is not None}

    async def _cables(self, subnet: Subnet | None) -> set[str]:
        """The machine's ends of the cables of a node's containers."""
        if subnet is None:
            return set()
        shown = (self._ip, "-j", "link", "show", "group", str(network.group_of(subnet)))
        return {name for link in await self._commands.json(shown) if (name := str(link.get("ifname") or ""))}

    async def _mtu(self, interface: str) -> int:
        """Of the way out: a container that sends more at once would have to be told."""
        shown = (self._ip, "-j", "link", "show", *(("dev", interface) if interface else ()))
        found = [m for link in await self._commands.json(shown) if isinstance(m := link.get("mtu"), int)]
        return found[0] if interface and found and found[0] >= MTU_MIN else 0

    async def _cut_all_but(self, subnet: Subnet, cables: Collection[str]) -> None:
        for name in sorted(await self._cables(subnet) - set(cables)):
            await self._commands.run((self._ip, "link", "delete", "dev", name))  # it may be gone by itself

    async def _remove_table(self, subnet: Subnet) -> None:
        name = network.table_of(subnet)  # added first: to delete what is not there is an error
        text = f"add table inet {name}\ndelete table inet {name}\n"
        await self._commands.well((self._nft, "-f", "-"), data=text.encode())


def read_subnet(place: Place) -> Subnet | None:
    """The subnet that a node has taken."""
    try:
        return ipaddress.IPv4Network(place.subnet.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _read_space(place: Place) -> str:
    """The network namespace in which it has."""
    try:
        return place.subnet.read_text().split()[1]
    except (OSError, ValueError, IndexError):
        return ""


def _name(subnet: Subnet | None) -> str:
    return "" if subnet is None else network.table_of(subnet)


def _of_others(place: Place, space: str) -> Before | None:
    """What another node of this machine found when it turned forwarding on; None: none has kept it."""
    for path in sorted(place.folder.parent.glob("*/forwarding.json")):
        if _read_space(Place(path.parent)) == space and (before := netforward.read(path)) is not None:
            return before
    return None


def _read_resolvs() -> list[str]:
    texts = []
    for path in RESOLV_FILES:
        try:
            with Path(path).open(errors="replace") as file:
                texts.append(file.read(RESOLV_BYTES_MAX))
        except OSError:
            continue
    return texts


def entries(told: Any) -> list[dict[str, Any]]:
    """What nft lists in JSON."""
    listed = told.get("nftables") if isinstance(told, dict) else None
    return [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
