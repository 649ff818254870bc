"""Networks of containers behind the machine's address: made by CNI plugins, kept from each other by rules of our own.

A container gets a cable of its own to the machine (the plugin `ptp`) and an address out of the node's subnet; what
passes is said by one table of nftables, which does not change while containers come and go. All that is made for an
attempt is written down before, and taken down by `release`, or by the next daemon if this one cannot.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from spinetta import cni, network
from spinetta.errors import UserError
from spinetta.network import Subnet
from spinetta.runtime import netcommands, netplace, netrecord
from spinetta.runtime.netcommands import CommandFailed, Commands
from spinetta.runtime.netgates import Gates, NetworkSettings, read_subnet
from spinetta.runtime.netplace import Place

__all__ = ["Joined", "Network", "NetworkSettings", "NoNetwork"]

log = logging.getLogger("spinetta.runtime")

TRIAL = "trial"  # no attempt has this key
BEGIN_S = 10.0  # a daemon that starts renews nothing meanwhile; it takes a second
CLEARED_S = 4.0  # of these, for what others left
ADDRESS_WAIT_S = 30.0  # for others to end; then another node may have room
CLOSE_S = 30.0  # for what is being taken down; what is not is left to the next start
AGAIN_S, AGAIN_TIMES = 2.0, 3
GUARD_EVERY_S = (
    5.0  # while there are containers: for so long at most they are without the rules if somebody flushes all
)

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


class Network:
    """See the module. Made by `open`.

    Attributes:
        trouble: why there is no network for new containers; empty: there is one.
        warnings: what is weaker than it should be.
    """

    def __init__(self, place: Place, settings: NetworkSettings, commands: Commands, *, wanted: bool) -> None:
        self._place = place
        self._settings = settings
        self._commands = commands
        self._wanted = wanted
        self._gates: Gates | None = None
        self._plugins, self._version = "", cni.VERSION
        self._attempts: dict[str, _Attempt] = {}
        self._working: set[asyncio.Task[Any]] = set()
        self._changed = asyncio.Condition()
        self._guard: asyncio.Task[None] | None = None
        self.trouble = "" if wanted else "this node does not allow it"
        self.warnings: tuple[str, ...] = ()

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        place: Place,
        settings: NetworkSettings,
        *,
        keep: Collection[str] | None,
        wanted: bool = True,
        prefix: Sequence[str] = (),
    ) -> AsyncIterator[Network]:
        """The network of a node whose `place` has been made; its `trouble` says whether there is one.

        Leaving the block leaves containers their networks; when there are none, nothing is left but the folder.

        Args:
            place: where it is kept.
            settings: what an administrator says.
            keep: attempts of an earlier daemon that still run; what others had is removed. None: not known, so all of
                it stays.
            wanted: new containers are to have networks; else those of before are only kept.
            prefix: put before each command, to be in another network namespace.
        """
        self = cls(place, settings, Commands(place.commands, prefix), wanted=wanted)
        try:
            try:
                async with asyncio.timeout(BEGIN_S):
                    await self._begin(keep)
            except TimeoutError:
                slow = f" ({self._commands.cut} did not end)" if self._commands.cut else ""
                self.trouble = f"a network for a trial was not made and taken down within {BEGIN_S:g} s{slow}"
            except UserError as e:
                self.trouble = f"{e.message} ({e.hint})" if e.hint else e.message
            except (CommandFailed, cni.PluginError, NoNetwork, OSError) as e:
                self.trouble = str(e)
            if self.trouble:
                await self._give_up()
            yield self
        finally:
            await self._close()

    # --- for attempts ---

    @asynccontextmanager
    async def joining(self, key: str) -> AsyncIterator[Joined]:
        """Make the network of an attempt, which it has until `release`. An error within the block releases it.

        Raises:
            NoNetwork: it cannot be made, or no address became free in time.
        """
        if self.trouble:
            raise NoNetwork(f"no network for containers: {self.trouble}")
        attempt = self._attempts.setdefault(key, _Attempt())
        attempt.unwanted = False
        try:
            try:
                # Not cut off half-way when this is cancelled: what has begun ends, and is taken down then.
                made = await asyncio.shield(self._spawn(self._make(key, attempt)))
            except (CommandFailed, cni.PluginError, OSError) as e:
                raise NoNetwork(f"the container's network cannot be made: {e}") from e
            yield made
        except BaseException:
            self.release(key)
            raise

    def release(self, key: str) -> None:
        """The attempt has ended, or will not start: take its network down, by and by. May be repeated."""
        attempt = self._attempts.get(key)
        if attempt is not None and not attempt.unwanted:
            attempt.unwanted = True
            self._spawn(self._take_down(key, attempt))

    def keep_only(self, keys: Collection[str]) -> None:
        """These attempts, and no others, still have networks."""
        for key in sorted(set(self._attempts) - set(keys)):
            self.release(key)

    # --- one attempt ---

    async def _make(self, key: str, attempt: _Attempt) -> Joined:
        gates = self._gates
        assert gates is not None and gates.subnet is not None  # noqa: S101, PT018 - else there is trouble
        subnet = gates.subnet
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
            hosts = network.hosts_text(self._settings.hostname, made.address)
            await asyncio.to_thread(netrecord.write_names, folder, hosts, await gates.resolv())
        hosts_path, resolv_path = str(folder / "hosts"), str(folder / "resolv.conf")
        return Joined(str(netns), str(sysfs), hosts_path, resolv_path, str(made.address))

    async def _await_address(self, attempt: _Attempt, subnet: Subnet) -> None:
        """Those that are free are counted here: a plugin would only refuse."""

        def may_go_on() -> bool:
            in_use = sum(1 for other in self._attempts.values() if other is not attempt and other.has_place)
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
        if self._attempts.get(key) is attempt and attempt.unwanted:
            del self._attempts[key]
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

    # --- the whole ---

    async def _begin(self, keep: Collection[str] | None) -> None:
        place = self._place
        await self._commands.settled()
        for key in await asyncio.to_thread(place.names):
            self._attempts[key] = _Attempt(has_place=True)
        if keep is not None:
            self.keep_only(keep)
        with contextlib.suppress(TimeoutError):  # it goes on meanwhile
            async with asyncio.timeout(CLEARED_S):
                await self._all_done()
        if not self._wanted and not self._attempts and read_subnet(place) is None:
            return
        self._gates = Gates(place, self._settings, self._commands)
        if not self._wanted and not self._attempts:
            return  # what an earlier daemon left is removed when we leave
        if not self._attempts:  # else these are seen to whatever becomes of new ones
            await self._talk()
        cables = [await asyncio.to_thread(netrecord.cable, place.of(key)) for key in self._attempts]
        await self._gates.open(keep=bool(self._attempts), cables=cables)
        self._guard = asyncio.create_task(self._watch_over(self._gates), name="rules of networks")
        if self._wanted:
            await self._talk()
            await self._try()
            self.warnings = await self._gates.warnings()

    async def _watch_over(self, gates: Gates) -> None:
        while True:
            await asyncio.sleep(GUARD_EVERY_S)
            try:
                if self._attempts:
                    await gates.mend()
            except (CommandFailed, UserError, OSError) as e:  # it may be had again the next time
                log.error("the rules of containers' networks cannot be looked after: %s", e)

    async def _talk(self) -> None:
        if self._plugins:
            return
        self._plugins = netcommands.plugins_folder()
        done = await self._commands.run(
            (f"{self._plugins}/{cni.PLUGINS[0]}",),
            data=json.dumps({"cniVersion": cni.VERSION}).encode(),
            env={"CNI_COMMAND": "VERSION"},
        )
        self._version = cni.common_version(done.out, done.code)

    async def _try(self) -> None:
        """Make a network and take it down: what this kernel lacks is known before a task needs it."""
        gates = self._gates
        assert gates is not None and gates.subnet is not None  # noqa: S101, PT018 - they have been opened
        others = [attempt for key, attempt in self._attempts.items() if key != TRIAL and not attempt.unwanted]
        if len(others) >= network.addresses(gates.subnet):  # all are in use, so they can be had
            return
        attempt = self._attempts.setdefault(TRIAL, _Attempt())
        attempt.unwanted = False
        with contextlib.suppress(NoAddress):
            await self._make(TRIAL, attempt)
        await self._undo(TRIAL)
        del self._attempts[TRIAL]

    async def _give_up(self) -> None:
        """There is trouble: take down what was tried, without what failed. What is of earlier daemons goes on."""
        try:
            async with asyncio.timeout(CLEARED_S):
                if TRIAL in self._attempts:
                    await self._undo(TRIAL, alone=True)
                    del self._attempts[TRIAL]
                await self._all_done()
                if not self._attempts:
                    await self._shut()
        except (TimeoutError, CommandFailed, UserError, OSError) as e:
            log.warning("networks of containers are not quite removed, it is tried again later: %s", e)

    async def _close(self) -> None:
        """Wait for what is being taken down; with the last container the rules go."""
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._all_done()
                if TRIAL in self._attempts:
                    await self._undo(TRIAL, alone=True)
                    del self._attempts[TRIAL]
                if not self._attempts:
                    await self._shut()
        except (TimeoutError, CommandFailed, UserError, OSError) as e:
            log.warning("networks of containers are not quite removed, the next start tries again: %s", e)
        finally:
            await self._end_guard()
            for task in self._working:
                task.cancel()
            await self._all_done()

    async def _shut(self) -> None:
        await self._end_guard()  # else it would put the rules back
        if self._gates is not None:
            await self._gates.shut()
            self._gates = None

    async def _end_guard(self) -> None:
        if self._guard is not None:
            self._guard.cancel()
            await asyncio.wait([self._guard])

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

    async def _all_done(self) -> None:
        while self._working:
            await asyncio.wait(self._working)


# --- parts ---------------------------------------------------------------------------------------------------------


def _used_up(subnet: Subnet) -> str:
    return (
        f"all {network.addresses(subnet)} addresses of this node's network for containers, {subnet}, are in use; its "
        "administrator may set a larger network_subnet"
    )
