"""Networks of containers, with the real plugins and rules: what is reached, what is refused, and what is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spinetta import cni
from spinetta import network as rules
from spinetta.config import Settings
from spinetta.container import ContainerSpec
from spinetta.model import Exit, Reason
from spinetta.node.containers import open_containers
from spinetta.runtime import netcommands, netplace
from spinetta.runtime import network as networks
from spinetta.runtime.netplace import Place
from spinetta.runtime.network import Joined, Network, NetworkSettings, NoNetwork
from spinetta.runtime.runc import RuncRuntime
from tests.contract.containers import make_rootfs
from tests.contract.nets import MACHINE, OUTSIDE, World, ip, left, may_make_worlds, place, world
from tests.contract.shims import asynchronous, clean_up, launch, runtime, until
from tests.contract.test_runtimes import end_of, ran, start

pytestmark = [pytest.mark.contract, pytest.mark.skipif(not may_make_worlds(), reason="only root makes networks")]
METADATA = "169.254.169.254"
TINY = "10.77.0.0/29"  # five addresses


@pytest.fixture
def here() -> Iterator[World]:
    with world() as made:
        yield made


@pytest.fixture
def where(tmp_path: Path) -> Iterator[Place]:
    with place(tmp_path) as made:
        yield made


@asynccontextmanager
async def opened(
    where: Place, here: World, keep: tuple[str, ...] | None = (), **changes: Any
) -> AsyncIterator[Network]:
    settings = replace(NetworkSettings("n1", nameservers=(OUTSIDE,)), **changes)
    async with Network.open(where, settings, keep=keep, prefix=here.prefix) as network:
        assert network.trouble == ""
        yield network


def only_rules(here: World, where: Place) -> bool:
    return [line.split()[0] for line in left(here, where)] == ["table"]


def caught(joined: Joined, address: str, port: int) -> str:
    """What a program in the container's namespace hears from a server; empty: nothing."""
    command = ["nsenter", f"--net={joined.netns_path}", "busybox", "nc", "-w", "2", address, str(port)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip()


def answers(space: str, address: str) -> bool:
    """Whether somebody hears an address from within a namespace."""
    command = ["nsenter", f"--net=/run/netns/{space}", "busybox", "ping", "-c", "1", "-W", "1", address]
    return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0


@contextlib.contextmanager
def running(*argv: str) -> Iterator[int]:
    """A program that has said something; its pid."""
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process.pid
        finally:
            process.kill()


@contextlib.contextmanager
def within(joined: Joined, *argv: str) -> Iterator[int]:
    """A program in a container's namespace."""
    with running("nsenter", f"--net={joined.netns_path}", "sh", "-c", 'echo up; exec "$@"', "sh", *argv) as pid:
        yield pid


async def joined_for_good(network: Network, key: str) -> Joined:
    async with network.joining(key) as joined:
        return joined


# --- in containers ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def node(
    folder: Path, image: Path, here: World, allow: tuple[str, ...] = ()
) -> AsyncIterator[tuple[RuncRuntime, Network]]:
    """All that a daemon has of it, on the machine of `here`."""
    where = netplace.place_of(folder, folder / "run")
    netplace.make(where)
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
def folder(tmp_path: Path) -> Iterator[Path]:
    tmp_path.chmod(0o755)
    yield tmp_path
    clean_up(tmp_path / "shim")
    where = netplace.place_of(tmp_path, tmp_path / "run")
    for key in where.names():
        netplace.drop(where, key)
    netplace.remove(where)


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
    folder: Path, image: Path, here: World
) -> None:
    where = netplace.place_of(folder, folder / "run")
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
    assert here.on_machine("cat", "/proc/sys/net/ipv4/ip_forward").strip() == "0"


@asynchronous
async def test_a_container_keeps_its_network_from_one_daemon_to_the_next(
    folder: Path, image: Path, here: World
) -> None:
    where = netplace.place_of(folder, folder / "run")
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
async def test_what_is_not_started_has_no_network(folder: Path, image: Path, here: World) -> None:
    where = netplace.place_of(folder, folder / "run")
    async with node(folder, image, here) as (rt, _):
        refused = await rt.prepare(replace(bridged(image, "bad.1", "true"), argv=("/bin/nothing-here",)))
        assert isinstance(refused, Exit)
        assert refused.reason is Reason.SPAWN_FAILED
        await until(lambda: only_rules(here, where))
        preparing = asyncio.create_task(rt.prepare(bridged(image, "late.1", "true")))
        await until(lambda: "late.1" in where.names())
        preparing.cancel()
        await asyncio.wait([preparing])
        await until(lambda: only_rules(here, where))
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


