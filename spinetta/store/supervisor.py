"""Keeps this node's etcd member running, as a service of the shim, so that it outlives the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import tenacity

from spinetta.errors import Fenced, RuntimeUnavailable, StoreUnavailable, UserError
from spinetta.model import Exit
from spinetta.store.members import MemberStatus, status
from spinetta.store.process import EtcdSettings, Version, etcd_argv, etcd_env
from spinetta.trust.backoff import Backoff

log = logging.getLogger("spinetta.store")

SERVICE = "etcd"
POLL_S = 1.0  # how soon an ended etcd is noticed; the others do not wait for it
HEALTH_POLL_S = 0.05  # a start takes 0.2 s to 2 s
RESTART_FIRST_S, RESTART_MOST_S = 0.5, 30.0
STEADY_S = 60.0  # after so long a run the next failure starts at the shortest wait again
STOP_WAIT_S = 10.0  # etcd ends within a second; then it is killed, which its log is made for
LOG_BYTES_MAX = 16 << 20  # at level "warn" a healthy member writes a few KB a day
LOG_TAIL_BYTES = 64 << 10  # enough for the last words of an etcd that ended

REMOVED_WORDS = ("permanently removed from the cluster", "the member has been permanently removed")
IN_USE_WORDS = ("address already in use",)
OTHER_CLUSTER_WORDS = ("cluster ID mismatch", "member count is unequal", "unmatched member while checking")


class ServiceState(Protocol):
    """A service that the shim knows: running when `exit` is None."""

    @property
    def pid(self) -> int:
        """As the daemon sees it."""
        ...

    @property
    def exit(self) -> Exit | None:
        """How it ended."""
        ...


class Services(Protocol):
    """What the shim does for long-running programs. Raises `RuntimeUnavailable` while it cannot be reached."""

    async def start_service(
        self, name: str, argv: Sequence[str], env: Mapping[str, str], cwd: str, log_path: Path
    ) -> object:
        """Start it; one that runs is left alone. Output is appended to `log_path`."""
        ...

    async def stop_service(self, name: str, signal: int, wait_s: float) -> object:
        """Send the signal, wait so long, then kill. Answers when it has ended; no error if there is none."""
        ...

    async def service(self, name: str) -> ServiceState | None:
        """Its state; None when it was never started."""
        ...


class EtcdSupervisor:
    """One etcd member, from start to stop.

    Whether etcd may be started on this directory at all is for `identity.check_data_dir`, to be asked before.

    Args:
        services: the shim.
        settings: of the member.
        log_path: absolute; etcd's own log. Kept below `LOG_BYTES_MAX`, with the previous one beside it as ``.1``.
        version: of the etcd program, as `process.parse_version` gives it.
    """

    def __init__(
        self, services: Services, settings: EtcdSettings, *, log_path: Path, version: Version = (3, 4, 23)
    ) -> None:
        self.settings = settings
        self._services = services
        self._log_path = log_path
        self._argv = etcd_argv(settings, version)
        self._tls = (lambda: tls) if (tls := settings.tls) is not None else None
        self._changing = asyncio.Lock()  # of `restart` and `run`, which both start it

    async def start(self, *, timeout_s: float = 60.0) -> MemberStatus:
        """Start etcd, or take over the one that runs, and wait until it is part of its cluster.

        Raises:
            UserError: it cannot run like this: a port is in use, the directory is of another cluster.
            Fenced: this member has been removed from its cluster.
            StoreUnavailable: not ready in time; etcd goes on trying (it waits for a majority of its cluster).
            RuntimeUnavailable: the shim cannot be reached.
        """
        if not await self.running():
            await self._launch()
        return await self.wait_healthy(timeout_s=timeout_s)

    async def running(self) -> bool:
        """Whether the process is there, healthy or not."""
        found = await self._services.service(SERVICE)
        return found is not None and found.exit is None

    async def wait_healthy(self, *, timeout_s: float) -> MemberStatus:
        """Wait until the member answers and knows a leader. Raises as `start`."""
        async for attempt in tenacity.AsyncRetrying(
            stop=tenacity.stop_after_delay(timeout_s),
            wait=tenacity.wait_fixed(HEALTH_POLL_S),
            retry=tenacity.retry_if_exception_type(StoreUnavailable),
            reraise=True,
        ):
            with attempt:
                return await self._healthy()
        raise StoreUnavailable("etcd is not healthy")  # not reached: tenacity raises the last error

    async def _healthy(self) -> MemberStatus:
        try:
            found = await status(self.settings.client_url, self._tls, timeout_s=1.0)
        except StoreUnavailable:
            await self._raise_if_ended()
            raise
        if not found.healthy:
            raise StoreUnavailable(f"etcd at {self.settings.client_url} knows no leader yet")
        return found

    async def run(self) -> None:
        """Keep it running, for ever: start it again when it ends, later and later while it keeps ending.

        Raises:
            Fenced: this member has been removed from its cluster; it must not be started again.
        """
        wait = Backoff(RESTART_FIRST_S, RESTART_MOST_S)
        since_s = time.monotonic()
        while True:
            await asyncio.sleep(POLL_S)
            try:
                self._bound_log()
                if await self.running():
                    if time.monotonic() - since_s > STEADY_S:
                        wait.reset()
                    continue
                self._raise_if_removed()
                wait_s = wait.next_s()
                log.warning("etcd has ended (see %s); starting it again in %.1f s", self._log_path, wait_s)
                await asyncio.sleep(wait_s)
                since_s = time.monotonic()
                async with self._changing:
                    if not await self.running():
                        await self._launch()
            except (RuntimeUnavailable, UserError, OSError) as error:  # such as a port that the ending etcd still has
                log.warning("etcd cannot be looked after now: %s", error)

    async def restart(self, *, timeout_s: float = 60.0) -> MemberStatus:
        """Stop it in order and start it again, so that it reads what it reads only at its start: the CAs it trusts.

        The others serve meanwhile; restart the next one only when this has returned. Raises as `start`.
        """
        async with self._changing:
            await self.stop()
            await self._launch()
        return await self.wait_healthy(timeout_s=timeout_s)

    async def stop(self, *, wait_s: float = STOP_WAIT_S) -> None:
        """Stop it in order: it hands over its leadership first. No error if it does not run."""
        await self._services.stop_service(SERVICE, int(signal.SIGTERM), wait_s)

    # --- inside --------------------------------------------------------------------------------------------------

    async def _launch(self) -> None:
        for url in (self.settings.client_url, self.settings.peer_url):
            check_free(url)
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        self.settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._log_bytes():
            # One start, one file: what etcd says of this start must not be mixed up with the last words of an earlier.
            self._log_path.replace(self._previous_log)
        env = etcd_env(os.environ.get("PATH", "/usr/bin:/bin"))
        await self._services.start_service(SERVICE, self._argv, env, str(self.settings.data_dir), self._log_path)

    async def _raise_if_ended(self) -> None:
        found = await self._services.service(SERVICE)
        if found is None or found.exit is None:
            return
        self._raise_if_removed()
        tail = self._log_tail()
        if any(words in tail for words in IN_USE_WORDS):
            raise UserError(
                f"etcd cannot listen on {self.settings.client_url} or {self.settings.peer_url}: in use",
                hint="choose other ports with --etcd-client-port and --etcd-peer-port",
                field="node.etcd_client_port",
                reason="address-in-use",
            )
        if any(words in tail for words in OTHER_CLUSTER_WORDS):
            raise UserError(
                f"etcd's data in {self.settings.data_dir} is of another cluster",
                hint="give the node another --data-dir",
                reason="foreign-data",
            )
        last = tail.strip().splitlines()[-1:] or ["it wrote no log"]
        raise UserError(f"etcd ended: {last[0][:500]}", hint=f"its log is {self._log_path}", reason="etcd-ended")

    def _raise_if_removed(self) -> None:
        if any(words in self._log_tail() for words in REMOVED_WORDS):
            raise Fenced("this node's etcd member has been removed from its cluster")

    @property
    def _previous_log(self) -> Path:
        return self._log_path.with_name(self._log_path.name + ".1")

    def _log_bytes(self) -> int:
        try:
            return self._log_path.stat().st_size
        except FileNotFoundError:
            return 0

    def _log_tail(self) -> str:
        try:
            with self._log_path.open("rb") as file:
                file.seek(max(0, self._log_bytes() - LOG_TAIL_BYTES))
                return file.read(LOG_TAIL_BYTES).decode(errors="replace")
        except FileNotFoundError:
            return ""

    def _bound_log(self) -> None:
        """Etcd appends to a file that it cannot be told to reopen: keep the tail of it and cut the file itself."""
        if self._log_bytes() > LOG_BYTES_MAX:
            self._previous_log.write_text(self._log_tail(), encoding="utf-8")
            os.truncate(self._log_path, 0)


def check_free(url: str) -> None:
    """See that an address can be listened on, because etcd says it late and among much else.

    Raises:
        UserError: it cannot.
    """
    parts = urlsplit(url)
    family = socket.AF_INET6 if ":" in (parts.hostname or "") else socket.AF_INET
    with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((parts.hostname, parts.port))
        except OSError as error:
            raise UserError(
                f"etcd cannot listen on {parts.netloc}: {os.strerror(error.errno or 0)}",
                hint="another program uses the port: choose others with --etcd-client-port and --etcd-peer-port",
                field="node.etcd_client_port",
                reason="address-in-use",
            ) from error
