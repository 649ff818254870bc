"""A daemon that is killed at the n-th thing it does, and a story in which that happens again and again.

    python -m tests.cluster.dying [--deaths N]

lives through many deaths; the tests through a few. `python -m tests.cluster.dying --at N -- ARGUMENTS` is the daemon
itself: the real one, with SIGKILL just before its n-th effect (a write to the store, a start, a stop, a note on disk),
or for an even n a moment after.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from spinetta.client import Client
from spinetta.model import Outcome, State, Task
from tests.cluster.harness import Cluster, Node, eventually, free_base

TASKS = 24
OPTIONS = ("--lease-ttl", "30s", "--grace", "60s", "--kill-margin", "2s", "--cpus", "4")
DEATH_WITHIN_S = 90.0
AFTER_S = 0.003


class MortalNode(Node):
    """Its daemon dies at the `at`-th effect; 0: of old age."""

    at = 0

    def argv(self, peers: Sequence[str]) -> list[str]:
        """The command line that starts it."""
        plain = super().argv(peers)
        if not self.at:
            return plain
        return [plain[0], "-m", "tests.cluster.dying", "--at", str(self.at), "--", *plain[3:]]


def live(folder: Path, deaths: Sequence[int]) -> list[str]:
    """Run tasks while the daemon dies at these effects of its; what was not as it should be."""
    cluster = Cluster(folder, free_base(1), OPTIONS)
    host = f"{cluster.base}1"
    node = MortalNode("n1", host, folder / "n1", folder / "n1.log", OPTIONS)
    cluster.nodes.append(node)
    ledger = folder / "ledger"
    try:
        node.start()
        cluster.wait_ready()
        script = f'echo "$SPINETTA_TASK_ID $SPINETTA_ATTEMPT" >> {ledger}; sleep 0.3'
        lines = [json.dumps({"command": ["/bin/sh", "-c", script], "cpus": 1})] * TASKS
        done = cluster.cli("submit", "--json", "--file", "-", "--format", "jsonl", stdin="\n".join(lines))
        ids = {each["id"] for each in json.loads(done.stdout)["tasks"]}
        for number in deaths:
            node.kill_daemon()
            node.at = number
            node.start()
            process = node.process
            assert process is not None
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(DEATH_WITHIN_S)  # else it has nothing to do any more
        if node.process is not None and node.process.poll() is None:
            node.kill_daemon()
        node.at = 0
        node.start()
        cluster.wait_ready()
        with Client(node.address) as client:
            over = {}

            def all_over() -> bool:
                over.update({i.task.id: i.task for i in client.get_many(sorted(ids))})
                return all(task.state is State.COMPLETE for task in over.values())

            eventually(all_over, within_s=180, every_s=0.3, what=f"all over\n{cluster.tails()}")
        wrong = _wrong(list(over.values()), ledger)
        held = folder / "n1" / "shim"
        eventually(lambda: not _leftovers(held), within_s=20, what=f"nothing left: {_leftovers(held)}")
        return wrong
    finally:
        cluster.stop()


def _wrong(tasks: Sequence[Task], ledger: Path) -> list[str]:
    ran = Counter(tuple(line.split()) for line in ledger.read_text().splitlines())
    wrong = [f"ran more than once: {each}" for each, times in ran.items() if times > 1]
    for task in tasks:
        task_id = task.spec.id
        if task.outcome is not Outcome.SUCCEEDED:
            wrong.append(f"{task_id}: {task.outcome.name} {task.message}")
        said = [str(attempt.number) for attempt in task.attempts if attempt.reason == "exit"]
        wrong += [f"{task_id}: attempt {n} is said to have run, and has not" for n in said if (task_id, n) not in ran]
    return wrong


def _leftovers(shim: Path) -> list[str]:
    left = [str(path) for folder in ("attempts", "scratch") for path in (shim / folder).iterdir()]
    return left + [str(path) for path in (*shim.rglob("*.tmp"), *shim.parent.glob("*.tmp"))]


def _die_at(number: int, arguments: Sequence[str]) -> None:
    from spinetta.cli import main as cli
    from spinetta.events import Effect
    from spinetta.node.driver import Driver

    carry_out = Driver._carry_out
    count = 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(self: Driver, effect: Effect) -> None:
        nonlocal count
        count += 1
        if count == number and number % 2:
            die()
        carry_out(self, effect)
        if count == number:
            asyncio.get_running_loop().call_later(AFTER_S * (number % 7), die)

    Driver._carry_out = counted  # type: ignore[method-assign]  # that is the point
    sys.argv = ["spinetta", *arguments]
    cli()


def main() -> int:
    """Die, or live through many deaths."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--at", type=int, default=0)
    parser.add_argument("--deaths", type=int, default=100)
    parser.add_argument("arguments", nargs="*")
    options = parser.parse_args()
    if options.at:
        _die_at(options.at, options.arguments)
    with tempfile.TemporaryDirectory(prefix="spinetta-dying-") as folder:
        wrong = live(Path(folder), range(1, options.deaths + 1))
    sys.stdout.write("".join(f"{each}\n" for each in wrong) + f"{options.deaths} deaths, {len(wrong)} faults\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
