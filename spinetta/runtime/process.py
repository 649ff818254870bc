"""The `process` runtime: plain processes, held by the shim."""

from __future__ import annotations

import asyncio
import os
import signal as signals
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from spinetta.errors import RuntimeUnavailable, SpinettaError, UserError
from spinetta.model import Exit, Reason, Usage
from spinetta.runtime import startmessage
from spinetta.runtime.client import (
    REQUEST_LIMIT_S,
    Hello,
    Sample,
    ShimClient,
    cancelled,
    open_client,
    parse_exit,
    parse_sample,
    parse_usage,
)
from spinetta.runtime.feed import Hub
from spinetta.runtime.launch import IDLE_END_S, launch
from spinetta.runtime.processes import open_process
from spinetta.runtime.protocol import AttemptKey, Exited, Held, Launch, ShimLost
from spinetta.runtime.shim.wire import KEY, Message

START_LIMIT_S = 30.0  # includes writing the intent, on a slow disk
RETRY_FIRST_S = 0.02
RETRY_MOST_S = 2.0
ATTACH_LIMIT_S = 60.0  # from `connect` to a shim that answers
LOST = ""  # subject of ShimLost; no attempt has this key


@dataclass(frozen=True, slots=True)
class Service:
    """A long-running program of the node itself, such as etcd: running when `exit` is None.

    `pid` is as the daemon sees it; 0 when it did not start.
    """

    name: str
    pid: int
    started_ms: int
    exit: Exit | None


