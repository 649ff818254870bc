"""Drains, and daemons that are told to stop, on real nodes: at any moment, once or twice, politely or not at all."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from spinetta.client import Client
from spinetta.client.views import TaskFilter, TaskInfo
from spinetta.errors import UserError
from spinetta.model import Outcome, State, TaskId
from tests.cluster.harness import CLIENT_PORT, Cluster, Node, eventually, running_cluster
from tests.cluster.history import check_history

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

# Long, so that no daemon that is started again on a busy machine is given up meanwhile.
CALM = ("--lease-ttl", "60s", "--grace", "120s", "--kill-margin", "2s", "--cpus", "4", "--memory", "2GiB")
POLITE = ("--on-terminate", "drain", "--drain-timeout", "20s")
AT_ONCE_S = 5.0  # for a process to go that ends at once, on a machine with much else to do
ROUNDS = 4  # each takes the start of a daemon


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("ending"), 2, *CALM, *POLITE) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(pair: Cluster) -> Iterator[Client]:
    with Client(pair.nodes[0].address) as opened:
        yield opened


@pytest.fixture(autouse=True)
def at_rest(pair: Cluster, client: Client) -> None:
    """Both nodes run and take tasks, and there is nothing to do, whatever the test before has left."""
    n2 = pair.nodes[1]
    if n2.process is None or n2.process.poll() is not None:
        start(pair, n2, client)
    for node in pair.nodes:
        client.undrain(node.name)
    left = [info.id for info in client.list(TaskFilter(states=(State.QUEUED, State.RUNNING)))]
    if left:
        client.cancel(left)
        client.wait(left, timeout_s=60)


def gated(gate: Path) -> list[str]:
    """A command that ends when the file is there."""
    return ["sh", "-c", f"while [ ! -e '{gate}' ]; do sleep 0.05; done"]


def status(client: Client, name: str) -> str:
    return next((n.status for n in client.nodes().nodes if n.record.name == name), "gone")


def runs_on(client: Client, task: TaskId) -> str:
    info = client.get(task)
    return info.node if info.task.state is State.RUNNING else ""


def told(node: Node, number: signal.Signals) -> None:
    assert node.process is not None
    node.process.send_signal(number)


def start(cluster: Cluster, node: Node, client: Client) -> None:
    """Start its daemon again, and wait until the others know of this very one."""

    def record() -> tuple[int, str]:
        found = next((n for n in client.nodes().nodes if n.record.name == node.name), None)
        return (0, "") if found is None else (found.record.started_ms, found.status)

    before = record()[0]
    node.start(cluster.peers_of(node))

    def is_back() -> bool:
        started_ms, word = record()
        return started_ms > before and word in ("ready", "draining")

    eventually(is_back, within_s=60, what=f"{node.name} is back\n{node.tail()}")


def test_a_drain_gives_back_what_it_may_and_is_not_forgotten(pair: Cluster, client: Client, tmp_path: Path) -> None:
    n2 = pair.nodes[1]
    client.drain("n1")  # so that all goes to n2
    gate = tmp_path / "gate"
    may = client.submit(gated(gate), name="may").id
    once = client.submit(gated(gate), name="once", restart=False).id
    eventually(lambda: runs_on(client, may) == runs_on(client, once) == "n2", within_s=60, what="both run on n2")
    client.undrain("n1")

    said = pair.json("node", "drain", "n2")
    assert said == {"node": "n2", "status": "draining", "running": 2}
    assert "draining, 2 left" in pair.cli("node", "list").stdout
    assert pair.cli("node", "drain", "n2", "--force", check=False).returncode == 2

    n2.kill_daemon()  # what was said is remembered by whatever comes next
    start(pair, n2, client)
    assert status(client, "n2") == "draining"
    assert (runs_on(client, may), runs_on(client, once)) == ("n2", "n2")

    waited = pair.cli("node", "drain", "n2", "--release", "--wait", "--timeout", "1s", "--json", check=False)
    assert waited.returncode == 5
    lines = [json.loads(line) for line in waited.stdout.splitlines()]
    assert all(line["status"] == "draining" and not line["done"] for line in lines)
    eventually(lambda: runs_on(client, may) == "n1", within_s=60, what="what may be started again goes to n1")
    assert runs_on(client, once) == "n2"

    gate.touch()
    done = pair.cli("node", "drain", "n2", "--wait")
    assert done.stdout.endswith("n2 is drained\n")
    ended = client.wait([may, once], timeout_s=60).tasks
    assert [t.task.outcome for t in ended] == [Outcome.SUCCEEDED] * 2
    assert [t.task.attempts_started for t in ended] == [2, 1]
    assert "drained" in pair.cli("node", "list").stdout
    client.undrain("n2")
    assert status(client, "n2") == "ready"


def test_a_second_signal_ends_the_daemon_at_once_at_any_stage(pair: Cluster, client: Client, tmp_path: Path) -> None:
    n2 = pair.nodes[1]
    gate = tmp_path / "gate"
    client.drain("n1")
    task = client.submit(gated(gate)).id
    eventually(lambda: runs_on(client, task) == "n2", within_s=60, what="it runs on n2")
    client.undrain("n1")

    def ends_at_once(second: signal.Signals) -> None:
        assert n2.process is not None
        before_s = time.monotonic()
        told(n2, second)
        assert n2.process.wait(AT_ONCE_S) == 128 + second
        assert time.monotonic() - before_s < AT_ONCE_S
        n2.process = None
        assert n2.shim_pid() is not None

    # While it drains: it waits, and says so, and a second signal cuts that.
    told(n2, signal.SIGTERM)
    eventually(lambda: status(client, "n2") == "draining", within_s=60, what="n2 drains")
    with pytest.raises(UserError, match="being stopped"):
        client.undrain("n2")
    ends_at_once(signal.SIGTERM)
    start(pair, n2, client)
    assert status(client, "n2") == "ready"  # that drain was the daemon's own, and ended with it

    # While it leaves.
    steps = client.leave("n2", timeout_s=60)
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    eventually(lambda: status(client, "n2") == "leaving", within_s=60, what="n2 leaves")
    with pytest.raises(UserError, match="is leaving"):
        client.undrain("n2")
    said = n2.log.read_text().count("tasks still run")
    told(n2, signal.SIGTERM)
    # Two that come together are one to the kernel.
    eventually(lambda: n2.log.read_text().count("tasks still run") > said, within_s=60, what="the first one is taken")
    ends_at_once(signal.SIGTERM)
    start(pair, n2, client)
    assert status(client, "n2") == "ready"
    assert runs_on(client, task) == "n2"  # through all that
    assert client.get(task).task.attempts_started == 1

    # While it starts, at whatever point it is then: the first one ends it, and a second one, too.
    for delay_s in (0.7, 1.3):
        n2.kill_daemon()
        n2.start(pair.peers_of(n2))
        assert n2.process is not None
        time.sleep(delay_s)  # somewhere in the middle
        for number in (signal.SIGUSR1, signal.SIGUSR1):
            told(n2, number)
        assert n2.process.wait(AT_ONCE_S) in (0, 128 + signal.SIGUSR1, -signal.SIGUSR1)
        assert n2.shim_pid() is not None
    n2.process = None
    start(pair, n2, client)
    assert runs_on(client, task) == "n2"
    gate.touch()
    assert client.task(task).wait(60).task.attempts_started == 1


def test_terminated_at_random_moments_no_task_is_lost_or_run_twice_for_nothing(
    pair: Cluster, client: Client, tmp_path: Path
) -> None:
    n2 = pair.nodes[1]
    chance = random.Random(4)
    ledger = tmp_path / "ledger"
    ledger.mkdir()
    stop, wrong, ids = threading.Event(), list[str](), list[TaskId]()

    def load() -> None:
        with Client(pair.nodes[0].address) as mine:
            while not stop.is_set():
                if len(ids) < 600:
                    argv = ["sh", "-c", f"echo $SPINETTA_NODE_NAME >> {ledger}/$SPINETTA_TASK_ID; sleep 0.3"]
                    ids.extend(h.id for h in [mine.submit(argv) for _ in range(5)])
                stop.wait(0.2)

    def look() -> None:
        seen: dict[TaskId, TaskInfo] = {}
        with Client(pair.nodes[0].address) as mine:
            while not stop.is_set():
                for info in mine.list(TaskFilter(), limit=300, newest_first=True):
                    before = seen.get(info.id)
                    if before is not None and before.task.state is State.COMPLETE and info.task != before.task:
                        wrong.append(f"{before} became {info}")
                    if before is not None and info.task.attempts_started < before.task.attempts_started:
                        wrong.append(f"{before} went back to {info}")
                    seen[info.id] = info

    threads = [threading.Thread(target=load), threading.Thread(target=look)]
    for thread in threads:
        thread.start()
    killed = Counter[str]()
    try:
        for round_ in range(ROUNDS):
            stop.wait(chance.uniform(0.2, 1.5))
            assert n2.process is not None
            how = ("once", "twice", "kill", "once")[round_]
            killed[how] += 1
            if how == "kill":
                n2.process.kill()
            else:
                told(n2, signal.SIGTERM)
                if how == "twice":
                    stop.wait(chance.uniform(0.0, 0.5))
                    told(n2, signal.SIGTERM)
            n2.process.wait(60)
            start(pair, n2, client)
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not wrong
    tasks = client.wait(ids, timeout_s=90).tasks
    assert {t.task.outcome for t in tasks} == {Outcome.SUCCEEDED}
    # Nothing was stopped on the way: a daemon that is terminated politely, cut or killed leaves what runs in peace.
    runs = Counter({t.id: len((ledger / t.id).read_text().splitlines()) for t in tasks})
    assert set(runs.values()) == {1}, [n2.tail(), runs.most_common(5)]
    checked = check_history(f"http://{pair.nodes[0].host}:{CLIENT_PORT}")
    assert all(checked.recorded[i] == 1 for i in ids)
    assert killed.total() == ROUNDS


def test_what_may_not_be_started_again_stays_with_the_shim(pair: Cluster, client: Client, tmp_path: Path) -> None:
    n2 = pair.nodes[1]
    assert n2.process is not None
    told(n2, signal.SIGUSR1)
    assert n2.process.wait(60) == 0
    n2.options = (*n2.options, "--drain-timeout", "1s")
    start(pair, n2, client)
    client.drain("n1")
    gate = tmp_path / "gate"
    may, once = client.submit(gated(gate)).id, client.submit(gated(gate), restart=False).id
    eventually(lambda: runs_on(client, may) == runs_on(client, once) == "n2", within_s=60, what="both run on n2")
    client.undrain("n1")
    told(n2, signal.SIGTERM)
    assert n2.process.wait(60) == 0
    eventually(lambda: runs_on(client, may) == "n1", within_s=60, what="n1 takes what was given back")
    shim = n2.shim_pid()
    assert shim is not None
    start(pair, n2, client)
    assert runs_on(client, once) == "n2"
    gate.touch()
    ended = client.wait([may, once], timeout_s=60).tasks
    assert [t.task.attempts_started for t in ended] == [2, 1]

    # With nothing left it takes down everything, and the node is gone from the list.
    told(n2, signal.SIGTERM)
    assert n2.process is not None
    assert n2.process.wait(60) == 0
    assert n2.shim_pid() is None
    assert status(client, "n2") == "gone"
    n2.start(pair.peers_of(n2))
    pair.wait_ready()
