"""The command line and the Python client against real nodes: exit codes, streams, Ctrl-C, and a node that dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from spinetta.client import AsyncClient, Client, TaskFilter, make_spec
from spinetta.model import Outcome, State
from tests.cluster.harness import Cluster, eventually, free_base

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

QUICK = ("--lease-ttl", "3s", "--grace", "8s", "--kill-margin", "2s", "--cpus", "4", "--memory", "2GiB")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A voter tagged `home` and a worker tagged `away`."""
    cluster = Cluster(tmp_path_factory.mktemp("pair"), free_base(2), QUICK)
    try:
        cluster.add("--tags", "home", "--countables", "gpu=1")
        cluster.wait_ready()
        cluster.add("--tags", "away")
        cluster.wait_ready()
        yield cluster
    finally:
        cluster.stop()


def popen(cluster: Cluster, *argv: str, node: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "spinetta.cli", *argv],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "SPINETTA_NODE": cluster.nodes[node].address},
    )  # fmt: skip


def state(cluster: Cluster, task_id: str) -> str:
    return str(cluster.json("status", task_id)["tasks"][0]["state"])


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (("--", "true"), 0, ""),
        (("--", "sh", "-c", "exit 7"), 7, "failed (7)"),
        (("--", "sh", "-c", "kill -TERM $$"), 143, "failed (signal 15)"),
        (("--time", "500ms", "--", "sleep", "60"), 124, "failed (walltime)"),
        (("--", "/no/such/program"), 126, "failed (spawn-failed)"),
        (("--workdir", "/no/such/place", "--", "true"), 126, "failed (spawn-failed)"),
        (("--memory", "24MiB", "--", sys.executable, "-c", "x = 'a' * 10**9"), 137, "failed (out-of-memory)"),
        (("--gpu", "1", "--tag", "home", "--", "true"), 0, ""),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else None,
)
def test_waiting_ends_as_the_task_does(pair: Cluster, argv: Sequence[str], code: int, words: str) -> None:
    done = pair.cli("submit", "--wait", *argv, check=False)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert len(done.stdout.strip()) == 36


def test_what_a_running_task_uses_is_told_by_any_node(pair: Cluster) -> None:
    task_id = pair.cli("submit", "--tag", "away", "--", "sh", "-c", "sleep 60 & sleep 60").stdout.strip()

    def now() -> dict[str, int] | None:
        found: dict[str, int] | None = pair.json("status", task_id)["tasks"][0]["now"]
        return found

    eventually(lambda: (now() or {}).get("pids", 0) >= 3, within_s=60, what="its node tells the other one")
    assert "memory, 3 processes" in pair.cli("status", task_id).stdout
    lines = pair.cli("top", "--once").stdout.splitlines()
    header = next(line for line in lines if line.startswith("ID"))
    row = next(line for line in lines if line.startswith(task_id))
    assert row[header.index("PROCS") :].split()[0] == "3"
    assert json.loads(pair.cli("top", "--once", "--json").stdout)["running"][0]["now"]["memory_bytes"] > 0
    assert pair.json("list", "--state", "running")["tasks"][0]["now"] is None  # not asked for
    pair.cli("cancel", task_id)
    pair.cli("wait", task_id, check=False)


def test_following_keeps_the_streams_apart(pair: Cluster) -> None:
    done = pair.cli(
        "submit", "--follow", "--env", "WHO=me", "--tag", "away", "--",
        "sh", "-c", "echo out $WHO; echo err >&2; exit 3", check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, "out me\n")
    assert done.stderr.startswith("err\n")


def test_ctrl_c_leaves_the_task_alone(pair: Cluster) -> None:
    process = popen(pair, "submit", "--follow", "--name", "left alone", "--", "sh", "-c", "echo begun; exec sleep 100")
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    task_id = err.rsplit("spinetta cancel ", 1)[1].strip()
    assert "detached" in err
    assert state(pair, task_id) == "running"
    waiting = popen(pair, "wait", task_id)
    assert waiting.stderr is not None
    assert waiting.stderr.readline() == f"waiting for task {task_id}\n"
    waiting.send_signal(signal.SIGINT)
    assert "no longer waiting" in waiting.communicate(timeout=30)[1]
    assert waiting.returncode == 130
    timed = pair.cli("wait", task_id, "--timeout", "200ms", check=False)
    assert timed.returncode == 5
    assert "is being ended" in pair.cli("cancel", task_id[-8:], "--reason", "enough").stdout
    ended = json.loads(pair.cli("wait", "--json", task_id, check=False).stdout)["tasks"][0]
    assert (ended["outcome"], ended["reason"]) == ("cancelled", "cancelled")


