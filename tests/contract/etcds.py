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
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from spinetta.errors import StoreUnavailable
from spinetta.model import Exit, Reason
from spinetta.store.members import status
from spinetta.store.process import (
    EtcdSettings,
    EtcdTls,
    Version,
    check_version,
    etcd_argv,
    etcd_env,
    find_etcd,
    initial_cluster,
    parse_version,
)
from spinetta.trust.certificates import Authority, create_authority, csr, issue_etcd, key_pem, new_key

START_S = 30.0
NEWER = Path(sys.prefix) / "share" / "spinetta" / "etcd-newer"  # where scripts/setup.sh --dev puts it
MORE = "SPINETTA_TEST_ETCDS"  # paths of further etcd programs to test with, with colons between
CLUSTER = "0123456789abcdef"
HOUR_S = 3600.0


@dataclass(frozen=True)
class Program:
    """An etcd to test with."""

    path: str
    version: Version

    @classmethod
    def of(cls, path: str) -> Program:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, env={})
        check_version(said.stdout)
        return cls(path, parse_version(said.stdout))


def find_program(which: str) -> Program:
    """The installed etcd, the newer one, or the one at a path; skips or fails the test that asks for one not there."""
    if which == "installed":
        return Program.of(find_etcd())
    if which != "newer":
        return Program.of(which)
    if (NEWER / "etcd").exists():
        return Program.of(str(NEWER / "etcd"))
    try:
        reason = (NEWER / "missing").read_text().strip()
    except FileNotFoundError:
        pytest.fail("there is no newer etcd to test with; scripts/setup.sh --dev fetches it")
    pytest.skip(f"NOT TESTED with a newer etcd, which scripts/setup.sh could not get: {reason}")


PROGRAMS = ("installed", "newer", *filter(None, os.environ.get(MORE, "").split(":")))


def loopback_host() -> str:
    """An address of its own for one member, so that tests that run at once do not meet."""
    return f"127.{random.randint(1, 254)}.{random.randint(0, 254)}.{random.randint(1, 254)}"


def free_port(host: str) -> int:
    with socket.socket() as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


def replace_file(path: Path, data: bytes) -> None:
    """At once, as nodes do it: whoever reads sees the old content or the new."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(data)
    new.chmod(0o600)
    new.replace(path)


@dataclass
class VoterFiles:
    """The certificate files of one voter, and who has issued them."""

    folder: Path
    name: str
    address: str
    authority: Authority
    key_pem: bytes = b""

    @property
    def tls(self) -> EtcdTls:
        return EtcdTls(
            ca_file=self.folder / f"{self.name}-etcd-ca.pem",
            cert_file=self.folder / f"{self.name}-etcd.pem",
            key_file=self.folder / f"{self.name}-etcd.key",
        )

    def renew(self, *, lifetime_s: float = HOUR_S, now_s: float | None = None) -> None:
        """Make the first certificate, or a new one for the same key."""
        key = new_key() if not self.key_pem else None
        if key is not None:
            self.key_pem, self.request = key_pem(key), csr(key, self.name)
            self.trust(self.authority)
            replace_file(self.tls.key_file, self.key_pem)
        now_s = time.time() if now_s is None else now_s
        pem = issue_etcd(
            self.authority, self.request, name=self.name, address=self.address, now_s=now_s, lifetime_s=lifetime_s
        )
        replace_file(self.tls.cert_file, pem)

    def trust(self, *authorities: Authority) -> None:
        """The CAs that this voter trusts from now on."""
        replace_file(self.tls.ca_file, b"".join(each.certificate_pem for each in authorities))


def etcd_authority() -> Authority:
    return create_authority("etcd", CLUSTER, now_s=time.time())


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

    def __init__(self, directory: Path, name: str = "a", authority: Authority | None = None) -> None:
        self.host = loopback_host()
        self.client = f"{self.host}:{free_port(self.host)}"
        self.peer = f"{self.host}:{free_port(self.host)}"
        self.files = VoterFiles(directory, name, self.host, authority) if authority is not None else None
        if self.files is not None:
            self.files.renew()
        scheme = "http" if self.files is None else "https"
        peer = f"{scheme}://{self.peer}"
        self.directory = directory
        self.settings = EtcdSettings(
            program="etcd",
            name=name,
            data_dir=directory / f"{name}.etcd",
            client_url=f"{scheme}://{self.client}",
            peer_url=peer,
            initial_cluster=initial_cluster([(name, peer)]),
            tls=self.files.tls if self.files is not None else None,
        )
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def tls(self) -> Callable[[], EtcdTls] | None:
        """For `EtcdStore`: as this member's own node."""
        files = self.files
        return (lambda: files.tls) if files is not None else None

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
                if (await status(self.client, self.tls, timeout_s=1.0)).healthy:
                    return
            except StoreUnavailable:
                if time.monotonic() > end_s:
                    raise
            await asyncio.sleep(0.02)

    def send(self, number: int) -> None:
        """Signal it; returns from SIGSTOP when it has stopped: its threads do so one after the other."""
        assert self.process is not None
        self.process.send_signal(number)
        until_s = time.monotonic() + START_S
        while number == signal.SIGSTOP and psutil.Process(self.process.pid).status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < until_s, "it does not stop"
            time.sleep(0.001)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextlib.asynccontextmanager
async def etcd(*more: str, authority: Authority | None = None) -> AsyncIterator[Etcd]:
    """A healthy etcd of one member, with further flags; under TLS when there is an authority."""
    with tempfile.TemporaryDirectory(prefix="spinetta-etcd-") as folder:
        found = Etcd(Path(folder), authority=authority)
        found.launch(*more)
        try:
            await found.ready()
            yield found
        finally:
            found.kill()


@contextlib.contextmanager
def shared_etcd(authority: Authority | None = None) -> Iterator[Etcd]:
    """The same, for use from many event loops."""
    folder = Path(tempfile.mkdtemp(prefix="spinetta-etcd-"))
    found = Etcd(folder, authority=authority)
    found.launch()
    try:
        asyncio.run(found.ready())
        yield found
    finally:
        found.kill()
        shutil.rmtree(folder)
