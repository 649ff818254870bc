"""Containers a second and how soon they start, beside others: ``python -m bench.containers``, as root.

All run the same programs of the same image with the same limits, isolated alike: user (not Docker's), pid, mount, ipc,
uts, cgroup and network namespaces of their own without a network, no capabilities, a list of allowed system calls, a
read-only root, a small init as process 1 (ours and bare runc's).

- ``runc run``: the program alone, with a bundle that lies ready. What it takes is the kernel's and runc's.
- ``ours``: through the runtime, as the daemon runs tasks: the image looked up and held, the configuration made, and
- ``shim``: of that the shim's part alone: records, log files, a scratch directory, deadline, counters, clean-up.
- ``process``: a plain process through the same, for comparison.
- ``docker run --rm``: with an engine of our own, client and all.

*wall ms* is the time of one container from the request to its end being known and everything of it removed (which is
looked at: record, scratch, control groups), as each one of the workers sees it; *a second* is what all workers together
get done; of ``/bin/true``. *start ms* is from the request until the program in the container (bash) tells the time.
Each run goes over all of them, each time with another first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil

from bench.common import ROOT, machine, median, quantile, report
from spinetta import imageref, ociconfig, ocirequest
from spinetta.config import Settings
from spinetta.container import ContainerSpec
from spinetta.model import Exit
from spinetta.node.containers import open_containers
from spinetta.runtime.process import ProcessRuntime
from spinetta.runtime.protocol import ContainerLaunch, Exited, Launch, Runtime
from tests.cluster.dockerd import Docker, NoDocker, engine

MEMORY_BYTES, CPU_MILLIS, PIDS = 256 << 20, 1000, 64
FIRST_ID, IDS = 1_000_000, 65536
UID = 1000
TRUE = ("/bin/true",)
CLOCK = ("/bin/bash", "-c", "echo $EPOCHREALTIME")  # the one program in the image that tells microseconds
LIMIT_S = 60.0


class Way(Protocol):
    """How containers are run."""

    name: str

    async def run(self, worker: int, command: Sequence[str]) -> str:
        """Run a command to its end, as the only one of this worker; what it printed."""


@dataclasses.dataclass
class Image:
    """An unpacked image, its ids shifted."""

    tar: Path
    rootfs: Path


def unpack(folder: Path) -> Image:
    """The image of the demonstration, with the places where a container's own things appear."""
    image = Image(folder / "image.tar", folder / "rootfs")
    subprocess.run([str(ROOT / "scripts" / "demo-image.sh"), str(image.tar)], check=True, capture_output=True)
    image.rootfs.mkdir()
    subprocess.run(["tar", "-C", str(image.rootfs), "-xf", str(image.tar)], check=True)
    for name in ocirequest.MOUNT_POINT_DIRECTORIES:
        (image.rootfs / name.lstrip("/")).mkdir(parents=True, exist_ok=True)
    for name in ocirequest.MOUNT_POINT_FILES:
        path = image.rootfs / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for top, folders, files in os.walk(image.rootfs):
        for name in (".", *folders, *files):
            os.chown(Path(top, name), FIRST_ID, FIRST_ID, follow_symlinks=False)
    folder.chmod(0o755)  # root of a user namespace is nobody to whom it belongs
    return image


def config(command: Sequence[str], scratch: Path) -> dict[str, Any]:
    """What the product makes of a task that asks for nothing special."""
    ids = (ocirequest.IdRange(0, FIRST_ID, IDS),)
    init = shutil.which("tini-static")
    assert init is not None, "tini-static is not installed (scripts/setup.sh does)"
    return ociconfig.runtime_config(
        ocirequest.Request(
            command=tuple(command), scratch_path=str(scratch), uids=ids, gids=ids, uid=UID, gid=UID, init_path=init
        )
    )


def runc_program() -> str:
    """Its absolute path."""
    found = shutil.which("runc", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    assert found is not None, "runc is not installed (scripts/setup.sh does)"
    return found


async def program(*argv: str) -> str:
    """Run one; its standard output."""
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(LIMIT_S):
        out, errors = await process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(argv)} ended with {process.returncode}: {errors.decode(errors='replace')}")
    return out.decode()


