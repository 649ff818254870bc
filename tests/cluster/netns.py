"""A network of its own for each node: network namespaces on one bridge, made and removed by the test."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.harness import Cluster, Node


def can_make_namespaces() -> bool:
    """Whether this process may, and the tools are there."""
    return os.geteuid() == 0 and shutil.which("ip") is not None and shutil.which("nsenter") is not None


def ip(*args: str, check: bool = True) -> None:
    """Run ip(8)."""
    done = subprocess.run(["ip", *args], capture_output=True, text=True, timeout=30, check=False)
    if check and done.returncode != 0:
        raise AssertionError(f"ip {' '.join(args)}: {done.stderr}")


@dataclass
class NetCluster(Cluster):
    """Nodes that reach each other over a bridge, each from a namespace of its own; the test reaches all of them."""

    tag: str = ""
    spaces: list[str] = field(default_factory=list)

    @property
    def bridge(self) -> str:
        """Its name."""
        return f"sp{self.tag}"

    def open(self) -> None:
        """Make the bridge; the test's own address ends in 254."""
        ip("link", "add", self.bridge, "type", "bridge")
        ip("addr", "add", f"{self.base}254/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")

    def place(self, node: Node) -> None:
        """A namespace for a node, with its address on the bridge."""
        number = node.host.rpartition(".")[2]
        space, outer, inner = (f"sp{self.tag}{part}{number}" for part in ("n", "o", "i"))
        ip("netns", "add", space)
        self.spaces.append(space)
        ip("link", "add", outer, "type", "veth", "peer", "name", inner)
        ip("link", "set", inner, "netns", space)
        ip("link", "set", outer, "master", self.bridge)
        ip("link", "set", outer, "up")
        ip("-n", space, "addr", "add", f"{node.host}/24", "dev", inner)
        ip("-n", space, "link", "set", inner, "up")
        ip("-n", space, "link", "set", "lo", "up")
        # Not `ip netns exec`: it mounts /sys anew, and the node would find no control groups.
        node.prefix = ("nsenter", f"--net=/run/netns/{space}")

    def cut(self, node: Node, *, off: bool) -> None:
        """Take a node off the network, or put it back."""
        number = node.host.rpartition(".")[2]
        ip("link", "set", f"sp{self.tag}o{number}", "down" if off else "up")

    def close(self) -> None:
        """Remove all that was made, whatever of it there is."""
        for space in self.spaces:
            ip("netns", "del", space, check=False)
        ip("link", "del", self.bridge, check=False)


@contextlib.contextmanager
def network(directory: Path, *options: str) -> Iterator[NetCluster]:
    """A secured cluster without nodes yet, on a network of its own; everything of it ends with the block."""
    base = f"10.{random.randint(64, 250)}.{random.randint(0, 250)}."
    cluster = NetCluster(directory, base, options, secured=True, tag=f"{random.randrange(16**5):05x}")
    cluster.open()
    try:
        yield cluster
    finally:
        cluster.stop()
        cluster.close()
