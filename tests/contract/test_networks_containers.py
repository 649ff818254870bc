"""Containers with networks of their own: what a program in one reaches, and how long it has its network."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spinetta.config import Settings
from spinetta.container import ContainerSpec
from spinetta.errors import RuntimeUnavailable
from spinetta.model import Exit, Reason
from spinetta.node.containers import open_containers
from spinetta.node.networks import network_place, open_network
from spinetta.runtime import netplace
from spinetta.runtime.netattempts import NoNetwork
from spinetta.runtime.netplace import Place
from spinetta.runtime.network import Network
from spinetta.runtime.protocol import Launch
from spinetta.runtime.runc import RuncRuntime
from tests.contract.containers import make_rootfs
from tests.contract.nets import (
    MACHINE,
    NETWORKS,
    OUTSIDE,
    World,
    forwards,
    ip,
    joined_for_good,
    left,
    only_rules,
    opened,
)
from tests.contract.shims import asynchronous, clean_up, launch, runtime, until
from tests.contract.test_runtimes import end_of, ran, start

pytestmark = NETWORKS
METADATA = "169.254.169.254"


@asynccontextmanager
async def node(
    folder: Path, image: Path, here: World, allow: tuple[str, ...] = ()
) -> AsyncIterator[tuple[RuncRuntime, Network]]:
    """All that a daemon has of it, on the machine of `here`."""
    where = netplace.place_of(folder, folder / "run")
    settings = Settings(name="n1", address="127.0.0.1:1", data_dir=str(folder), allow=(f"image:{image}", *allow))
    async with runtime(folder / "shim") as shim, open_containers(settings, folder, shim) as containers:
        pid = netplace.shim_pid(shim.state_dir)
        assert netplace.passes_on_to(where, pid)
        held = tuple(h.key for h in await shim.held())
        async with opened(where, here, held) as network:
            bare = containers.runtime
            assert isinstance(bare, RuncRuntime), containers.warnings
            site = replace(bare._site, allows=bare._site.allows | {"network:bridge"})
            assert containers.images is not None
            yield RuncRuntime(shim, containers.images, site, network), network


@pytest.fixture
def folder(tmp_path: Path, where: Place) -> Iterator[Path]:
    """A node's data directory; the place is there before its shim."""
    assert where.folder.is_relative_to(tmp_path)
    tmp_path.chmod(0o755)
    yield tmp_path
    clean_up(tmp_path / "shim")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_rootfs(tmp_path_factory.mktemp("nets") / "image", 0)
    for path in (made, *made.parents[:2]):
        path.chmod(0o755)
    return made


def bridged(image: Path, key: str, script: str) -> Any:
    wants = ContainerSpec(f"rootfs:{image}", network="bridge")
    return replace(launch(key, "/bin/sh", "-c", script), env={}, wants=wants)


@asynchronous
async def test_a_container_reaches_the_outside_and_nothing_of_its_machine(
    folder: Path, image: Path, here: World, where: Place
) -> None:
    ip("-n", here.outside, "addr", "add", f"{METADATA}/32", "dev", "lan0")
    ip("-n", here.machine, "route", "add", METADATA, "dev", "uplink0")
    outside, metadata = here.serve(here.outside, OUTSIDE), here.serve(here.outside, METADATA)
    names = here.serve(here.outside, OUTSIDE, udp=True, port=53)
    ours = here.serve(here.machine, "0.0.0.0")  # noqa: S104 - as etcd, the API, or anything else would listen
    ours6 = here.serve(here.machine, "::")
    async with node(folder, image, here) as (rt, _):
        assert await start(rt, bridged(image, "other.1", "busybox nc -l -p 80 -e echo heard; sleep 100")) is None
        other = json.loads((where.of("other.1") / "result.json").read_text())["ips"][0]["address"].split("/")[0]
        tries = [
            f"busybox nc -w 2 {OUTSIDE} {outside.port} || echo no-outside",
            "busybox nslookup far.example || echo no-names",
            f"busybox nc -w 2 far.example {outside.port} || echo no-outside-by-name",
            "set -- $(cat /proc/sys/net/ipv4/ping_group_range); [ $2 -gt 60000 ] || echo no-ping",
            "busybox timeout 1 busybox nc -l -p 80; [ $? = 143 ] || echo no-low-port",
            *(
                f"busybox nc -w 2 {address} {port} && echo REACHED-{address}"
                for address, port in (
                    (MACHINE, ours.port), ("10.231.0.1", ours.port), ("127.0.0.1", ours.port), ("::1", ours6.port),
                    (other, 80), (METADATA, metadata.port),
                )
            ),
            "busybox ip link set eth0 down && echo CHANGED",
            "busybox ip addr add 10.231.0.99/32 dev eth0 && echo ADDED",
            "busybox ip -6 addr show dev eth0",
            "ls /sys/class/net | cat; cat /etc/hosts",
        ]  # fmt: skip
        assert (await ran(rt, bridged(image, "a.1", "\n".join(tries)))).exit_code == 0
        said = rt.log_path("a.1", "stdout").read_text()
        assert said.count(f"you are {MACHINE}") == 2, said
        assert not [word for word in ("no-", "REACHED", "CHANGED", "ADDED", "inet6") if word in said], said
        assert "eth0\nlo\n" in said
        assert " n1\n" in said
        assert outside.heard == [MACHINE, MACHINE]
        assert names.heard
        assert [*ours.heard, *ours6.heard, *metadata.heard] == []
        await rt.stop("other.1", "cancelled")
        await end_of(rt, "other.1")
        for key in ("a.1", "other.1"):
            await rt.forget(key)
        await until(lambda: only_rules(here, where))
    assert left(here, where) == []
    assert not forwards(here)


