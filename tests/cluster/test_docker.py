"""A cluster of three containers, each a node with etcd, shim and runc in it, over a network of Docker's.

The engine is the one that is up, else one of our own; the image is made of this machine's files; Docker Compose,
through pytest-docker, brings the containers up and takes them down. Nothing of it is left behind.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.cluster import nodeimage
from tests.cluster.dockerd import Docker, NoDocker, engine, processes_naming
from tests.cluster.harness import API_PORT, eventually

pytestmark = pytest.mark.cluster

NODES = 3
DATA = "/data"  # a volume: an overlay, which the containers' own root is, cannot hold the overlays of tasks
SHARED = "/shared"  # a volume that all three see
READY_S = 90.0
DEMO_S = 120.0
VOLUME = {"driver_opts": {"type": "tmpfs", "device": "tmpfs", "o": "size=1g,mode=0755"}}
CHUNKS = 8
DEMO = nodeimage.ROOT / "examples" / "variants"
# What tasks in runc's containers may have of the nodes.
ALLOW = f"image:{nodeimage.DEMO_IMAGE},mount-rw:{SHARED},mount:{DEMO},mount:{nodeimage.EXAMPLES}"
# fmt: off
CAPABILITIES = [  # by number
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ",
]
# fmt: on
ENTRY = """#!/bin/sh
# Unless a container is privileged, Docker mounts /sys and the control groups read-only, and things over parts of /proc,
# without which the kernel lets no container in here mount a /proc of its own.
while read -r _ path _; do
    case $path in
        /proc/* | /sys/firmware) umount "$path" ;;
        /sys | /sys/fs/cgroup*) mount -o remount,bind,rw "$path" ;;
    esac
done </proc/mounts
until [ -s /run/token ]; do sleep 0.1; done # the test puts it there; empty for who founds the cluster: a blank
export SPINETTA_TOKEN="$(tr -d ' \\n' </run/token)"
[ -n "$SPINETTA_TOKEN" ] || unset SPINETTA_TOKEN
exec "$@"
"""


def missing_capabilities() -> list[str]:
    """What even root has not on this machine: Docker could not grant it, as `privileged` would try."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^CapBnd:\s*([0-9a-f]+)", status, re.MULTILINE)
    assert found is not None
    bounding = int(found[1], 16)
    return [name for bit, name in enumerate(CAPABILITIES) if not bounding >> bit & 1]


@dataclass(frozen=True)
class Nodes:
    """The containers."""

    docker: Docker
    project: str
    subnet: str

    def host(self, number: int) -> str:
        """The address of a node."""
        return f"{self.subnet}.{10 + number}"

    def name(self, number: int) -> str:
        """The container of a node."""
        return f"{self.project}-n{number}"

    def compose(self) -> dict[str, object]:
        """The Compose file."""
        services = {}
        for i in range(1, NODES + 1):
            join = [sys.executable, "-m", "spinetta.cli", "node", "join", "--name", f"n{i}", "--data-dir", DATA]
            join += ["--address", f"{self.host(i)}:{API_PORT}", "--cpus", "2", "--memory", "2GiB"]
            join += ["--allow", ALLOW]
            join += ["--peers", f"{self.host(1)}:{API_PORT}"] if i > 1 else []
            services[f"n{i}"] = {
                "image": self.project,
                "container_name": self.name(i),
                "hostname": f"n{i}",
                "command": ["/usr/bin/tini-static", "-g", "--", nodeimage.ENTRY, *join],
                # What `privileged` means, less what the machine itself has not.
                "cap_add": ["ALL"],
                "cap_drop": missing_capabilities(),
                "security_opt": ["seccomp:unconfined", "apparmor:unconfined"],
                "device_cgroup_rules": ["a *:* rwm"],
                "volumes": [f"data{i}:{DATA}", f"shared:{SHARED}"],
                "networks": {"cluster": {"ipv4_address": self.host(i)}},
            }
        return {
            "version": "3.7",
            "services": services,
            # In memory: three etcds on one disk that others write to lose their majority now and then.
            "volumes": dict.fromkeys(("shared", *(f"data{i}" for i in range(1, NODES + 1))), VOLUME),
            "networks": {"cluster": {"driver": "bridge", "ipam": {"config": [{"subnet": f"{self.subnet}.0/24"}]}}},
        }

    def inside(self, *command: str, node: int = 1, limit_s: float = 60.0, check: bool = True) -> str:
        """Run a command in a node's container, as the cluster's administrator."""
        env = {"SPINETTA_NODE": f"{self.host(node)}:{API_PORT}", "SPINETTA_CREDENTIALS": f"{DATA}/admin.pem"}
        options = [word for key, value in env.items() for word in ("--env", f"{key}={value}")]
        return self.docker("exec", *options, self.name(node), *command, limit_s=limit_s, check=check)

    def spinetta(self, *args: str, check: bool = True, limit_s: float = 60.0) -> str:
        """The command line, at the first node."""
        return self.inside(sys.executable, "-m", "spinetta.cli", *args, check=check, limit_s=limit_s)

    def start(self, number: int, token: str) -> None:
        """Let a node begin."""
        self.docker("exec", "--interactive", self.name(number), "sh", "-c", "cat >/run/token", stdin=token or " ")

    def ready(self) -> int:
        """How many nodes are ready, as the first one sees it."""
        said = self.spinetta("node", "list", "--json", check=False)
        return sum(n["status"] == "ready" for n in json.loads(said).get("nodes", ())) if said.startswith("{") else 0

    def await_ready(self, count: int) -> None:
        """Until so many are."""
        try:
            eventually(lambda: self.ready() >= count, within_s=READY_S, every_s=0.3, what=f"{count} nodes ready")
        except AssertionError as e:
            logs = [self.docker("logs", "--tail", "20", self.name(i), check=False) for i in range(1, NODES + 1)]
            raise AssertionError(f"{e}\n" + "\n---\n".join(logs)) from None


@pytest.fixture(scope="session")
def docker() -> Iterator[Docker]:
    try:
        with engine() as found:
            yield found
    except NoDocker as e:
        pytest.skip(f"no Docker: {e}")


@pytest.fixture(scope="session")
def nodes(docker: Docker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """The image, and what the containers will be; they are not up yet."""
    found = Nodes(
        docker, f"spinetta-{random.randrange(16**8):08x}", f"10.{random.randint(64, 250)}.{random.randint(0, 250)}"
    )
    tar = tmp_path_factory.mktemp("docker") / "node.tar"
    nodeimage.write(tar, ENTRY)
    docker("import", str(tar), found.project, limit_s=120)
    tar.unlink()
    yield found
    # `docker-compose down` has removed all but the image, unless `up` has failed.
    label = f"label=com.docker.compose.project={found.project}"
    for kind, remove in (("container", ("--force", "--volumes")), ("network", ()), ("volume", ())):
        left = docker(kind, "ls", "--quiet", *(["--all"] if kind == "container" else []), "--filter", label).split()
        if left:
            docker(kind, "rm", *remove, *left)
    docker("image", "rm", "--force", found.project)


# What pytest-docker asks for.


@pytest.fixture(scope="session")
def docker_compose_command() -> str:
    return "docker-compose"  # Debian's


@pytest.fixture(scope="session")
def docker_compose_project_name(nodes: Nodes) -> str:
    return nodes.project


@pytest.fixture(scope="session")
def docker_compose_file(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("compose") / "docker-compose.yml"
    path.write_text(yaml.safe_dump(nodes.compose()))
    return str(path)


@pytest.fixture(scope="session")
def docker_setup() -> list[str]:
    return ["up --detach --no-build"]


@pytest.fixture(scope="session")
def docker_cleanup() -> list[str]:
    return ["down --volumes --timeout 5"]


@pytest.fixture(scope="session", autouse=True)
def docker_host(docker: Docker) -> Iterator[None]:
    """Where Compose, which reads the environment, finds the engine."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DOCKER_HOST", "DOCKER_CONFIG"):
            if name in docker.env:
                patch.setenv(name, docker.env[name])
        yield


@pytest.fixture(scope="session")
def cluster(nodes: Nodes, docker_host: None, docker_services: object) -> Nodes:
    """Three nodes that are ready: a secured cluster, as it must be off loopback."""
    nodes.start(1, "")
    nodes.await_ready(1)
    for i in range(2, NODES + 1):
        nodes.start(i, str(json.loads(nodes.spinetta("token", "create", "--role", "voter", "--json"))["token"]))
    nodes.await_ready(NODES)
    return nodes


@pytest.mark.timeout(400)  # it takes 25 s on two idle cores; with what brings the containers up and down
def test_the_demonstration_runs_in_a_cluster_of_containers(cluster: Nodes) -> None:
    addresses = ",".join(f"{cluster.host(i)}:{API_PORT}" for i in range(1, NODES + 1))
    options = ["--chunks", str(CHUNKS), "--work", f"{SHARED}/demo", "--nodes", addresses]
    said = cluster.inside(
        sys.executable, str(DEMO / "demo.py"), "--image", nodeimage.DEMO_IMAGE, *options, limit_s=DEMO_S
    )
    assert "88 variants on the cluster" in said, said
    assert "the records are the same" in said, said
    ended = json.loads(cluster.spinetta("list", "--outcome", "succeeded", "--json"))["tasks"]
    assert len(ended) == 3 + CHUNKS + 2, said
    again = [(t["name"], t["attempts"]) for t in ended if len(t["attempts"]) != 1]
    assert not again, f"{again}\n{said}"
    assert len({task["node"] for task in ended}) > 1, said


def test_an_engine_of_our_own_leaves_nothing() -> None:
    try:
        with engine(own=True) as docker:
            folder = Path(docker.host.removeprefix("unix://")).parent
            layer = folder / "layer.tar"
            with tarfile.TarFile(layer, "w") as tar:
                tar.add("/usr/bin/busybox", "bin/busybox")
            docker("import", str(layer), "tiny")
            said = docker("run", "--rm", "--cap-drop", "ALL", "--network", "none", "tiny", "/bin/busybox", "hostname")
            assert re.fullmatch(r"[0-9a-f]{12}\n", said)
    except NoDocker as e:
        pytest.skip(f"no Docker: {e}")
    assert not folder.exists()
    assert folder.name not in Path("/proc/self/mountinfo").read_text()
    assert not [top for top, _, _ in os.walk("/sys/fs/cgroup") if Path(top).name == folder.name]
    eventually(lambda: not processes_naming(folder.name), within_s=60, what="what was killed is gone")
