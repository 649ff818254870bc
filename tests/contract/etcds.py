"""Real etcds for tests: on random loopback addresses and free ports, held by plain subprocesses."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spinetta.errors import StoreUnavailable
from spinetta.model import Exit, Reason
from spinetta.store.members import status
from spinetta.store.process import EtcdSettings, etcd_argv, etcd_env, initial_cluster

START_S = 30.0


def loopback_host() -> str:
    """An address of its own for one member, so that tests that run at once do not meet."""
    return f"127.{random.randint(1, 254)}.{random.randint(0, 254)}.{random.randint(1, 254)}"


def free_port(host: str) -> int:
    with socket.socket() as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


@dataclass
class Running:
    """A subprocess as `store.supervisor.ServiceState` sees a service."""

    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def exit(self) -> Exit | None:
        code = self.process.poll()
        if code is None:
            return None
        return Exit(Reason.EXIT, exit_code=code) if code >= 0 else Exit(Reason.SIGNAL, signal=-code)


@dataclass
class LocalServices:
    """`store.supervisor.Services` over plain subprocesses. Outlives supervisors, as the shim does."""

    running: dict[str, Running] = field(default_factory=dict)

    async def start_service(
        self, name: str, argv: Sequence[str], env: Mapping[str, str], cwd: str, log_path: Path
    ) -> object:
        found = self.running.get(name)
        if found is None or found.exit is not None:
            with log_path.open("ab") as log:
                process = subprocess.Popen(  # noqa: ASYNC220 - milliseconds, and it must outlive the loop
                    list(argv), env=dict(env), cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            self.running[name] = Running(process)
        return None

    async def stop_service(self, name: str, signal: int, wait_s: float) -> object:
        found = self.running.get(name)
        if found is None or found.exit is not None:
            return None
        found.process.send_signal(signal)
        try:
            await asyncio.to_thread(found.process.wait, wait_s)
        except subprocess.TimeoutExpired:
            found.process.kill()
            await asyncio.to_thread(found.process.wait)
        return None

    async def service(self, name: str) -> Running | None:
        return self.running.get(name)

    def end(self) -> None:
        """Whatever a test left behind."""
        for each in self.running.values():
            if each.exit is None:
                with contextlib.suppress(ProcessLookupError):
                    each.process.send_signal(signal.SIGCONT)
                each.process.kill()
            each.process.wait()


class Etcd:
    """One real etcd, started and stopped by hand."""

    def __init__(self, directory: Path, name: str = "a") -> None:
        host = loopback_host()
        self.client = f"{host}:{free_port(host)}"
        peer = f"http://{host}:{free_port(host)}"
        self.directory = directory
        self.settings = EtcdSettings(
            program="etcd",
            name=name,
            data_dir=directory / f"{name}.etcd",
            client_url=f"http://{self.client}",
            peer_url=peer,
            initial_cluster=initial_cluster([(name, peer)]),
        )
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def launch(self, *more: str) -> None:
        self.settings.data_dir.mkdir(mode=0o700, exist_ok=True)
        with (self.directory / f"{self.settings.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*etcd_argv(self.settings), *more],
                env=dict(etcd_env(os.environ["PATH"])),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    async def ready(self) -> None:
        end_s = time.monotonic() + START_S
        while True:
            try:
                if (await status(self.client, timeout_s=1.0)).healthy:
                    return
            except StoreUnavailable:
                if time.monotonic() > end_s:
                    raise
            await asyncio.sleep(0.02)

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextlib.asynccontextmanager
async def etcd(*more: str) -> AsyncIterator[Etcd]:
    """A healthy etcd of one member, with further flags."""
    with tempfile.TemporaryDirectory(prefix="spinetta-etcd-") as folder:
        found = Etcd(Path(folder))
        found.launch(*more)
        try:
            await found.ready()
            yield found
        finally:
            found.kill()


@contextlib.contextmanager
def shared_etcd() -> Iterator[Etcd]:
    """The same, for use from many event loops."""
    folder = Path(tempfile.mkdtemp(prefix="spinetta-etcd-"))
    found = Etcd(folder)
    found.launch()
    try:
        asyncio.run(found.ready())
        yield found
    finally:
        found.kill()
        shutil.rmtree(folder)