class BareRunc:
    """One bundle for each worker and command, which lies ready."""

    name = "runc run"

    def __init__(self, folder: Path, image: Image) -> None:
        self._folder = folder / "bare"
        self._image = image
        self._runc = runc_program()
        self._tag = f"spinetta-bench-{secrets.token_hex(4)}"
        self._bundles: dict[tuple[int, tuple[str, ...]], Path] = {}

    def prepare(self, worker: int, command: Sequence[str]) -> None:
        """Make the bundle."""
        bundle = self._folder / f"{worker}-{len(self._bundles)}"
        scratch = bundle / "scratch"
        scratch.mkdir(parents=True)
        os.chown(scratch, FIRST_ID + UID, FIRST_ID + UID)
        made = config(command, scratch)
        made["root"]["path"] = str(self._image.rootfs)
        made["linux"]["cgroupsPath"] = f"{self._tag}/{bundle.name}"
        made["linux"]["resources"] |= {
            "memory": {"limit": MEMORY_BYTES, "swap": MEMORY_BYTES},
            "cpu": {"quota": CPU_MILLIS * 100, "period": 100_000},
            "pids": {"limit": PIDS},
        }
        (bundle / "config.json").write_text(json.dumps(made))
        self._bundles[worker, tuple(command)] = bundle

    async def run(self, worker: int, command: Sequence[str]) -> str:
        """One `runc run`."""
        bundle = self._bundles[worker, tuple(command)]
        root = str(self._folder / "state")
        return await program(self._runc, "--root", root, "run", "--bundle", str(bundle), f"{self._tag}-{bundle.name}")

    def close(self) -> None:
        """Remove the control groups above those of the containers."""
        for folder, _, _ in os.walk("/sys/fs/cgroup"):
            if Path(folder).name == self._tag:
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()


