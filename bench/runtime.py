"""The process runtime alone: latency of a start, attempts a second, the shim's memory. ``python -m bench.runtime``."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

import psutil

from spinetta.runtime.process import ProcessRuntime
from spinetta.runtime.protocol import Exited, Launch


def attempt(key: str) -> Launch:
    """One `/bin/true`."""
    return Launch(
        key=key,
        argv=["/bin/true"],
        env={},
        working_directory="",
        cpu_millis=1000,
        memory_bytes=64 << 20,
        pids_max=64,
        walltime_s=0.0,
        grace_s=600.0,
        token=1,
        incarnation="bench",
    )


async def run_one(rt: ProcessRuntime, key: str) -> tuple[float, float]:
    """Seconds from the request to the running program, and to its reported end. Its record is forgotten after."""
    events = rt.events()
    began_s = time.perf_counter()
    await rt.start(attempt(key))
    started_s = time.perf_counter() - began_s
    async for event in events:
        if isinstance(event, Exited) and event.key == key:
            break
    ended_s = time.perf_counter() - began_s
    await rt.forget(key)
    return started_s, ended_s


def percentiles(seconds: list[float]) -> str:
    """Median and 99th percentile in milliseconds."""
    ordered = sorted(seconds)
    return "p50 {:.1f} ms, p99 {:.1f} ms".format(*(ordered[int(len(ordered) * p)] * 1e3 for p in (0.5, 0.99)))


async def bench(count: int, at_once: int) -> None:
    """Print the numbers."""
    with tempfile.TemporaryDirectory(prefix="spinetta-bench-") as folder:
        async with ProcessRuntime.connect(Path(folder) / "shim", node="bench", kill_margin_s=1.0) as rt:
            await rt.renew(time.clock_gettime(time.CLOCK_BOOTTIME))
            shim = psutil.Process(rt.shim_pid())
            for process in (shim, *shim.children()):
                memory = process.memory_full_info()
                print(f"{process.name()}: {memory.rss >> 10} KiB resident, {memory.uss >> 10} KiB of it its own")
            times = [await run_one(rt, f"one.{n}") for n in range(count)]
            print(f"one after another, {count}: start {percentiles([started for started, _ in times])}")
            print(f"one after another, {count}: end   {percentiles([ended for _, ended in times])}")
            slots = asyncio.Semaphore(at_once)

            async def in_slot(key: str) -> None:
                async with slots:
                    await run_one(rt, key)

            began_s = time.perf_counter()
            async with asyncio.TaskGroup() as tasks:
                for n in range(count):
                    tasks.create_task(in_slot(f"many.{n}"))
            print(f"{at_once} at a time: {count / (time.perf_counter() - began_s):.0f} a second")
            await rt.shutdown_shim()


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--at-once", type=int, default=8)
    arguments = parser.parse_args()
    asyncio.run(bench(arguments.count, arguments.at_once))


if __name__ == "__main__":
    main()
