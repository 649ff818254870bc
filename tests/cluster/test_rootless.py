"""A node of a user without rights, started as `spinetta doctor` tells that user to: it runs containers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from spinetta.runtime.detect import find_program
from spinetta.runtime.groups import Groups
from tests.cluster.harness import API_PORT, eventually, free_base
from tests.contract.machines import UID, Machine, machine

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(150),
    pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to be another user"),
]
PYTHON = ("/usr/bin/python3", "-m", "spinetta.cli")
READY_S = 60.0


def spinetta(here: Machine, *arguments: str, address: str, check: bool = True) -> str:
    done = subprocess.run(
        here.argv([*PYTHON, *arguments]), env={**here.env(), "SPINETTA_NODE": address}, cwd=here.home,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def allowed(here: Machine, address: str) -> list[str]:
    """What the node says that it allows; nothing while it does not answer."""
    text = spinetta(here, "node", "list", "--json", address=address, check=False)
    nodes: list[dict[str, Any]] = json.loads(text).get("nodes", []) if text else []
    return [str(word) for node in nodes if node["status"] == "ready" for word in node["allows"]]


def test_a_node_without_root_runs_containers() -> None:
    if not (find_program("newuidmap") and find_program("runc")):
        pytest.skip("there is no newuidmap or no runc")
    address, group = f"{free_base(1)}1:{API_PORT}", Path("/sys/fs/cgroup") / f"spinetta-test-{os.getpid()}"
    delegated = [  # as systemd does it for a service of a user on a machine with version 2
        "umount -R /sys/fs/cgroup", "mount -t cgroup2 none /sys/fs/cgroup", f"mkdir -p {group}/own",
        f"chown -R {UID} {group}", f"echo $$ > {group}/own/cgroup.procs",
    ]  # fmt: skip
    with machine(uid=UID, ids=True, before=delegated) as here:
        if here.run("/usr/bin/python3", "-c", "import click, grpc, psutil, cryptography, aetcd").returncode != 0:
            pytest.skip("another user cannot read the packages of this Python")
        doctor = json.loads(spinetta(here, "doctor", "--json", "--only", "runtime", address=address))
        [mend] = [
            f["mend"] for f in doctor["findings"] if "namespace" in f["seen"] and f["mend"].startswith("start it")
        ]
        command = mend.partition(": ")[2].removesuffix(" spinetta node join").split()
        image = here.home / "image"
        (image / "bin").mkdir(parents=True)
        shutil.copy("/bin/busybox", image / "bin")
        data_dir = f"{here.home}/data/n1"
        join = ["--name", "n1", "--address", address, "--data-dir", data_dir, "--allow", f"image:{image}"]
        join += ["--container-program", "runc", "--cpus", "1", "--memory", "1GiB", "--lease-ttl", "5s"]
        log = here.home / "log"
        with (
            log.open("wb") as out,
            subprocess.Popen(
                here.argv([*command, *PYTHON, "node", "join", *join]),
                env=here.env(),
                cwd=here.home,
                stdout=out,
                stderr=out,
            ) as node,
        ):
            try:
                eventually(lambda: allowed(here, address), within_s=READY_S, every_s=0.5, what="the node is ready")
                assert "container" in allowed(here, address), log.read_text()
                script = "busybox id -u; busybox cat /proc/self/uid_map; busybox touch /work/mine && busybox ls /work"
                said = spinetta(
                    here, "submit", "--follow", "--image", str(image), "--memory", "64MiB", "--",
                    "/bin/busybox", "sh", "-c", script, address=address,
                )  # fmt: skip
            except AssertionError as e:
                raise AssertionError(f"{e}\n{log.read_text()}") from e
            finally:
                spinetta_stop(here, data_dir, address)
                node.wait(30)
                remove_groups(group.name)
    user, ids, file = said.split("\n")[:3]
    # Root in the container is the first of the user's own range, and nobody outside.
    assert (user, ids.split(), file) == ("1000", ["0", "1", "65536"], "mine")


def spinetta_stop(here: Machine, data_dir: str, address: str) -> None:
    spinetta(here, "node", "stop", "--data-dir", data_dir, address=address, check=False)


def remove_groups(name: str) -> None:
    """What the test has made, where this machine has version 2 mounted."""
    for mount in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
        if (Path(mount) / name).is_dir():
            folders = sorted((p for p in (Path(mount) / name).rglob("*") if p.is_dir()), reverse=True)
            groups = Groups("v2", (), (), "", "", (*folders, Path(mount) / name))
            eventually(lambda groups=groups: not groups.remove_trials(), within_s=60, what="its groups go")  # type: ignore[misc]
