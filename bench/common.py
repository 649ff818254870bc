"""What the benchmarks share: clusters of their own, what is compared on them, the machine's description, tables, JSON.

An open cluster and a secured one (every connection mutual TLS, etcd's too) are up at the same time, and each run goes
over all variants before the next one begins, each time with another first: what the machine does beside hits all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from spinetta import __version__
from spinetta.client import Client

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
DEVCLUSTER = ROOT / "scripts" / "devcluster.sh"
PORT = 7220
UP_LIMIT_S = 180
BASES_TRIED = 50


@dataclass(frozen=True)
class BenchCluster:
    """A cluster to measure.

    Attributes:
        tls: whether it is secured.
        addresses: of its voters, or those that were given.
        workers: how many nodes more it has, which are no voters.
        credentials: of its administrator; None: it is open.
        state: the directory it lives in; None: it is somebody else's.
    """

    tls: bool
    addresses: tuple[str, ...]
    workers: int = 0
    credentials: Path | None = None
    state: Path | None = None

    def client(self, addresses: Sequence[str] = (), timeout_s: float = 20.0) -> Client:
        """A client of one or more voters."""
        return Client(addresses or self.addresses, timeout_s=timeout_s, credentials=self.credentials)


@dataclass(frozen=True)
class Variant:
    """What is compared: tasks on some nodes of a cluster.

    Attributes:
        place: where its tasks run: on `any` node, on a `voter`, on a `worker`.
        tag: that sends them there; empty: anywhere.
    """

    cluster: BenchCluster
    place: str
    tag: str

    @property
    def tls(self) -> str:
        """For a table."""
        return "yes" if self.cluster.tls else "no"

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where to submit: at the first voter, when the tasks run on certain nodes, so that both ways begin alike."""
        return self.cluster.addresses if not self.tag else self.cluster.addresses[:1]


def sizes(cluster: BenchCluster) -> str:
    """How many nodes of which kind."""
    count, more = len(cluster.addresses), cluster.workers
    said = f"{count} voter{'s' if count > 1 else ''}"
    return said + (f" and {more} worker{'s' if more > 1 else ''}" if more else "")


def variants(clusters: Sequence[BenchCluster]) -> list[Variant]:
    """One for each cluster without workers; two, on a voter that is not asked and on a worker, for each with some."""
    found = []
    for one in clusters:
        voters = len(one.addresses)
        if one.workers:
            found += [Variant(one, "voter", f"n{min(2, voters)}"), Variant(one, "worker", f"n{voters + 1}")]
        else:
            found.append(Variant(one, "any", ""))
    return found


def alternate(those: Sequence[Variant], runs: int, measure: Callable[[Variant], T]) -> dict[Variant, list[T]]:
    """Measure all variants in each run."""
    found: dict[Variant, list[T]] = {each: [] for each in those}
    for run in range(runs):
        first = run % len(those)
        for each in [*those[first:], *those[:first]]:
            found[each].append(measure(each))
    return found


def ratios(values: dict[Variant, list[float]], of: Variant) -> dict[str, str]:
    """Two columns of a table: the median ratio, over the runs, to the open cluster and to tasks on a voter."""
    columns = {}
    for head, tls, place in (("x open", False, of.place), ("x voter", of.cluster.tls, "voter")):
        base = next((v for v in values if (v.cluster.tls, v.place) == (tls, place)), None)
        if base is not None and len(values) > 1:
            columns[head] = f"{median([a / b for a, b in zip(values[of], values[base], strict=True)]):.2f}"
    return columns


def free_base(count: int) -> str:
    """A loopback network such as ``127.83.4.`` on whose first addresses our ports are free."""
    for _ in range(BASES_TRIED):
        base = f"127.{10 + secrets.randbelow(240)}.{1 + secrets.randbelow(250)}."
        try:
            for i in range(1, count + 1):
                for port in (PORT, PORT + 1, PORT + 2):
                    with socket.socket() as sock:
                        sock.bind((f"{base}{i}", port))
        except OSError:
            continue
        return base
    raise SystemExit("no free loopback addresses")


