"""Networks of containers, with the real plugins and rules: what is reached, what is refused, and what is left."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spinetta import cni
from spinetta import network as rules
from spinetta.runtime import netattempts, netcommands, netplace
from spinetta.runtime import network as networks
from spinetta.runtime.netattempts import Joined, NoNetwork
from spinetta.runtime.netgates import NetworkSettings
from spinetta.runtime.netplace import Place
from spinetta.runtime.network import Network
from tests.contract.nets import (
    MACHINE,
    NETWORKS,
    OUTSIDE,
    THIRD,
    TINY,
    World,
    answers,
    caught,
    forwards,
    ip,
    joined_for_good,
    left,
    only_rules,
    opened,
    place,
    third,
    world,
)
from tests.contract.shims import asynchronous, until

pytestmark = NETWORKS


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
        monkeypatch.setattr(netattempts, "ADDRESS_WAIT_S", 0.2)
        with pytest.raises(NoNetwork, match=r"all 5 addresses .*10\.77\.0\.0/29.* in use.*network_subnet"):
            await joined_for_good(network, "never.1")
        assert len(where.names()) == 5
        for key in where.names():
            network.release(key)
    assert left(here, where) == []


@asynchronous
async def test_two_nodes_of_one_machine_keep_out_of_each_others_way(here: World, where: Place, tmp_path: Path) -> None:
    outside = here.serve(here.outside, OUTSIDE)
    with place(tmp_path / "second", tmp_path / "run") as second:
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
            assert forwards(here)
            assert caught(a, OUTSIDE, outside.port) == f"you are {MACHINE}"
            one.release("a.1")
        assert not forwards(here)
    assert left(here, where) == []


@asynchronous
async def test_the_machine_does_not_become_a_router(here: World, where: Place) -> None:
    with third(here, "uplink1") as space:
        here.on_machine("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        assert answers(space, OUTSIDE), "else this proves nothing"
        here.on_machine("sh", "-c", "echo 0 > /proc/sys/net/ipv4/ip_forward")
        async with opened(where, here) as network:
            joined = await joined_for_good(network, "a.1")
            assert caught(joined, THIRD, here.serve(space, THIRD).port) == "you are 203.0.113.2"
            assert not answers(space, OUTSIDE)
            assert not answers(space, joined.address), "nothing comes in"
            network.release("a.1")


@asynchronous
async def test_forwarding_stays_on_for_who_came_meanwhile(here: World, where: Place) -> None:
    async with opened(where, here):
        ip("-n", here.machine, "link", "add", "docker0", "type", "bridge")
    assert forwards(here)
    assert "spinetta" not in here.on_machine("nft", "list", "tables")


@asynchronous
async def test_from_another_network_namespace_nothing_is_changed_there(here: World, where: Place) -> None:
    async with opened(where, here) as network:
        await joined_for_good(network, "a.1")
    with world(forwards=True) as other:
        async with Network.open(where, NetworkSettings("n1"), keep=(), wanted=False, prefix=other.prefix):
            pass
        assert forwards(other)
    assert only_rules(here, where), "no more than can be reached"
    assert not where.subnet.exists()


@asynchronous
async def test_rules_that_somebody_removes_are_put_back(
    here: World, where: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "GUARD_EVERY_S", 0.1)
    ours = here.serve(here.machine, MACHINE)
    async with opened(where, here) as network:
        joined = await joined_for_good(network, "a.1")
        before = here.on_machine("nft", "list", "ruleset")
        here.on_machine("nft", "flush", "ruleset")
        await until(lambda: here.on_machine("nft", "list", "ruleset") == before)
        assert caught(joined, MACHINE, ours.port) == ""
        network.release("a.1")
        await until(lambda: only_rules(here, where))
        here.on_machine("nft", "flush", "ruleset")
        again = await joined_for_good(network, "b.1")  # looked at before it is there
        assert caught(again, MACHINE, ours.port) == ""
        network.release("b.1")
    assert left(here, where) == []


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
        assert forwards(other), "as it was before"


# --- killed ----------------------------------------------------------------------------------------------------------

DAEMON = """
import asyncio, os, signal, sys
from pathlib import Path
from spinetta.node.networks import network_place, open_network
from spinetta.runtime import netcommands, netplace
from spinetta.runtime.netgates import NetworkSettings
from spinetta.runtime.network import Network

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


@pytest.mark.parametrize(
    ("stage", "moment"), [(2, "during"), (3, "before"), (3, "during"), (4, "during"), (9, "before")]
)
@asynchronous
async def test_a_daemon_that_is_killed_at_any_stage_leaves_nothing_to_the_next(
    here: World, where: Place, stage: int, moment: str
) -> None:
    """2 makes the namespace, 3 is the plugin, 4 marks the cable, 9 never comes: then it is killed with a network."""
    argv = [sys.executable, "-c", DAEMON, str(where.folder), str(stage), moment, *here.prefix]
    done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "a.1" in where.names()
    async with opened(where, here) as network:
        assert only_rules(here, where), left(here, where)
        assert (await joined_for_good(network, "a.1")).address
        network.release("a.1")
    assert left(here, where) == []
    assert not forwards(here)


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