# --- without containers ----------------------------------------------------------------------------------------------


@asynchronous
async def test_many_come_and_go(here: World, where: Place) -> None:
    async with opened(where, here) as network:
        async with asyncio.TaskGroup() as tasks:
            made = [tasks.create_task(joined_for_good(network, f"t{i}.1")) for i in range(50)]
        assert len({task.result().address for task in made}) == 50
        for i in range(50):
            network.release(f"t{i}.1")
            network.release(f"t{i}.1")
        await until(lambda: only_rules(here, where))
        again = await joined_for_good(network, "t1.1")
        assert caught(again, OUTSIDE, here.serve(here.outside, OUTSIDE).port) == f"you are {MACHINE}"
        network.release("t1.1")
    assert left(here, where) == []


@asynchronous
async def test_addresses_that_are_used_up(here: World, where: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(where, here, subnet=TINY) as network:
        for i in range(5):
            await joined_for_good(network, f"t{i}.1")
        waiting = asyncio.create_task(joined_for_good(network, "late.1"))
        await asyncio.wait([waiting], timeout=0.2)
        assert not waiting.done()
        network.release("t3.1")
        assert (await waiting).address
        monkeypatch.setattr(networks, "ADDRESS_WAIT_S", 0.2)
        with pytest.raises(NoNetwork, match=r"all 5 addresses .*10\.77\.0\.0/29.* in use.*network_subnet"):
            await joined_for_good(network, "never.1")
        assert len(where.names()) == 5
        for key in where.names():
            network.release(key)
    assert left(here, where) == []


@asynchronous
async def test_two_nodes_of_one_machine_keep_out_of_each_others_way(here: World, where: Place, tmp_path: Path) -> None:
    outside = here.serve(here.outside, OUTSIDE)
    second = netplace.place_of(tmp_path / "second", tmp_path / "run")
    netplace.make(second)
    try:
        async with opened(where, here) as one:
            async with opened(second, here) as two:
                a, b = await joined_for_good(one, "a.1"), await joined_for_good(two, "b.1")
                assert (a.address[:9], b.address[:10]) == ("10.231.0.", "10.231.16.")
                for joined, other in ((a, b), (b, a)):
                    with within(other, "busybox", "nc", "-l", "-p", "80", "-e", "echo", "heard"):
                        assert caught(joined, OUTSIDE, outside.port) == f"you are {MACHINE}"
                        assert caught(joined, other.address, 80) == ""
                        call = ("busybox", "nc", "-w", "1", other.address, "80")
                        assert here.on_machine(*call, check=False) == "", "nor does the machine begin with one"
                two.release("b.1")
            assert here.on_machine("cat", "/proc/sys/net/ipv4/ip_forward").strip() == "1"
            assert caught(a, OUTSIDE, outside.port) == f"you are {MACHINE}"
            one.release("a.1")
        assert here.on_machine("cat", "/proc/sys/net/ipv4/ip_forward").strip() == "0"
    finally:
        for key in second.names():
            netplace.drop(second, key)
        netplace.remove(second)
    assert left(here, where) == []


@asynchronous
async def test_the_machine_does_not_become_a_router(here: World, where: Place) -> None:
    third = f"{here.outside}x"
    ip("netns", "add", third)
    try:
        ip("link", "add", "uplink1", "netns", here.machine, "type", "veth", "peer", "name", "lan0", "netns", third)
        for space, name, address in ((here.machine, "uplink1", "203.0.113.2"), (third, "lan0", "203.0.113.1")):
            ip("-n", space, "addr", "add", f"{address}/24", "dev", name)
            ip("-n", space, "link", "set", name, "up")
        ip("-n", third, "route", "add", "default", "via", "203.0.113.2")
        ip("-n", here.outside, "route", "add", "203.0.113.0/24", "via", MACHINE)
        here.on_machine("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        assert answers(third, OUTSIDE), "else this proves nothing"
        here.on_machine("sh", "-c", "echo 0 > /proc/sys/net/ipv4/ip_forward")
        async with opened(where, here) as network:
            joined = await joined_for_good(network, "a.1")
            assert caught(joined, "203.0.113.1", here.serve(third, "203.0.113.1").port) == "you are 203.0.113.2"
            assert not answers(third, OUTSIDE)
            assert not answers(third, joined.address), "nothing comes in"
            network.release("a.1")
    finally:
        ip("netns", "del", third, check=False)


@asynchronous
async def test_forwarding_stays_on_for_who_came_meanwhile(here: World, where: Place) -> None:
    async with opened(where, here):
        ip("-n", here.machine, "link", "add", "docker0", "type", "bridge")
    assert here.on_machine("cat", "/proc/sys/net/ipv4/ip_forward").strip() == "1"
    assert "spinetta" not in here.on_machine("nft", "list", "tables")


@asynchronous
async def test_from_another_network_namespace_nothing_is_changed_there(here: World, where: Place) -> None:
    async with opened(where, here) as network:
        await joined_for_good(network, "a.1")
    with world(forwards=True) as other:
        async with Network.open(where, NetworkSettings("n1"), keep=(), wanted=False, prefix=other.prefix):
            pass
        assert other.on_machine("cat", "/proc/sys/net/ipv4/ip_forward").strip() == "1"
    assert [line.split()[0] for line in left(here, where)] == ["table"], "no more than can be reached"
    assert not where.subnet.exists()


@asynchronous
async def test_more_can_be_refused(here: World, where: Place) -> None:
    outside = here.serve(here.outside, OUTSIDE)
    async with opened(where, here, refused=("198.51.100.0/25",)) as network:
        joined = await joined_for_good(network, "a.1")
        assert caught(joined, OUTSIDE, outside.port) == ""
        network.release("a.1")
    with world(forwards=True) as other:
        async with opened(where, other) as network:
            assert "forwarding_was_off" not in other.on_machine("nft", "list", "tables")
        assert other.on_machine("cat", "/proc/sys/net/ipv4/ip_forward").strip() == "1", "as it was before"


# --- killed ----------------------------------------------------------------------------------------------------------

DAEMON = """
import asyncio, os, signal, sys
from pathlib import Path
from spinetta.runtime import netcommands, netplace
from spinetta.runtime.network import Network, NetworkSettings

place, stage, moment, *prefix = sys.argv[1:]
count = -1
bare = asyncio.create_subprocess_exec

async def killed(*argv, **options):
    global count
    if count >= 0:
        count += 1
    if count == int(stage) and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    made = await bare(*argv, **options)
    if count == int(stage) and moment == "during":
        os.kill(os.getpid(), signal.SIGKILL)
    return made

async def main():
    global count
    settings = NetworkSettings("n1")
    async with Network.open(netplace.Place(Path(place)), settings, keep=(), prefix=prefix) as network:
        assert not network.trouble, network.trouble
        asyncio.create_subprocess_exec = killed
        count = 0
        async with network.joining("a.1"):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


@pytest.mark.parametrize("moment", ["before", "during"])
@pytest.mark.parametrize("stage", [1, 2, 3, 9])
@asynchronous
async def test_a_daemon_that_is_killed_at_any_stage_leaves_nothing_to_the_next(
    here: World, where: Place, stage: int, moment: str
) -> None:
    """1 makes the namespace, 2 is the plugin, 3 marks the cable, 9 never comes: then it is killed with a network."""
    argv = [sys.executable, "-c", DAEMON, str(where.folder), str(stage), moment, *here.prefix]
    done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "a.1" in where.names()
    async with opened(where, here) as network:
        assert only_rules(here, where), left(here, where)
        assert (await joined_for_good(network, "a.1")).address
        network.release("a.1")
    assert left(here, where) == []
    assert here.on_machine("cat", "/proc/sys/net/ipv4/ip_forward").strip() == "0"


@asynchronous
async def test_a_namespace_that_cannot_be_reached_any_more(here: World, where: Place) -> None:
    """As after a daemon with mounts of its own: the file is empty, and somebody else holds the namespace."""
    async with opened(where, here) as network:
        joined = await joined_for_good(network, "a.1")
        with within(joined, "sleep", "100"):
            netplace.unmount(Path(joined.netns_path))
            network.release("a.1")
            await until(lambda: only_rules(here, where))
        lost = await joined_for_good(network, "lost.1")
        shutil.rmtree(where.of("lost.1"))  # and what was written down is gone
        assert lost.address
    async with opened(where, here):
        assert only_rules(here, where), left(here, where)
    assert left(here, where) == []


@asynchronous
async def test_a_folder_that_is_gone_leaves_no_cable(here: World, where: Place, tmp_path: Path) -> None:
    async with opened(where, here) as network:
        joined = await joined_for_good(network, "a.1")
        with within(joined, "sleep", "100"):
            netplace.drop(where, "a.1")
            shutil.rmtree(where.leases / cni.NETWORK)
            async with opened(where, here):
                assert only_rules(here, where), left(here, where)


@asynchronous
async def test_a_subnet_stays_while_containers_have_addresses_of_it(here: World, where: Place) -> None:
    outside = here.serve(here.outside, OUTSIDE)
    async with opened(where, here) as network:
        joined = await joined_for_good(network, "a.1")
    async with opened(where, here, ("a.1",), subnet=TINY) as network:
        assert "10.231.0.0/20" in " ".join(network.warnings)
        assert caught(joined, OUTSIDE, outside.port) == f"you are {MACHINE}"
        network.release("a.1")
    async with opened(where, here, subnet=TINY) as network:
        assert (await joined_for_good(network, "b.1")).address.startswith("10.77.0.")
        network.release("b.1")
    assert left(here, where) == []


@asynchronous
async def test_when_it_is_not_allowed_any_more_what_runs_keeps_its_network(here: World, where: Place) -> None:
    outside = here.serve(here.outside, OUTSIDE)
    async with opened(where, here) as network:
        joined = await joined_for_good(network, "a.1")
    plain = NetworkSettings("n1")
    async with Network.open(where, plain, keep=("a.1",), wanted=False, prefix=here.prefix) as network:
        assert caught(joined, OUTSIDE, outside.port) == f"you are {MACHINE}"
        with pytest.raises(NoNetwork, match="does not allow"):
            await joined_for_good(network, "b.1")
        network.release("a.1")
    assert left(here, where) == []


# --- not to be had ---------------------------------------------------------------------------------------------------


async def trouble(where: Place, here: World, **changes: Any) -> str:
    async with Network.open(where, NetworkSettings("n1", **changes), keep=(), prefix=here.prefix) as network:
        assert left(here, where) == [], "what was tried is gone at once"
        with contextlib.suppress(NoNetwork):
            await joined_for_good(network, "a.1")
            raise AssertionError("it was made")
        return network.trouble


@asynchronous
async def test_why_it_is_not_to_be_had(
    here: World, where: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ip("-n", here.machine, "route", "add", "10.77.0.0/16", "dev", "uplink0")
    assert "has a route to 10.77.0.0/16 (uplink0)" in await trouble(where, here, subnet=TINY)
    with monkeypatch.context() as patch:
        patch.setattr(cni, "FOLDERS", (str(tmp_path),))
        assert "apt install containernetworking-plugins" in await trouble(where, here)
        for name in cni.PLUGINS:
            (tmp_path / name).write_text("#!/bin/sh\nexec sleep 100\n")
            (tmp_path / name).chmod(0o755)
        patch.setattr(netcommands, "COMMAND_S", 0.3)
        assert "ptp did not end within 0.3 s" in await trouble(where, here)
        for text, why in (
            ("echo nonsense", "no JSON"),
            ("head -c 3000000 /dev/zero", "no JSON"),
            ('echo \'{"code": 7, "msg": "not today", "details": "tired"}\'; exit 1', "not today: tired"),
            ('echo \'{"supportedVersions": ["0.2.0"]}\'', "it speaks none of the versions"),
            ('echo \'{"supportedVersions": ["1.0.0"]}\'', "a result without an address"),
        ):
            patch.setattr(netcommands, "COMMAND_S", 20.0)
            (tmp_path / "ptp").write_text(f"#!/bin/sh\n{text}\n")
            assert why in await trouble(where, here)
    with monkeypatch.context() as patch:
        patch.setattr(rules, "rules", lambda *_, **__: "table inet no such thing")
        assert "nft:" in await trouble(where, here)


def test_a_shim_that_was_there_before_sees_nothing(tmp_path: Path) -> None:
    apart = ("unshare", "--mount", "--propagation", "slave", "sh", "-c", "echo up; exec sleep 100")
    with running(*apart) as older, place(tmp_path) as where, running(*apart) as newer:
        assert netplace.passes_on_to(where, newer)
        assert not netplace.passes_on_to(where, older)
        assert not netplace.passes_on_to(where, 2**22 + 1)