@pytest.mark.parametrize("way", ["--wait", "--follow"])
def test_who_waits_for_what_no_node_can_run_is_told(pair: Cluster, way: str) -> None:
    process = popen(pair, "submit", way, "--name", f"hopeless{way}", "--tag", "nowhere", "--", "true")
    assert process.stderr is not None
    if way == "--wait":
        assert process.stderr.readline().startswith("waiting for task ")
    found = eventually(lambda: pair.json("list", "--name", f"hopeless{way}")["tasks"], within_s=60, what="the task")
    task_id = found[0]["id"]
    assert process.stderr.readline() == f"task {task_id} waits: no node of the cluster can ever run it, as it is now:\n"
    assert process.stderr.readline() == "  n1, n2: the node lacks the tag nowhere\n"
    pair.cli("cancel", task_id)
    out, _ = process.communicate(timeout=30)
    assert (out, process.returncode) == (f"{task_id}\n" if way == "--wait" else "", 127)


def test_many_from_a_file_listed_and_cancelled(pair: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text("".join(f"- command: [sh, -c, 'exit {i % 3}']\n  name: t{i}\n  cpus: 0.1\n" for i in range(30)))
    done = pair.cli("submit", "--file", str(path), "--label", "run=file", "--wait", "--json", check=False)
    assert done.returncode == 1
    tasks = json.loads(done.stdout)["tasks"]
    assert [t["exit_code"] for t in tasks] == [i % 3 for i in range(30)]
    listed = pair.json("list", "--label", "run=file", "--outcome", "failed", "--limit", "15")
    assert (len(listed["tasks"]), listed["more"]) == (15, True)
    assert [t["name"] for t in pair.json("list", "--name", "t7")["tasks"]] == ["t7"]
    quiet = pair.cli("list", "--label", "run=file", "--outcome", "succeeded", "-q", "--oldest-first").stdout.split()
    assert quiet == [t["id"] for t in tasks if t["exit_code"] == 0]
    table = pair.cli("list", "--label", "run=file", "--limit", "5")
    assert len({line.index("sh -c") for line in table.stdout.splitlines()[1:]}) == 1  # aligned
    assert "\x1b" not in table.stdout
    assert "there are more than these 5" in table.stderr

    path.write_text("".join("- command: [sleep, '100']\n" for _ in range(20)))
    pair.cli("submit", "--file", str(path), "--label", "run=sleep")
    asked = pair.cli("cancel", "--all", "--label", "run=sleep", check=False)
    assert (asked.returncode, "20 tasks would be cancelled" in asked.stderr) == (2, True)
    pair.cli("cancel", "--all", "--label", "run=sleep", "--yes")
    ids = pair.cli("list", "--label", "run=sleep", "-q").stdout.split()
    ended = json.loads(pair.cli("wait", "--json", *ids, check=False).stdout)
    assert {t["outcome"] for t in ended["tasks"]} == {"cancelled"}


def test_an_id_given_again_changes_nothing(pair: Cluster) -> None:
    task_id = str(make_spec(["x"]).id)
    given = [pair.cli("submit", "--json", "--id", task_id, "--", "true", node=n).stdout for n in (0, 1)]
    assert [json.loads(text)["tasks"][0]["existed"] for text in given] == [False, True]
    other = pair.cli("submit", "--id", task_id, "--", "false", check=False)
    assert other.returncode == 2


def test_a_task_can_ask_its_cluster(pair: Cluster) -> None:
    done = pair.cli("submit", "--follow", "--", sys.executable, "-m", "spinetta.cli", "node", "list", "--json")
    assert {n["name"] for n in json.loads(done.stdout)["nodes"]} == {"n1", "n2"}


def test_log_in_parts(pair: Cluster) -> None:
    task_id = pair.cli("submit", "--", "sh", "-c", "printf 0123456789; printf abc >&2").stdout.strip()
    pair.cli("wait", task_id)
    for node in (0, 1):
        assert pair.cli("log", task_id, node=node).stdout == "0123456789"
        assert pair.cli("log", task_id, "--tail", "3", node=node).stdout == "789"
        assert pair.cli("log", "--stderr", task_id, node=node).stdout == "abc"
        both = pair.cli("log", "--both", task_id, node=node)
        assert (both.stdout, both.stderr) == ("0123456789", "abc")
    binary = pair.cli("submit", "--", "printf", r"\377\376").stdout.strip()
    pair.cli("wait", binary)
    assert json.loads(pair.cli("log", "--json", binary).stdout)["data_base64"] == "//4="
    missing = pair.cli("log", "--attempt", "7", task_id, check=False)
    assert missing.returncode in (2, 3), missing.stderr
    assert "attempt" in missing.stderr


def test_below_the_surface(pair: Cluster) -> None:
    task_id = pair.cli("submit", "--wait", "--name", "deep", "--", "true").stdout.strip()
    assert pair.json("decode", f"/task/{task_id}")["spec"]["name"] == "deep"
    listed = pair.cli("etcdctl", "get", "--prefix", "/node/", "--keys-only", node=1).stdout.split()
    assert listed == ["/node/n1", "/node/n2"]
    raw = pair.cli("etcdctl", "get", "--prefix", "/node/", "-w", "json").stdout
    decoded = [json.loads(line) for line in pair.cli("decode", stdin=raw).stdout.splitlines()]
    assert [d["value"]["name"] for d in decoded] == ["n1", "n2"]
    assert pair.cli("etcdctl", "get", "--no-such-flag", check=False).returncode != 0


def test_live_views(pair: Cluster) -> None:
    watching = popen(pair, "list", "--watch", "--json", "--name", "seen live")
    task_id = pair.cli("submit", "--name", "seen live", "--wait", "--", "true").stdout.strip()
    assert watching.stdout is not None
    seen: list[str] = []
    while "complete" not in seen:
        document = json.loads(watching.stdout.readline())
        assert document["id"] == task_id
        seen.append(document["state"])
    watching.send_signal(signal.SIGINT)
    assert watching.communicate(timeout=30)[1] == ""
    assert watching.returncode == 130
    assert "n1" in pair.cli("top").stdout


def test_top_on_a_terminal(pair: Cluster) -> None:
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "spinetta.cli", "top", "--interval", "200ms"],
        stdin=inside, stdout=inside, stderr=inside,
        env={**os.environ, "SPINETTA_NODE": pair.nodes[0].address, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
    )  # fmt: skip
    os.close(inside)
    seen = b""
    try:
        while b"waiting" not in seen or seen.count(b"n2") < 3:  # drawn more than once
            seen += os.read(terminal, 65536)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the terminal's other end is closed
            while more := os.read(terminal, 65536):
                seen += more
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait(30)
        os.close(terminal)
    assert b"Traceback" not in seen
    assert b"\x1b[?1049h" in seen  # a screen of its own


