"""scripts/devcluster.sh, as a user runs it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.harness import alive, free_base

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "devcluster.sh"
LIMIT_S = 170


class Devcluster:
    """The script with a state directory and addresses of its own."""

    def __init__(self, state: Path, base: str) -> None:
        self.state = state
        self.base = base

    def __call__(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        # The spinetta of this environment, whichever it is.
        env = {**os.environ, "SPINETTA_VENV": str(Path(sys.executable).parent.parent)}
        done = subprocess.run(
            [str(SCRIPT), "--state", str(self.state), *args],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=env,
        )  # fmt: skip
        if check:
            assert done.returncode == 0, f"{args} → {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def pids(self, name: str) -> tuple[int, int]:
        """Daemon and shim of a node."""
        daemon = int((self.state / f"{name}.pid").read_text().split()[0])
        shim = json.loads((self.state / name / "shim" / "shim.json").read_text())
        return daemon, int(shim["pid"])

    def cgroups(self) -> list[Path]:
        """The control groups that its shims made."""
        files = self.state.glob("n*/shim/shim.json")
        return [Path(group) for file in files for group in json.loads(file.read_text())["cgroups"]]


@pytest.fixture
def devcluster(tmp_path: Path) -> Iterator[Devcluster]:
    cluster = Devcluster(tmp_path / "state", free_base(4))
    yield cluster
    cluster("down", check=False)


@pytest.mark.timeout(600)
def test_a_life(devcluster: Devcluster) -> None:
    first = devcluster("up", "--base", devcluster.base)
    assert "3 nodes are up after" in first.stdout
    before = {name: devcluster.pids(name) for name in ("n1", "n2", "n3")}

    # Twice is as good as once.
    assert "3 nodes are up (" in devcluster("up").stdout
    assert {name: devcluster.pids(name) for name in before} == before

    status = devcluster("status").stdout
    assert all(f"{name} " in status and str(pid) in status for name, (pid, _) in before.items())

    # Killed is killed, and `up` mends it.
    devcluster("kill", "n2")
    assert not any(alive(pid) for pid in before["n2"])
    assert "n2 is not running" in devcluster("kill", "n2", check=False).stderr
    assert f"starting n2 again at {devcluster.base}2:7220" in devcluster("up").stdout
    devcluster("kill", "n3")
    assert "n3 is up" in devcluster("start", "n3").stdout
    assert "n3 is running" in devcluster("start", "n3").stdout

    pids = [pid for name in before for pid in devcluster.pids(name)]
    groups = devcluster.cgroups()
    assert all(alive(pid) for pid in pids)
    assert "3 nodes are down" in devcluster("down").stdout
    assert not any(alive(pid) for pid in pids)
    assert not any(group.exists() for group in groups)
    assert not devcluster.state.exists()
    assert "no cluster in" in devcluster("down").stdout


@pytest.mark.timeout(600)
def test_a_crashed_node_leaves_nothing_either(devcluster: Devcluster) -> None:
    devcluster("up", "1", "--base", devcluster.base)
    groups = devcluster.cgroups()
    devcluster("kill", "n1")
    devcluster("down")
    assert not devcluster.state.exists()
    assert not any(group.exists() for group in groups)


@pytest.mark.timeout(600)
def test_one_secured_node_is_up_when_it_says_so(devcluster: Devcluster) -> None:
    devcluster("up", "1", "--tls", "--base", devcluster.base)
    assert submitted(devcluster, "--wait", "--", "true").returncode == 0


@pytest.mark.timeout(600)
def test_a_node_that_cannot_start_is_told(devcluster: Devcluster) -> None:
    failed = devcluster("up", "1", "--cpus", "many", "--base", devcluster.base, check=False)
    assert failed.returncode == 1
    assert "n1 ended" in failed.stderr
    assert "many" in failed.stderr, "the node's own words"


def submitted(devcluster: Devcluster, *args: str) -> subprocess.CompletedProcess[str]:
    """`spinetta submit --wait` as somebody runs it who has done what `env` says."""
    said = devcluster("env").stdout
    return subprocess.run(
        ["bash", "-c", f'eval "$1"; shift; exec {sys.executable} -m spinetta.cli submit "$@"', "bash", said, *args],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip


@pytest.mark.timeout(600)
def test_a_secured_cluster_with_a_worker(devcluster: Devcluster) -> None:
    up = devcluster("up", "4", "--workers", "1", "--tls", "--base", devcluster.base)
    assert "4 nodes are up after" in up.stdout
    assert "Traceback" not in up.stderr
    assert stat.S_IMODE((devcluster.state / "n1" / "admin.pem").stat().st_mode) == 0o600
    assert not list(devcluster.state.glob("*.token")), "tokens are used up"
    env = devcluster("env").stdout
    assert f"SPINETTA_CREDENTIALS={devcluster.state}/n1/admin.pem\n" in env
    assert f"{devcluster.base}3:7220\n" in env, "users ask voters"
    rows = [line.split() for line in devcluster("status").stdout.splitlines() if line.startswith("n")]
    assert {(row[0], row[3]) for row in rows if row[2] == "ready"} == {
        ("n1", "voter"), ("n2", "voter"), ("n3", "voter"), ("n4", "worker")
    }  # fmt: skip

    done = submitted(devcluster, "--follow", "--tag", "worker", "--", "sh", "-c", 'echo "$SPINETTA_NODE_NAME"')
    assert (done.returncode, done.stdout.split()[-1]) == (0, "n4"), done.stderr
    done = submitted(devcluster, "--follow", "--tag", "n2", "--", "sh", "-c", 'echo "$SPINETTA_NODE_NAME"')
    assert (done.returncode, done.stdout.split()[-1]) == (0, "n2"), done.stderr

    # It has been let in once, and needs no token any more.
    devcluster("kill", "n4")
    assert "n4 is up" in devcluster("start", "n4").stdout
    assert not (devcluster.state / "n4.token").exists()
    assert submitted(devcluster, "--wait", "--tag", "worker", "--", "true").returncode == 0

    # What it is was told once; what contradicts it is refused.
    assert "4 nodes are up (" in devcluster("up", "--tls", "--workers", "1").stdout
    assert "has 3 voters" in devcluster("up", "--workers", "2", check=False).stderr

    pids = [pid for name in ("n1", "n2", "n3", "n4") for pid in devcluster.pids(name)]
    assert all(alive(pid) for pid in pids)
    groups = devcluster.cgroups()
    assert "4 nodes are down" in devcluster("down").stdout
    assert not any(alive(pid) for pid in pids)
    assert not any(group.exists() for group in groups)
    assert not devcluster.state.exists()


@pytest.mark.timeout(600)
def test_an_open_cluster_with_a_worker(devcluster: Devcluster) -> None:
    devcluster("up", "2", "--workers", "1", "--base", devcluster.base)
    assert "export SPINETTA_CREDENTIALS=none\n" in devcluster("env").stdout
    done = submitted(devcluster, "--follow", "--tag", "worker", "--", "sh", "-c", 'echo "$SPINETTA_NODE_NAME"')
    assert (done.returncode, done.stdout.split()[-1]) == (0, "n2"), done.stderr
    assert "has --tls off" in devcluster("up", "--tls", check=False).stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["up", "zero"], "up takes a number of nodes, not zero"),
        (["up", "0"], "up takes a number of nodes, not 0"),
        (["up", "33"], "33 nodes are too many"),
        (["up", "--workers", "x"], "--workers takes a number, not x"),
        (["up", "2", "--workers", "2"], "2 workers of 2 nodes"),
        (["kill", "n1"], "no cluster in"),
        (["logs", "n1"], "no cluster in"),
        (["fly"], "no command fly"),
        (["--wings"], "unknown option --wings"),
        (["up", "--base"], "--base needs a value"),
    ],
)
def test_mistakes(tmp_path: Path, args: list[str], message: str) -> None:
    done = Devcluster(tmp_path / "state", "127.0.0.")(*args, check=False)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "state").exists()


def test_a_directory_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    cluster = Devcluster(tmp_path, "127.0.0.")
    assert "is not empty and holds no cluster of mine" in cluster("up", check=False).stderr
    cluster("down")
    assert (tmp_path / "mine").read_text() == "precious"
