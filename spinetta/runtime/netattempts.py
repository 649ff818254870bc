"""The networks of single attempts: each is made before its container starts, and taken down when that has ended.

Which addresses there are, and what may pass, is the `netgates`' concern; when all of it begins and ends, `network`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from spinetta import cni, network
from spinetta.errors import UserError
from spinetta.network import Subnet
from spinetta.runtime import netcommands, netplace, netrecord
from spinetta.runtime.netcommands import CommandFailed, Commands
from spinetta.runtime.netgates import Gates, read_subnet
from spinetta.runtime.netplace import Place

log = logging.getLogger("spinetta.runtime")

TRIAL = "trial"  # no attempt has this key
ADDRESS_WAIT_S = 30.0  # for others to end; then another node may have room
AGAIN_S, AGAIN_TIMES = 2.0, 3

# In the new namespace. No IPv6 but on loopback, since no rule is made for it; the rest is what a container may do
# anywhere else: ports below 1024, and ping, without a capability.
_MAKE = """set -e
echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6 || test ! -e /proc/sys/net/ipv6
echo 0 > /proc/sys/net/ipv4/ip_unprivileged_port_start
echo "0 2147483647" > /proc/sys/net/ipv4/ping_group_range
"$1" link set lo up
"$2" -t sysfs -o ro,nosuid,nodev,noexec sysfs "$3"
"""
# At the machine's end: the group is what the rules go by.
_MARK = """set -e
"$1" link set dev "$2" group "$3" alias "$4"
echo 1 > /proc/sys/net/ipv6/conf/"$2"/disable_ipv6 || test ! -e /proc/sys/net/ipv6
echo 1 > /proc/sys/net/ipv4/conf/"$2"/rp_filter
echo 0 > /proc/sys/net/ipv4/conf/"$2"/send_redirects
echo 0 > /proc/sys/net/ipv4/conf/"$2"/accept_redirects
"""


class NoNetwork(Exception):
    """This node cannot give a container its network now; in words."""


class NoAddress(NoNetwork):
    """All addresses are in use; others will end."""


@dataclass(frozen=True, slots=True)
class Joined:
    """What a container with a network is configured with: paths on the machine, and its address."""

    netns_path: str
    sys_path: str
    hosts_path: str
    resolv_path: str
    address: str


@dataclass
class _Attempt:
    """Of one attempt: whether it counts as having an address, and whether it is being taken down."""

    has_place: bool = False
    unwanted: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Attempts:
    """See the module. What is begun here is ended by `all_done`, or after `cancel`.

    Args:
        place: where it is kept.
        commands: for programs.
        hostname: of containers.
    """

    def __init__(self, place: Place, commands: Commands, hostname: str) -> None:
        self._place = place
        self._commands = commands
        self._hostname = hostname
        self._plugins, self._version = "", cni.VERSION
        self._known: dict[str, _Attempt] = {}
        self._working: set[asyncio.Task[Any]] = set()
        self._changed = asyncio.Condition()

    def __len__(self) -> int:
        """Those that have, had or are getting a network."""
        return len(self._known)

    def known(self) -> list[str]:
        """The keys of all of them."""
        return list(self._known)

    def adopt(self, keys: Iterable[str]) -> None:
        """There is something of these, made by an earlier daemon."""
        for key in keys:
            self._known[key] = _Attempt(has_place=True)

    async def talk(self) -> None:
        """Find the plugins, and what version of the protocol they speak. May be repeated.

        Raises:
            UserError: they are not installed.
            CommandFailed, cni.PluginError: they do not say.
        """
        if self._plugins:
            return
        self._plugins = netcommands.plugins_folder()
        done = await self._commands.run(
            (f"{self._plugins}/{cni.PLUGINS[0]}",),
            data=json.dumps({"cniVersion": cni.VERSION}).encode(),
            env={"CNI_COMMAND": "VERSION"},
        )
        self._version = cni.common_version(done.out, done.code)

    @asynccontextmanager
    async def joining(self, key: str, gates: Gates) -> AsyncIterator[Joined]:
        """See `Network.joining`."""
        attempt = self._known.setdefault(key, _Attempt())
        attempt.unwanted = False
        try:
            try:
                # Not cut off half-way when this is cancelled: what has begun ends, and is taken down then.
                made = await asyncio.shield(self._spawn(self._make(key, attempt, gates)))
            except (CommandFailed, cni.PluginError, OSError) as e:
                raise NoNetwork(f"the container's network cannot be made: {e}") from e
            yield made
        except BaseException:
            self.release(key)
            raise

    def release(self, key: str) -> None:
        """See `Network.release`."""
        attempt = self._known.get(key)
        if attempt is not None and not attempt.unwanted:
            attempt.unwanted = True
            self._spawn(self._take_down(key, attempt))

    def keep_only(self, keys: Collection[str]) -> None:
        """Release all others."""
        for key in sorted(set(self._known) - set(keys)):
            self.release(key)

    async def all_done(self) -> None:
        """Wait until nothing is being made or taken down."""
        while self._working:
            await asyncio.wait(self._working)

    def cancel(self) -> None:
        """Break off what is being made or taken down; the next start sees to it."""
        for task in self._working:
            task.cancel()

    # --- a trial ---

    async def have_trial(self, gates: Gates, subnet: Subnet) -> None:
        """Make a network and take it down: what this kernel lacks is known before a task needs it.

        Raises what making one raises; something of it may be left then, for `end_trial`.
        """
        others = [attempt for key, attempt in self._known.items() if key != TRIAL and not attempt.unwanted]
        if len(others) >= network.addresses(subnet):  # all are in use, so they can be had
            return
        attempt = self._known.setdefault(TRIAL, _Attempt())
        attempt.unwanted = False
        with contextlib.suppress(NoAddress):
            await self._make(TRIAL, attempt, gates)
        await self._undo(TRIAL)
        del self._known[TRIAL]

    async def end_trial(self) -> None:
        """Take down what is left of one that failed, without the plugin, which may be what failed."""
        if TRIAL in self._known:
            await self._undo(TRIAL, alone=True)
            del self._known[TRIAL]

    # --- one attempt ---

    async def _make(self, key: str, attempt: _Attempt, gates: Gates) -> Joined:
        subnet = gates.subnet
        assert subnet is not None  # noqa: S101 - they have been opened
        await self._await_address(attempt, subnet)
        async with attempt.lock:
            if attempt.unwanted:
                raise NoNetwork("it is wanted no more")
            await gates.mend()
            await self._undo(key)  # of an earlier try
            place = self._place
            folder, netns, sysfs = place.of(key), place.netns(key), place.sys(key)
            config = cni.configuration(subnet, str(place.leases), self._version, mtu=gates.mtu)
            await asyncio.to_thread(netrecord.intend, folder, config)
            await asyncio.to_thread(netrecord.make_places, netns, sysfs)
            tools = netcommands.tools()
            script = ("/bin/sh", "-c", _MAKE, "sh", tools["ip"], tools["mount"], str(sysfs))
            await self._commands.well((tools["unshare"], f"--net={netns}", *script))
            try:
                result = await self._commands.plugin("ADD", config, key=key, netns=netns, folder=self._plugins)
            except cni.PluginError as e:
                if cni.no_addresses(e):
                    raise NoAddress(_used_up(subnet)) from None
                raise
            await asyncio.to_thread((folder / "result.json").write_text, json.dumps(result))
            made = cni.attached(result)
            group, alias = str(network.group_of(subnet)), f"spinetta {key}"
            await self._commands.well(("/bin/sh", "-c", _MARK, "sh", tools["ip"], made.host_interface, group, alias))
            hosts = network.hosts_text(self._hostname, made.address)
            await asyncio.to_thread(netrecord.write_names, folder, hosts, await gates.resolv())
        hosts_path, resolv_path = str(folder / "hosts"), str(folder / "resolv.conf")
        return Joined(str(netns), str(sysfs), hosts_path, resolv_path, str(made.address))

    async def _await_address(self, attempt: _Attempt, subnet: Subnet) -> None:
        """Those that are free are counted here: a plugin would only refuse."""

        def may_go_on() -> bool:
            in_use = sum(1 for other in self._known.values() if other is not attempt and other.has_place)
            return attempt.unwanted or in_use < network.addresses(subnet)

        try:
            async with asyncio.timeout(ADDRESS_WAIT_S), self._changed:
                await self._changed.wait_for(may_go_on)
                attempt.has_place = not attempt.unwanted
        except TimeoutError:
            raise NoAddress(_used_up(subnet)) from None

    async def _take_down(self, key: str, attempt: _Attempt) -> None:
        async with self._changed:  # it may wait for an address
            self._changed.notify_all()
        for left in range(AGAIN_TIMES, -1, -1):
            async with attempt.lock:
                if not attempt.unwanted:  # it is wanted again
                    return
                try:
                    await self._undo(key, alone=not left)
                    break
                except (CommandFailed, cni.PluginError, UserError, OSError) as e:
                    if not left:
                        log.warning("%s: its network is not quite removed, the next start tries again: %s", key, e)
                        return
            await asyncio.sleep(AGAIN_S)
        attempt.has_place = False
        if self._known.get(key) is attempt and attempt.unwanted:
            del self._known[key]
        async with self._changed:
            self._changed.notify_all()

    async def _undo(self, key: str, *, alone: bool = False) -> None:
        """Remove what there is of an attempt's network. May be repeated, whatever of it has been made.

        Args:
            key: the attempt's.
            alone: without the plugin, which is not there, or fails: the cable ends with its namespace, and is cut.
        """
        if key not in await asyncio.to_thread(self._place.names):
            return
        netns = self._place.netns(key)
        config, result = await asyncio.to_thread(netrecord.recorded, self._place.of(key))
        if config is None:  # an address without a record
            subnet = read_subnet(self._place) or network.POOL
            config = cni.configuration(subnet, str(self._place.leases))
        folder = ""
        if not alone:
            with contextlib.suppress(UserError):  # they are not there any more
                folder = self._plugins or netcommands.plugins_folder()
        if folder:
            there = await asyncio.to_thread(netplace.is_namespace, netns)
            given = config if result is None else {**config, "prevResult": result}
            await self._commands.plugin("DEL", given, key=key, netns=netns if there else None, folder=folder)
        if result is not None:  # of a namespace that cannot be reached any more the cable would stay
            with contextlib.suppress(cni.PluginError):
                await self._cut(cni.attached(result).host_interface, key)
        await asyncio.to_thread(netplace.drop, self._place, key)

    async def _cut(self, interface: str, key: str) -> None:
        ip = netcommands.tools()["ip"]
        seen = await self._commands.run((ip, "-j", "link", "show", "dev", interface))
        if seen.code == 0 and f"spinetta {key}" in seen.out.decode(errors="replace"):
            await self._commands.run((ip, "link", "delete", "dev", interface))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work, name="network")
        self._working.add(task)
        task.add_done_callback(self._worked)
        return task

    def _worked(self, task: asyncio.Task[Any]) -> None:
        self._working.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, (NoNetwork, CommandFailed, cni.PluginError, OSError)):
            log.error("networks of containers: %r", error)  # others are told to who waits for it, if anybody still does


def _used_up(subnet: Subnet) -> str:
    return (
        f"all {network.addresses(subnet)} addresses of this node's network for containers, {subnet}, are in use; its "
        "administrator may set a larger network_subnet"
    )