class DockerRun:
    """The client, which asks the engine."""

    name = "docker run"

    def __init__(self, docker: Docker, image: Image) -> None:
        self._docker = docker
        self._tag = f"spinetta-bench-{secrets.token_hex(4)}"
        docker("import", str(image.tar), self._tag)

    async def run(self, worker: int, command: Sequence[str]) -> str:  # noqa: ARG002 - all workers are alike
        """One `docker run --rm`."""
        return await program(
            *("docker", "--host", self._docker.host, "run", "--rm", "--network", "none", "--read-only"),
            *("--user", f"{UID}:{UID}", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
            *("--memory", str(MEMORY_BYTES), "--memory-swap", str(MEMORY_BYTES), "--pids-limit", str(PIDS)),
            *("--cpus", str(CPU_MILLIS / 1000), "--tmpfs", "/tmp", self._tag, *command),  # noqa: S108 - inside
        )

    def close(self) -> None:
        """Remove the image."""
        self._docker("image", "rm", "--force", self._tag)


class Ours:
    """One runtime for all workers, as a daemon has. Its tasks are processes, unless something contains them."""

    def __init__(self, name: str, runtime: Runtime, state: Path) -> None:
        self.name = name
        self._runtime = runtime
        self._state = state
        self._folders: list[Path] = []
        self._count = 0

    def launch(self, key: str, command: Sequence[str]) -> Launch:
        """What is asked for, with the limits that all have."""
        return Launch(
            key=key,
            argv=tuple(command),
            env={},
            working_directory="",
            cpu_millis=CPU_MILLIS,
            memory_bytes=MEMORY_BYTES,
            pids_max=PIDS,
            walltime_s=0.0,
            grace_s=600.0,
            token=1,
            incarnation="bench",
        )

    async def run(self, worker: int, command: Sequence[str]) -> str:  # noqa: ARG002 - all workers are alike
        """Prepare, start, wait for the end, read the log, forget."""
        self._count += 1
        key = f"{self.name}.{self._count}"
        events = self._runtime.events()
        async with asyncio.timeout(LIMIT_S):
            prepared = await self._runtime.prepare(self.launch(key, command))
            ended = prepared if isinstance(prepared, Exit) else await self._runtime.start(prepared)
            if ended is None:
                async for event in events:
                    if isinstance(event, Exited) and event.key == key:
                        ended = event.exit
                        break
        assert ended is not None
        if ended.exit_code != 0:
            raise SystemExit(f"{self.name} {command}: {ended}")
        said = self._runtime.log_path(key, "stdout").read_text()
        await self._runtime.forget(key)
        if left := [path for path in self.traces(key) if path.exists()]:
            raise SystemExit(f"{self.name}: {left} is left of {key} when it is forgotten")
        return said

    def traces(self, key: str) -> list[Path]:
        """What there is of an attempt outside of its name spaces: its record, its scratch, its control groups."""
        if not self._folders:
            groups = json.loads((self._state / "shim.json").read_bytes())["cgroups"]
            self._folders = [self._state / "attempts", self._state / "scratch", *map(Path, groups)]
        return [folder / key for folder in self._folders]


class Contained(Ours):
    """In containers of an image that the node has, by the name that it has there."""

    IMAGE = "bench"

    def launch(self, key: str, command: Sequence[str]) -> Launch:
        """With the image's name."""
        return dataclasses.replace(super().launch(key, command), wants=ContainerSpec(self.IMAGE))


class Shim(Ours):
    """The shim's part: it is told the whole configuration."""

    def __init__(self, name: str, runtime: Runtime, state: Path, image: Image) -> None:
        super().__init__(name, runtime, state)
        self._image = image
        self._runc = runc_program()

    def launch(self, key: str, command: Sequence[str]) -> Launch:
        """With a configuration made here."""
        made = config(command, self._state / "scratch" / key)
        owner = (FIRST_ID + UID, FIRST_ID + UID)
        contained = ContainerLaunch(self._runc, made, (str(self._image.rootfs),), False, owner)
        return dataclasses.replace(super().launch(key, command), container=contained)


@dataclasses.dataclass
class Numbers:
    """Of one way at one concurrency."""

    walls_s: list[float] = dataclasses.field(default_factory=list)
    rates: list[float] = dataclasses.field(default_factory=list)
    starts_s: list[float] = dataclasses.field(default_factory=list)
    shim_cpu_s: list[float] = dataclasses.field(default_factory=list)
    run_walls_s: list[float] = dataclasses.field(default_factory=list)  # the median of each run


async def measure(way: Way, at_once: int, count: int, shim: Callable[[], float], into: Numbers) -> None:
    """One run: `count` of /bin/true by `at_once` workers, then a quarter as many that tell when they started."""
    walls: list[float] = []

    async def work(worker: int) -> None:
        for _ in range(count // at_once):
            began_s = time.perf_counter()
            await way.run(worker, TRUE)
            walls.append(time.perf_counter() - began_s)

    async def look(worker: int) -> None:
        for _ in range(max(count // 4 // at_once, 1)):
            began_s = time.time()
            into.starts_s.append(float(await way.run(worker, CLOCK)) - began_s)

    cpu_s, began_s = shim(), time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for worker in range(at_once):
            tasks.create_task(work(worker))
    into.rates.append(len(walls) / (time.perf_counter() - began_s))
    into.shim_cpu_s.append((shim() - cpu_s) / len(walls))
    into.walls_s += walls
    into.run_walls_s.append(median(walls))
    async with asyncio.TaskGroup() as tasks:
        for worker in range(at_once):
            tasks.create_task(look(worker))


def shim_and_helpers(pid: int) -> list[psutil.Process]:
    """The shim, and those of its children that are part of it: what writes its records, what watches the disk."""
    found = [psutil.Process(pid)]
    for child in found[0].children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name().startswith("spinetta-"):
                found.append(child)
    return found


@contextlib.asynccontextmanager
async def ways(folder: Path, wanted: Sequence[str], most: int) -> AsyncIterator[tuple[list[Way], Callable[[], float]]]:
    """All of them, and the CPU time of the shim and its helpers so far."""
    image = unpack(folder)
    found: list[Way] = []
    async with contextlib.AsyncExitStack() as stack:
        if "runc" in wanted:
            bare = BareRunc(folder, image)
            stack.callback(bare.close)
            for worker in range(most):
                for command in (TRUE, CLOCK):
                    bare.prepare(worker, command)
            found.append(bare)
        if "docker" in wanted:
            try:
                docker = stack.enter_context(engine(own=True))
            except NoDocker as e:
                raise SystemExit(f"no Docker to compare with: {e}") from None
            run = DockerRun(docker, image)
            stack.callback(run.close)
            found.append(run)
        if not {"ours", "shim", "process"} & set(wanted):
            yield found, lambda: 0.0
            return
        node = folder / "node"
        runtime = await stack.enter_async_context(
            ProcessRuntime.connect(node / "shim", node="bench", kill_margin_s=1.0)
        )
        stack.push_async_callback(runtime.shutdown_shim)
        await runtime.renew(time.clock_gettime(time.CLOCK_BOOTTIME))
        if "ours" in wanted:
            settings = Settings(
                "bench", "127.0.0.1:0", str(node), container_ids=FIRST_ID, container_program=runc_program()
            )
            here = await stack.enter_async_context(open_containers(settings, node, runtime))
            if here.images is None:
                raise SystemExit(f"no containers here: {here.warnings}")
            await here.images.pull(imageref.parse(str(image.tar)), name=str(imageref.parse_name(Contained.IMAGE)))
            found.append(Contained("ours", here.runtime, node / "shim"))
        if "shim" in wanted:
            found.append(Shim("shim", runtime, node / "shim", image))
        if "process" in wanted:
            found.append(Ours("process", runtime, node / "shim"))
        shim = runtime.shim_pid()

        def cpu_s() -> float:  # to the nanosecond; `psutil` counts by hundredths of a second
            total_ns = 0
            for process in shim_and_helpers(shim):
                with contextlib.suppress(OSError):  # one that empties the trash, and is gone
                    total_ns += int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[0])
            return total_ns / 1e9

        yield found, cpu_s


async def bench(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the table."""
    folder = Path(tempfile.mkdtemp(prefix="spinetta-bench-", dir=args.dir))
    numbers: dict[tuple[int, str], Numbers] = {}
    try:
        async with ways(folder, args.ways, max(args.at_once)) as (found, cpu_s):
            for way in found:  # what is slow only once
                for worker in range(max(args.at_once)):
                    await way.run(worker, TRUE)
            for run in range(args.runs):
                for at_once in args.at_once:
                    first = run % len(found)
                    for way in [*found[first:], *found[:first]]:
                        into = numbers.setdefault((at_once, way.name), Numbers())
                        await measure(way, at_once, args.count, cpu_s, into)
            names = [way.name for way in found]
    finally:
        shutil.rmtree(folder)
    return [row(numbers, at_once, name) for at_once in args.at_once for name in names]


def row(numbers: dict[tuple[int, str], Numbers], at_once: int, name: str) -> dict[str, Any]:
    """Medians over the runs; ratios are medians of each run's ratio."""
    mine = numbers[at_once, name]
    columns: dict[str, Any] = {
        "at once": at_once,
        "way": name,
        "a second": median(mine.rates),
        "wall ms p50": median(mine.walls_s) * 1e3,
        "p99": quantile(mine.walls_s, 0.99) * 1e3,
        "start ms p50": median(mine.starts_s) * 1e3,
        "start p99": quantile(mine.starts_s, 0.99) * 1e3,
    }
    if (runc := numbers.get((at_once, "runc run"))) is not None:
        columns["wall x runc"] = median([a / b for a, b in zip(mine.run_walls_s, runc.run_walls_s, strict=True)])
        # As the throughput sees it: the time of the machine for one container.
        columns["time x runc"] = median([b / a for a, b in zip(mine.rates, runc.rates, strict=True)])
    if (docker := numbers.get((at_once, "docker run"))) is not None:
        columns["rate x docker"] = median([a / b for a, b in zip(mine.rates, docker.rates, strict=True)])
    if name in ("ours", "shim", "process"):
        columns["shim CPU ms"] = median(mine.shim_cpu_s) * 1e3
    return columns


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=12, help="containers a run, for each way (12)")
    parser.add_argument("--runs", type=int, default=8, help="how often; short runs meet alike what else happens (8)")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4], help="workers (1 2 4)")
    parser.add_argument(
        "--ways", nargs="+", choices=("runc", "ours", "shim", "process", "docker"), help="which of them (all)",
        default=["runc", "ours", "shim", "process", "docker"],
    )  # fmt: skip
    parser.add_argument("--dir", default="/var/tmp", help="of ours and bare runc (/var/tmp)")  # noqa: S108 - a disk
    parser.add_argument("--json", action="store_true", help="the numbers as JSON")
    args = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("containers of a node are started by root")
    on = machine()
    runc = subprocess.run([runc_program(), "--version"], capture_output=True, text=True, check=False).stdout
    on["runc"] = runc.splitlines()[0].rpartition(" ")[2] if runc else "?"
    rows = asyncio.run(bench(args))
    report(f"containers: {args.count} of /bin/true, medians of {args.runs} runs", rows, args.json, on)


if __name__ == "__main__":
    main()
