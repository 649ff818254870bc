"""What the benchmarks share: a cluster of their own, the machine's description, tables and JSON."""

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from spinetta import __version__

ROOT = Path(__file__).resolve().parent.parent
DEVCLUSTER = ROOT / "scripts" / "devcluster.sh"
PORT = 7220
UP_LIMIT_S = 180
BASES_TRIED = 50


@dataclass(frozen=True)
class BenchCluster:
    """A cluster to measure: addresses of its nodes, and the directory it lives in (None: somebody else's)."""

    addresses: tuple[str, ...]
    state: Path | None


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
def cluster(nodes: str, count: int, cpus: str) -> Iterator[BenchCluster]:
    """The nodes that were given, else `count` fresh ones through devcluster.sh, gone afterwards."""
    if nodes:
        yield BenchCluster(tuple(nodes.split(",")), None)
        return
    parent = Path(tempfile.mkdtemp(prefix="spinetta-bench-"))
    state = parent / "cluster"
    base = free_base(count)
    command = [str(DEVCLUSTER), "--state", str(state)]
    env = {**os.environ, "SPINETTA_VENV": sys.prefix}  # the package that is measured is ours
    try:
        up = [*command, "--base", base, "--port", str(PORT), "--cpus", cpus, "up", str(count)]
        done = subprocess.run(up, capture_output=True, text=True, timeout=UP_LIMIT_S, check=False, env=env)
        if done.returncode != 0:
            raise SystemExit(f"no cluster to measure:\n{done.stdout}{done.stderr}")
        yield BenchCluster(tuple(f"{base}{i}:{PORT}" for i in range(1, count + 1)), state)
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


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--nodes", default="", help="measure this cluster (API addresses, with commas between)")
    parser.add_argument("--cpus", default="2", help="what each node of a cluster of our own offers (2)")
    parser.add_argument("--json", action="store_true", help="the numbers as JSON")
    return parser


def report(title: str, rows: Sequence[dict[str, Any]], as_json: bool, on: dict[str, Any]) -> None:
    """Print what was measured, as a table or as JSON. Rows have the same keys."""
    if as_json:
        json.dump({"benchmark": title, "machine": on, "rows": rows}, sys.stdout, indent=2)
        print()
        return
    print(title)
    print("  on " + ", ".join(f"{key} {value}" for key, value in on.items()))
    heads = list(rows[0])
    texts = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(head), *(len(t[i]) for t in texts)) for i, head in enumerate(heads)]
    for line in [heads, *texts]:
        print("  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))