@contextlib.contextmanager
def clusters(args: argparse.Namespace, voters: int, workers: int = 0) -> Iterator[list[BenchCluster]]:
    """The cluster that was given, else fresh ones as `--tls` says, all up at once and gone afterwards."""
    if args.nodes:
        yield [BenchCluster(args.credentials is not None, tuple(args.nodes.split(",")), credentials=args.credentials)]
        return
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(fresh_cluster(voters, workers, tls, args.cpus))
            for tls in {"off": (False,), "on": (True,), "both": (False, True)}[args.tls]
        ]


@contextlib.contextmanager
def fresh_cluster(voters: int, workers: int, tls: bool, cpus: str) -> Iterator[BenchCluster]:
    """Nodes of our own through devcluster.sh."""
    parent = Path(tempfile.mkdtemp(prefix="spinetta-bench-"))
    state = parent / "cluster"
    count = voters + workers
    base = free_base(count)
    command = [str(DEVCLUSTER), "--state", str(state)]
    env = {**os.environ, "SPINETTA_VENV": sys.prefix}  # the package that is measured is ours
    try:
        up = [*command, "--base", base, "--port", str(PORT), "--cpus", cpus, "--workers", str(workers)]
        up += [*(["--tls"] if tls else []), "up", str(count)]
        done = subprocess.run(up, capture_output=True, text=True, timeout=UP_LIMIT_S, check=False, env=env)
        if done.returncode != 0:
            raise SystemExit(f"no cluster to measure:\n{done.stdout}{done.stderr}")
        addresses = tuple(f"{base}{i}:{PORT}" for i in range(1, voters + 1))
        yield BenchCluster(tls, addresses, workers, state / "n1" / "admin.pem" if tls else None, state)
    finally:
        subprocess.run([*command, "down"], capture_output=True, timeout=UP_LIMIT_S, check=False, env=env)
        shutil.rmtree(parent, ignore_errors=True)


def machine() -> dict[str, Any]:
    """What it was measured on."""
    etcd = subprocess.run(["etcd", "--version"], capture_output=True, text=True, check=False).stdout
    cpu = next(
        (x.partition(":")[2].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "?"
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "etcd": etcd.splitlines()[0].rpartition(" ")[2] if etcd else "?",
        "spinetta": __version__,
        "load_before": round(os.getloadavg()[0], 2),
    }


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least the part `q` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(q * len(ordered)) - 1, 0)]


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def arguments(description: str | None, workers: int = 1) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--nodes", default="", help="measure this cluster (API addresses, with commas between)")
    parser.add_argument("--credentials", type=Path, help="of a user of that cluster; none: it is open")
    parser.add_argument("--tls", choices=("off", "on", "both"), default="both", help="clusters of our own (both)")
    parser.add_argument("--workers", type=int, default=workers, help=f"of each, beside the voters ({workers})")
    parser.add_argument("--cpus", default="2", help="what each node of a cluster of our own offers (2)")
    parser.add_argument("--json", action="store_true", help="the numbers as JSON")
    return parser


def report(title: str, rows: Sequence[dict[str, Any]], as_json: bool, on: dict[str, Any]) -> None:
    """Print what was measured, as a table or as JSON. What a row has not stays empty."""
    if as_json:
        json.dump({"benchmark": title, "machine": on, "rows": rows}, sys.stdout, indent=2)
        print()
        return
    print(title)
    print("  on " + ", ".join(f"{key} {value}" for key, value in on.items()))
    heads = list(dict.fromkeys(key for row in rows for key in row))
    texts = [[f"{v:.2f}" if isinstance(v := row.get(key, ""), float) else str(v) for key in heads] for row in rows]
    widths = [max(len(head), *(len(t[i]) for t in texts)) for i, head in enumerate(heads)]
    for line in [heads, *texts]:
        print("  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))