class ProcessRuntime:
    """Runs attempts as plain processes through the node's shim; implements `protocol.Runtime`. See `connect`.

    While the shim cannot be reached, requests wait for it as long as their limit, then raise RuntimeUnavailable. All
    of them may be repeated. If the shim has died another is started at once.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        node: str,
        kill_margin_s: float,
        isolate: bool,
        idle_end_s: float,
        home: Path | None = None,
        hub: Hub[Exited | ShimLost] | None = None,
        at_once: bool = False,
    ) -> None:
        self._state_dir = state_dir.absolute()
        self._home = (home or state_dir).absolute()
        self._node = node
        self._kill_margin_s = kill_margin_s
        self._isolate = isolate
        self._idle_end_s = idle_end_s
        self._client: ShimClient | None = None
        self._hello: Hello | None = None
        self._up = asyncio.Event()
        self._settled = asyncio.Event()  # the first try to connect has come to an end
        self._failure: SpinettaError | None = None
        self._is_patient = at_once
        self._closing = False
        self._ended: dict[AttemptKey, Exited] = {}
        self._hub: Hub[Exited | ShimLost] = hub or Hub()
        self._shares_hub = hub is not None
        self._unheld: set[str] = set()  # limits that were asked for and this shim does not know

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        state_dir: Path,
        *,
        node: str,
        kill_margin_s: float,
        isolate: bool = True,
        idle_end_s: float = IDLE_END_S,
        home: Path | None = None,
        hub: Hub[Exited | ShimLost] | None = None,
        at_once: bool = False,
    ) -> AsyncIterator[ProcessRuntime]:
        """Attach to the shim of `state_dir`, starting one when none is alive. Leaving the block leaves it running.

        `kill_margin_s` is the time before the end of its grace at which the shim kills an attempt; a shim that runs
        with a wider one keeps it. `isolate=False` does without a pid namespace. A shim that holds nothing and has
        no client for `idle_end_s` ends by itself. Logs and kept scratch directories are in `home`, by default the state
        directory; one of several shims of a node tells its news to their common `hub`. With `at_once` the block
        begins before there is a connection, which is tried for as long as it lasts; see `attached`. RuntimeUnavailable:
        no shim could be started or reached; UserError: one of another version runs.
        """
        runtime = cls(
            state_dir,
            node=node,
            kill_margin_s=kill_margin_s,
            isolate=isolate,
            idle_end_s=idle_end_s,
            home=home,
            hub=hub,
            at_once=at_once,
        )
        supervising = asyncio.create_task(runtime._supervise())
        try:
            if not at_once:
                await runtime.attached()
            yield runtime
        finally:
            runtime._closing = True
            await cancelled(supervising)
            if not supervising.cancelled():
                supervising.result()

    async def attached(self) -> None:
        """Return when the shim has been connected to; errors as for `connect`."""
        await self._settled.wait()
        if self._failure is not None:
            raise self._failure

    # protocol.Runtime --------------------------------------------------------------------------------------------

    def capabilities(self) -> tuple[str, ...]:
        """Names of what is enforced here; `warnings` tells why others are missing."""
        return self._hello.capabilities if self._hello else ()

    async def prepare(self, launch: Launch) -> Launch | Exit:
        """A plain process needs nothing; containers are not for this runtime."""
        if launch.wants is None:
            return launch
        return Exit(Reason.NODE_UNFIT, message="this node runs no containers", ended_ms=time.time_ns() // 1_000_000)

    async def start(self, launch: Launch) -> Exit | None:
        """Start an attempt; see `protocol.Runtime.start`."""
        if not KEY.match(launch.key):
            raise UserError(f"{launch.key!r} cannot be the name of a directory and a cgroup", field="key")
        if problem := startmessage.unusable(launch):
            # Not for the shim to refuse: to be told again and again that a request is malformed would help nobody.
            return Exit(Reason.SPAWN_FAILED, message=problem, ended_ms=time.time_ns() // 1_000_000)
        if self._hello is not None and (lacking := startmessage.lacking(launch, self._hello)):
            return Exit(Reason.NODE_UNFIT, message=lacking, ended_ms=time.time_ns() // 1_000_000)
        if self._hello is not None:
            self._unheld |= startmessage.limits_unheld(launch, self._hello)
        answer = await self._ask("start", START_LIMIT_S, **startmessage.fields_of(launch))
        return parse_exit(answer["exit"])

    async def stop(self, key: AttemptKey, why: str) -> None:
        """Ask for the end of an attempt; see `protocol.Runtime.stop`."""
        if KEY.match(key):  # of others none was ever started
            await self._ask("stop", key=key, why=str(why))

    async def renew(self, renewed_at_s: float) -> None:
        """Tell of a committed renewal; see `protocol.Runtime.renew`."""
        await self._ask("renew", renewed_at_s=renewed_at_s)

    async def forget(self, key: AttemptKey) -> None:
        """Remove all but the logs of an ended attempt; see `protocol.Runtime.forget`."""
        if KEY.match(key):
            await self._ask("forget", key=key)
        self._ended.pop(key, None)
        self._hub.drop(key)

    async def held(self) -> Sequence[Held]:
        """All attempts that run or have ended and are not forgotten, by key."""
        held: list[Held] = []
        more = True
        while more:
            answer = await self._ask("held", after=held[-1].key if held else "")
            held += [
                Held(one["key"], one["token"], one["incarnation"], one["started_ms"], parse_exit(one["exit"]))
                for one in answer["held"]
            ]
            more = answer["more"]
        return held

    async def usage(self, key: AttemptKey) -> Usage | None:
        """Use so far of a running attempt; None when it is over or nothing here counts it."""
        usage = (await self._ask("usage", key=key))["usage"] if KEY.match(key) else None
        return None if usage is None else parse_usage(usage)

    async def sample(self, key: AttemptKey) -> Sample | None:
        """Use so far of a running attempt and at this moment; None when it is over or nothing here counts it."""
        usage = (await self._ask("usage", key=key))["usage"] if KEY.match(key) else None
        return None if usage is None else parse_sample(usage)

    def events(self) -> AsyncIterator[Exited | ShimLost]:
        """Ends of attempts as they happen, beginning with those not forgotten yet.

        Listens from the call on, not from the first step of the iteration. Ends when the runtime is closed.
        """
        feed = self._hub.open()
        for key, exited in self._ended.items():
            feed.put(key, exited)
        return feed

    @property
    def unforgotten(self) -> Mapping[AttemptKey, Exited]:
        """Ends that this connection has told of and that are not forgotten yet."""
        return self._ended

    @property
    def state_dir(self) -> Path:
        """Where the shim keeps everything."""
        return self._state_dir

    @property
    def logs_dir(self) -> Path:
        """Holds one directory of logs for each attempt, by key."""
        return self._home / "logs"

    def log_path(self, key: AttemptKey, stream: str) -> Path:
        """Where ``stdout`` or ``stderr`` of an attempt is, or would be."""
        return self.logs_dir / key / stream

    # Services ----------------------------------------------------------------------------------------------------

    async def start_service(
        self, name: str, argv: Sequence[str], env: Mapping[str, str], cwd: str, log_path: Path
    ) -> Service:
        """Start a program of the node itself; one of that name that runs is left alone and returned.

        Its output is appended to `log_path` (absolute). It outlives the daemon and is not subject to the dead-man's
        switch. When it could not be started the answer has an `exit` with the reason.
        """
        answer = await self._ask(
            "start_service",
            START_LIMIT_S,
            key=name,
            argv=list(argv),
            env=dict(env),
            cwd=cwd,
            log_path=str(log_path),
        )
        return _parse_service(answer["service"])

    async def stop_service(
        self, name: str, signal: int = signals.SIGTERM, wait_s: float = 10.0, limit_s: float = 30.0
    ) -> Service | None:
        """Send `signal` to a service, SIGKILL after `wait_s`, and return it when it has ended; None: there is none."""
        answer = await self._ask("stop_service", wait_s + limit_s, key=name, signal=int(signal), wait_s=wait_s)
        return None if answer["service"] is None else _parse_service(answer["service"])

    async def service(self, name: str) -> Service | None:
        """A service that runs or has ended; None when none of that name was started."""
        return next((one for one in await self.services() if one.name == name), None)

    async def services(self) -> list[Service]:
        """All of them."""
        return [_parse_service(one) for one in (await self._ask("services"))["services"]]

    # The shim ----------------------------------------------------------------------------------------------------

    def warnings(self) -> tuple[str, ...]:
        """What this machine lacks and what that weakens, for people."""
        limits = tuple(
            f"{name} is missing: this node's shim is of an older version; tasks that ask for that limit run without it"
            for name in sorted(self._unheld)
        )
        return (self._hello.warnings if self._hello else ()) + limits

    @property
    def has_answered(self) -> bool:
        """It has been connected to, now or before."""
        return self._hello is not None

    @property
    def failure(self) -> str:
        """Why there is no connection, if that is known."""
        return str(self._failure or "")

    @property
    def is_open(self) -> bool:
        """Connected at this moment."""
        return self._client is not None and not self._client.broken.is_set()

    @property
    def hello(self) -> Hello:
        """What the shim said of itself when it was last connected to."""
        assert self._hello is not None  # noqa: S101 - `connect` gives nobody a runtime that was never connected
        return self._hello

    def shim_pid(self) -> int:
        """The shim's pid as we see it."""
        return self._hello.pid if self._hello else 0

    def shim_id(self) -> str:
        """Changes with every new shim."""
        return self._hello.shim if self._hello else ""

    async def shutdown_shim(self, why: str = "released", wait_s: float = 10.0, limit_s: float = 60.0) -> None:
        """End all attempts (their exits carry `why`), then all services, then the shim; returns when it is gone.

        `wait_s` is the most that each has between TERM and KILL. Exits stay on disk for the next shim to report. The
        runtime is of no use afterwards.
        """
        is_asked, self._closing = self._closing, True
        try:
            async with asyncio.timeout(limit_s):
                pidfd = open_process(self.shim_pid())
                try:
                    try:
                        await self._ask("shutdown", limit_s, why=str(why), wait_s=wait_s)
                    except RuntimeUnavailable:
                        if not is_asked:  # else it is about to end
                            raise
                    await _readable(pidfd)
                finally:
                    os.close(pidfd)
        except ProcessLookupError:
            return
        except TimeoutError:
            raise RuntimeUnavailable(f"the shim has not ended within {limit_s:g} s") from None

    # The connection ----------------------------------------------------------------------------------------------

    async def _ask(self, op: str, limit_s: float = REQUEST_LIMIT_S, **fields: object) -> Message:
        try:
            async with asyncio.timeout(limit_s):
                await self._up.wait()
        except TimeoutError:
            raise self._failure or RuntimeUnavailable(f"no shim answers for {self._state_dir}") from None
        if self._client is None:
            raise self._failure or RuntimeUnavailable("the runtime is closed")
        return await self._client.request(op, limit_s, **fields)

    async def _supervise(self) -> None:
        """Keep a connection, to a new shim if need be, until cancelled or told to close."""
        delay_s = RETRY_FIRST_S
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + ATTACH_LIMIT_S
        try:
            while not self._closing:
                try:
                    await self._serve_once()
                    delay_s = RETRY_FIRST_S
                except (OSError, TimeoutError) as error:
                    self._failure = RuntimeUnavailable(f"no shim answers for {self._state_dir}: {error}")
                    if loop.time() > give_up_s and not self._settled.is_set() and not self._is_patient:
                        return
                except SpinettaError as error:
                    self._failure = error
                    waits = self._is_patient and isinstance(error, RuntimeUnavailable)
                    if not self._settled.is_set() and not waits:
                        return
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, RETRY_MOST_S)
        finally:
            self._settled.set()
            self._up.set()  # nobody is to wait for a connection that will not come
            if not self._shares_hub:
                self._hub.close()

    async def _serve_once(self) -> None:
        """Connect, starting a shim when none listens; then serve until the connection breaks."""
        if self._closing:
            return
        try:
            await self._serve_connection()
        except (FileNotFoundError, NotADirectoryError, PermissionError, ConnectionRefusedError):
            started = await launch(
                self._state_dir,
                node=self._node,
                kill_margin_s=self._kill_margin_s,
                isolate=self._isolate,
                idle_end_s=self._idle_end_s,
                home=self._home,
            )
            if not started:
                raise
            await self._serve_connection()

    async def _serve_connection(self) -> None:
        async with open_client(self._state_dir, self._on_event) as client:
            try:
                self._hello = await client.hello(self._kill_margin_s)
                # Events come before the answers to anything asked from here on, so none falls between.
                await client.request("subscribe")
            except RuntimeUnavailable as error:
                if client.broken.is_set():  # it is just dying: the next try finds it dead
                    raise ConnectionResetError(str(error)) from None
                raise
            self._client, self._failure = client, None
            self._up.set()
            self._settled.set()
            try:
                await client.broken.wait()
            finally:
                self._up.clear()
                self._client = None
                self._ended.clear()
                if not self._closing:
                    self._hub.put(LOST, ShimLost())

    def _on_event(self, message: Message) -> None:
        end = parse_exit(message.get("exit"))
        if end is None or message["event"] != "exited":  # ends of services are asked for, see `service`
            return
        exited = Exited(message["key"], end)
        self._ended[exited.key] = exited
        self._hub.put(exited.key, exited)


def _parse_service(value: Message) -> Service:
    return Service(value["key"], value["pid"], value["started_ms"], parse_exit(value["exit"]))


async def _readable(fd: int) -> None:
    """Wait until `fd` is ready for reading."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)