def test_python(pair: Cluster) -> None:
    with Client([n.address for n in pair.nodes]) as client:
        task = client.submit("sh -c 'echo hello; exit 4'", labels={"from": "python"})
        info = task.wait(30)
        assert (info.task.outcome, info.task.attempts[-1].exit_code) == (Outcome.FAILED, 4)
        assert b"".join(c.data for c in task.log()) == b"hello\n"
        assert [i.id for i in client.list(TaskFilter(labels=(("from", "python"),)))] == [task.id]
        slow = [client.submit(["sleep", "100"]), client.submit(["true"])]
        first = client.wait([t.id for t in slow], timeout_s=30, any_=True)
        assert [i.done for i in first.tasks] == [False, True]
        assert slow[0].cancel("enough").state in (State.RUNNING, State.COMPLETE)
        assert slow[0].wait(30).task.outcome is Outcome.CANCELLED
        assert {n.record.name for n in client.nodes().nodes} == {"n1", "n2"}
        changes = client.watch(ids=[task.id])
        assert next(changes).tasks[0].id == task.id
        assert client.cluster().voters[0].name == "n1"


def test_a_program_that_forgets_to_close_its_client_ends(pair: Cluster) -> None:
    program = f"""
from spinetta.client import Client
client = Client("{pair.nodes[0].address}")
changes = client.watch()
print(next(changes).restarted)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


def test_a_log_is_followed_through_another_node_when_one_dies(pair: Cluster) -> None:
    """The client asks the worker first, whose daemon is killed; no byte may be missing or come twice."""
    worker = pair.nodes[1]

    async def main() -> bytes:
        async with AsyncClient([worker.address, pair.nodes[0].address]) as client:
            task = await client.submit(
                ["sh", "-c", "i=0; while [ $i -lt 60 ]; do echo line $i; i=$((i+1)); sleep 0.1; done"], tags=["home"]
            )
            got = b""
            async for chunk in task.log(follow=True):
                got += chunk.data
                if worker.process is not None and got.count(b"\n") >= 10:
                    worker.kill_daemon()
                    worker.process = None
            return got

    got = asyncio.run(main())
    assert got == b"".join(b"line %d\n" % i for i in range(60))
    worker.start(pair.peers_of(worker))
    pair.wait_ready()


def test_drain_and_leave(pair: Cluster) -> None:
    """Last: the worker leaves."""

    def status(name: str) -> str:
        return str(pair.json("node", "show", name)["status"])

    assert "takes no more tasks" in pair.cli("node", "drain", "n2").stdout
    eventually(lambda: status("n2") == "draining", within_s=60, what="n2 drains")
    waiting = pair.cli("submit", "--tag", "away", "--", "true").stdout.strip()
    assert pair.cli("wait", waiting, "--timeout", "1s", check=False).returncode == 5
    pair.cli("node", "undrain", node=1)
    assert pair.cli("wait", waiting, "--timeout", "30s").returncode == 0
    left = pair.cli("node", "leave", "n2", "--wait", "10s")
    assert "n2 has left" in left.stdout
    assert [n["name"] for n in pair.json("node", "list")["nodes"]] == ["n1"]
    worker = pair.nodes[1]
    assert worker.process is not None
    assert worker.process.wait(30) == 0
    stopped = pair.cli("node", "stop", "--data-dir", str(worker.data_dir), node=None)
    assert stopped.stdout == "nothing was running\n"
