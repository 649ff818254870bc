"""A machine, and the world outside of it, as two network namespaces; and what tests ask of containers' networks."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from spinetta.runtime import netplace
from spinetta.runtime.netattempts import Joined
from spinetta.runtime.netgates import NetworkSettings
from spinetta.runtime.netplace import Place
from spinetta.runtime.network import Network

OUTSIDE, MACHINE = "198.51.100.1", "198.51.100.2"  # reserved for documents: nothing real is meant
THIRD = "203.0.113.1"  # too
TINY = "10.77.0.0/29"  # five addresses
NETWORKS = [pytest.mark.contract, pytest.mark.skipif(os.geteuid() != 0, reason="only root makes networks")]


def ip(*args: str, check: bool = True) -> str:
    """Run ip(8); what it printed."""
    done = subprocess.run(["ip", *args], capture_output=True, text=True, timeout=30, check=False)
    assert not check or done.returncode == 0, f"ip {' '.join(args)}: {done.stderr}"
    return done.stdout


@dataclass
class World:
    """`machine` and `outside` are names of namespaces below /run/netns."""

    machine: str
    outside: str
    servers: list[Server] = field(default_factory=list)

    @property
    def prefix(self) -> tuple[str, ...]:
        """Put before a command, it runs on the machine."""
        return ("nsenter", f"--net=/run/netns/{self.machine}")

    def on_machine(self, *argv: str, check: bool = True) -> str:
        """What a program prints there."""
        return self._run(self.machine, *argv, check=check)

    def outside_of_it(self, *argv: str, check: bool = True) -> str:
        """What a program prints outside."""
        return self._run(self.outside, *argv, check=check)

    def _run(self, space: str, *argv: str, check: bool = True) -> str:
        command = ["nsenter", f"--net=/run/netns/{space}", *argv]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert not check or done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout

    def serve(self, space: str, address: str, *, udp: bool = False, port: int = 0) -> Server:
        """A server that says whom it heard; it ends with the world."""
        made = Server(space, address, udp=udp, port=port)
        self.servers.append(made)
        return made


class Server:
    """Answers each caller with the caller's own address, from within a namespace."""

    def __init__(self, space: str, address: str, *, udp: bool, port: int) -> None:
        self.heard: list[str] = []
        self._udp = udp
        kind = socket.SOCK_DGRAM if udp else socket.SOCK_STREAM
        self._sock = made_in(space, kind, address)
        self._sock.bind((address, port))
        self._sock.settimeout(0.2)
        if not udp:
            self._sock.listen(16)
        self.port = int(self._sock.getsockname()[1])
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                if self._udp:
                    data, caller = self._sock.recvfrom(2048)
                    self.heard.append(caller[0])
                    self._sock.sendto(answer_to(data), caller)
                else:
                    connection, caller = self._sock.accept()
                    with connection:
                        self.heard.append(caller[0])
                        connection.sendall(f"you are {caller[0]}\n".encode())

    def close(self) -> None:
        """End it."""
        self._ended.set()
        self._thread.join()
        self._sock.close()


def answer_to(question: bytes) -> bytes:
    """A nameserver's answer: every name is that of the world outside."""
    end = question.index(b"\0", 12) + 5
    found = b"\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04" + socket.inet_aton(OUTSIDE)
    is_ipv4 = question[end - 4 : end - 2] == b"\0\x01"
    count = b"\0\x01" if is_ipv4 else b"\0\0"
    return question[:2] + b"\x81\x80\0\x01" + count + b"\0\0\0\0" + question[12:end] + (found if is_ipv4 else b"")


def made_in(space: str, kind: int, address: str, protocol: int = 0) -> socket.socket:
    """A socket of a namespace: it stays there, whoever uses it."""
    made: list[socket.socket] = []
    family = socket.AF_INET6 if ":" in address else socket.AF_INET

    def make() -> None:  # in a thread, which ends with its namespace
        import ctypes

        with open(f"/run/netns/{space}") as there:  # noqa: PTH123
            assert ctypes.CDLL(None, use_errno=True).setns(there.fileno(), 0x4000_0000) == 0
        made.append(socket.socket(family, kind, protocol))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


@contextlib.contextmanager
def world(*, forwards: bool = False) -> Iterator[World]:
    """A machine that reaches the outside by its only cable; all of it is gone after the block."""
    tag = f"{random.randrange(16**6):06x}"
    made = World(f"spm{tag}", f"spw{tag}")
    try:
        for space in (made.machine, made.outside):
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
        cable((made.machine, "uplink0", MACHINE), (made.outside, "lan0", OUTSIDE))
        ip("-n", made.machine, "route", "add", "default", "via", OUTSIDE)
        made.on_machine("sh", "-c", f"echo {int(forwards)} > /proc/sys/net/ipv4/ip_forward")
        yield made
    finally:
        for server in made.servers:
            server.close()
        for space in (made.machine, made.outside):
            ip("netns", "del", space, check=False)


def cable(*ends: tuple[str, str, str]) -> None:
    """Between two namespaces: of each its name, that of the interface there, and the address that it gets."""
    (space, name, _), (there, peer, _) = ends
    ip("link", "add", name, "netns", space, "type", "veth", "peer", "name", peer, "netns", there)
    for space, name, address in ends:
        ip("-n", space, "addr", "add", f"{address}/24", "dev", name)
        ip("-n", space, "link", "set", name, "up")


@contextlib.contextmanager
def third(here: World, interface: str) -> Iterator[str]:
    """A namespace at another cable of the machine's, which has the address `THIRD`; the way is known to all."""
    name = f"{here.outside}x"
    ip("netns", "add", name)
    try:
        cable((here.machine, interface, "203.0.113.2"), (name, "lan0", THIRD))
        ip("-n", name, "route", "add", "default", "via", "203.0.113.2")
        ip("-n", here.outside, "route", "add", "203.0.113.0/24", "via", MACHINE)
        yield name
    finally:
        ip("netns", "del", name, check=False)


@contextlib.contextmanager
def place(folder: Path, run: Path | None = None) -> Iterator[Place]:
    """A node's place, below a folder of the test's; nothing of it is left."""
    made = netplace.place_of(folder, run or folder / "run")
    netplace.make(made)
    try:
        yield made
    finally:
        for key in made.names():
            netplace.drop(made, key)
        netplace.remove(made)


def left(made: World, where: Place) -> list[str]:
    """What is there of containers' networks: interfaces, rules, mounts, addresses in use, files."""
    links = ip("-n", made.machine, "-o", "link", "show").splitlines()
    found = [line for line in links if "uplink0" not in line and ": lo:" not in line]
    found += [t for t in made.on_machine("nft", "list", "tables").splitlines() if "spinetta" in t]
    found += where.names()
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    found += [line for line in mounts if f"{where.folder}/" in line]
    found += [str(path) for path in where.leases.glob("*/*.*.*.*")]
    return found


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


async def joined_for_good(network: Network, key: str) -> Joined:
    async with network.joining(key) as joined:
        return joined


def caught(joined: Joined, address: str, port: int) -> str:
    """What a program in the container's namespace hears from a server; empty: nothing."""
    command = ["nsenter", f"--net={joined.netns_path}", "busybox", "nc", "-w", "2", address, str(port)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip()


def answers(space: str, address: str) -> bool:
    """Whether somebody hears an address from within a namespace."""
    command = ["nsenter", f"--net=/run/netns/{space}", "busybox", "ping", "-c", "1", "-W", "1", address]
    return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0


def forwards(here: World) -> bool:
    """Whether the machine does."""
    return here.on_machine("cat", "/proc/sys/net/ipv4/ip_forward").strip() == "1"