@asynchronous
async def test_a_container_keeps_its_network_from_one_daemon_to_the_next(
    folder: Path, image: Path, here: World, where: Place
) -> None:
    outside = here.serve(here.outside, OUTSIDE)
    script = f"until [ -e /work/go ]; do sleep 0.05; done; busybox nc -w 2 {OUTSIDE} {outside.port}"
    async with node(folder, image, here) as (rt, _):
        assert await start(rt, bridged(image, "stays.1", script)) is None
        assert await rt.prepare(bridged(image, "prepared.1", "true")) is not None  # and never started
    assert "prepared.1" in where.names()
    async with node(folder, image, here) as (rt, _):
        assert where.names() == ["stays.1"]
        (folder / "shim/scratch/stays.1/work/go").touch()
        assert (await end_of(rt, "stays.1")).exit_code == 0
        assert rt.log_path("stays.1", "stdout").read_text() == f"you are {MACHINE}\n"
        await rt.forget("stays.1")
    assert left(here, where) == []


@asynchronous
async def test_what_is_not_started_has_no_network(folder: Path, image: Path, here: World, where: Place) -> None:
    async with node(folder, image, here) as (rt, network):
        refused = await rt.prepare(replace(bridged(image, "bad.1", "true"), argv=("/bin/nothing-here",)))
        assert isinstance(refused, Exit)
        assert refused.reason is Reason.SPAWN_FAILED
        await until(lambda: only_rules(here, where))
        network.trouble = "all its addresses are in use"
        later = await rt.prepare(bridged(image, "bad.2", "true"))
        assert isinstance(later, Exit)
        assert (later.reason, "all its addresses" in later.message) == (Reason.NODE_UNFIT, True), (
            "goes back, costs nothing"
        )
        assert later.lacks == "network:bridge", "others are started"
        network.trouble = ""
        preparing = asyncio.create_task(rt.prepare(bridged(image, "late.1", "true")))
        await until(lambda: "late.1" in where.names())
        preparing.cancel()
        await asyncio.wait([preparing])
        await until(lambda: only_rules(here, where))
    assert left(here, where) == []


@asynchronous
async def test_a_start_without_an_answer_keeps_its_network_until_it_is_known_to_be_none(
    folder: Path, image: Path, here: World, where: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node(folder, image, here) as (rt, _):
        for key, runs in (("runs.1", True), ("lost.1", False)):
            prepared = await rt.prepare(bridged(image, key, "sleep 100"))
            assert isinstance(prepared, Launch)
            with monkeypatch.context() as patch:
                unheard = rt._shim.start

                async def start(asked: Launch, runs: bool = runs, unheard: Any = unheard) -> Exit | None:
                    if runs:
                        await unheard(asked)
                    raise RuntimeUnavailable("for a trial")

                patch.setattr(rt._shim, "start", start)
                with pytest.raises(RuntimeUnavailable):
                    await rt.start(prepared)
        await rt.held()
        assert where.names() == ["lost.1", "runs.1"]
        await rt.held()
        await until(lambda: where.names() == ["runs.1"])
        await rt.stop("runs.1", "cancelled")
        await end_of(rt, "runs.1")
        await rt.forget("runs.1")
    assert left(here, where) == []


@asynchronous
async def test_who_sends_in_anothers_name_is_not_heard(folder: Path, image: Path, here: World) -> None:
    outside = here.serve(here.outside, OUTSIDE)
    async with node(folder, image, here, ("capability:NET_ADMIN", "capability:NET_RAW")) as (rt, network):
        tries = (
            "busybox arping -c 1 -I eth0 10.231.0.1 && echo RAW",
            "busybox ip addr add 10.99.0.1/32 dev eth0 && echo ADDED",
            "busybox ip route add 10.99.0.0/16 dev lo && echo ROUTED",
            "busybox ip link set lo down && echo DOWN",
            "echo 0 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6 && echo IPV6",
            f"busybox nc -w 2 {OUTSIDE} {outside.port}",
        )
        asked = bridged(image, "a.1", "\n".join(tries))
        capable = replace(asked.wants, capabilities=("NET_ADMIN", "NET_RAW"))
        assert (await ran(rt, replace(asked, wants=capable))).exit_code == 0
        assert rt.log_path("a.1", "stdout").read_text() == f"you are {MACHINE}\n"
        await rt.forget("a.1")
        # Not even with what only the machine's root can do in it.
        joined = await joined_for_good(network, "b.1")
        inside = ("nsenter", f"--net={joined.netns_path}")
        for address in ("10.231.0.77", "198.51.100.77", "10.99.0.1"):
            adding = (*inside, "ip", "addr", "add", f"{address}/32", "dev", "eth0")
            await asyncio.to_thread(subprocess.run, adding, check=True, timeout=20)
            calling = (*inside, "busybox", "nc", "-w", "1", "-s", address, OUTSIDE, str(outside.port))
            done = await asyncio.to_thread(subprocess.run, calling, capture_output=True, check=False, timeout=20)
            assert done.returncode != 0
        assert len(outside.heard) == 1
        network.release("b.1")


@asynchronous
async def test_a_node_whose_shim_was_there_before_says_so(folder: Path) -> None:
    settings = Settings(name="n1", address="127.0.0.1:1", data_dir=str(folder), allow=("network:bridge",))
    where = netplace.place_of(folder)
    async with runtime(folder / "shim") as shim:
        async with network_place(settings, folder), open_network(settings, folder, shim) as (network, why):
            assert "started before" in why
            assert network is not None
            with pytest.raises(NoNetwork):
                await joined_for_good(network, "a.1")
        assert where.folder.is_dir(), "the shim lives"
    clean_up(folder / "shim")
    async with network_place(settings, folder):
        assert netplace.is_shared(where)
    assert not where.folder.exists()
