"""A node's start: logging, the lock on its directory, its credentials, its shim, its cluster, then its daemon."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from pathlib import Path

from spinetta import names
from spinetta.config import Resolved, Settings
from spinetta.errors import RuntimeUnavailable, StoreUnavailable, UserError
from spinetta.node import founding, recovery
from spinetta.node.admission import admit
from spinetta.node.containers import open_containers
from spinetta.node.daemon import BEGIN_ANEW, EXIT_OK, Daemon
from spinetta.node.entry import Entrance, enter, etcd_tls, remembered
from spinetta.node.lock import DirectoryLock
from spinetta.node.networks import network_place
from spinetta.node.signals import StopSignals, Wish
from spinetta.node.threads import standing_threads
from spinetta.runtime.shim import sysapi
from spinetta.runtime.shims import Shims
from spinetta.store.etcd import EtcdStore
from spinetta.store.gateway import GatewayStore
from spinetta.store.supervisor import SERVICE as ETCD_SERVICE
from spinetta.trust.audit import open_log
from spinetta.trust.credentials import NodeCredentials
from spinetta.trust.dial import Dialer

log = logging.getLogger("spinetta.node")

ANEW_STEADY_S = 120.0  # a daemon that lived this long before it has to begin again does so at once
ANEW_PAUSE_MAX_S = 30.0
CLEAN_UP_S = 15.0  # for a shim to end etcd, when the node does not come up


def check_port_free(address: str, what: str) -> None:
    """Find out early and say it clearly.

    Raises:
        UserError: the address cannot be bound.
    """
    host, port = names.bare_host(address), address.rpartition(":")[2]
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, int(port)))
        except OSError as e:
            raise UserError(
                f"{what} cannot listen on {address}: {e.strerror}",
                field="node.address",
                hint="another program uses the port, or the address is not of this machine; choose another --address",
                reason="address-in-use",
            ) from e


def configure_logging(level: str) -> None:
    """Plain lines on standard error, for a terminal, a file or the journal."""
    logging.basicConfig(format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", datefmt="%Y-%m-%dT%H:%M:%S")
    logging.getLogger("spinetta").setLevel(level.upper())  # not the root: libraries have other ideas of what matters


def run(resolved: Resolved) -> int:
    """`spinetta node join`: run a node until it is stopped or has left; the exit code.

    Raises:
        UserError: it cannot start, and says why and what to do.
    """
    configure_logging(resolved.settings.log_level)
    sysapi.keep_memory_private()  # it holds the keys of authorities, labels and this node
    for warning in resolved.warnings:
        log.warning("%s", warning)
    data_dir = Path(resolved.settings.data_dir)
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(
            f"the data directory {data_dir} cannot be made: {e.strerror}",
            field="node.data_dir",
            hint="choose another with --data-dir",
        ) from e
    return asyncio.run(_main(resolved.settings, data_dir))


async def _main(settings: Settings, data_dir: Path) -> int:
    asyncio.get_running_loop().set_default_executor(standing_threads())
    stop = StopSignals(settings.on_terminate)
    life = asyncio.create_task(_live(settings, data_dir, stop), name="life")
    stop.install(life)
    try:
        return await life
    except asyncio.CancelledError:
        if stop.wish is None:
            raise
        log.warning("stopped before the node was up")
        return EXIT_OK


async def _live(settings: Settings, data_dir: Path, stop: StopSignals) -> int:
    pause_s, first = 0.0, True
    with DirectoryLock(data_dir):
        if await asyncio.to_thread(recovery.complete, data_dir):
            log.warning("a restore or recovery that was cut short has been completed")
        while True:
            since_s = time.monotonic()
            try:
                code = await _live_once(settings, data_dir, stop)
            except (UserError, StoreUnavailable, RuntimeUnavailable) as e:
                if first:
                    raise
                log.error("this node cannot begin again yet: %s", e)
                code = BEGIN_ANEW
            if code != BEGIN_ANEW or stop.wish is not None:
                return EXIT_OK if code == BEGIN_ANEW else code
            first = False
            stop.starting(asyncio.current_task())
            # At once the first time; later and later while it keeps coming back.
            pause_s = 0.0 if time.monotonic() - since_s > ANEW_STEADY_S else min(2 * pause_s + 1, ANEW_PAUSE_MAX_S)
            log.warning("this node begins again with nothing in memory, and finds out what is true now")
            await asyncio.sleep(pause_s)


async def _live_once(settings: Settings, data_dir: Path, stop: StopSignals) -> int:
    check_port_free(settings.address, "the API")
    known = remembered(settings, data_dir)
    credentials = await admit(settings, data_dir, known)
    dialer = Dialer.open() if credentials is None else Dialer.secured(credentials.pems)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(network_place(settings, data_dir))
        runtime = await stack.enter_async_context(
            Shims.connect(data_dir / "shim", node=settings.name, kill_margin_s=settings.kill_margin_s)
        )
        try:
            containers = await stack.enter_async_context(open_containers(settings, data_dir, runtime))
            entrance = await enter(settings, data_dir, runtime, known, credentials, dialer)
            entrance.memory.note_shims(later=runtime.are_scattered())  # before anything is started there
            store = _store(entrance, credentials, dialer)
            stack.push_async_callback(store.close)
            if isinstance(store, EtcdStore):
                entrance.seat.attach(store)
            if credentials is not None and founding.is_pending(credentials.directory):
                await founding.commit(store, credentials)
            log_of_calls = await asyncio.to_thread(open_log, data_dir / "audit", settings.name)
        except UserError:
            await _leave_no_idle_shim(runtime)
            raise
        except asyncio.CancelledError:  # told to stop
            await _leave_no_idle_shim(runtime, with_etcd=stop.wish is Wish.EVERYTHING)
            raise
        stack.push_async_callback(asyncio.to_thread, log_of_calls.close)
        daemon = Daemon(settings, entrance, runtime, containers, store, credentials, dialer, log_of_calls, stop)
        stop.started()
        return await daemon.run()


def _store(entrance: Entrance, credentials: NodeCredentials | None, dialer: Dialer) -> EtcdStore | GatewayStore:
    """Etcd itself for a node that may hold a seat; for a worker the gateway of the voters' daemons."""
    if credentials is None:
        return EtcdStore(entrance.endpoints)
    if credentials.etcd is None:
        return GatewayStore(dialer, entrance.memory.identity.gateways, name=credentials.name)
    tls = etcd_tls(credentials.etcd)
    return EtcdStore(entrance.endpoints, lambda: tls)


async def _leave_no_idle_shim(runtime: Shims, *, with_etcd: bool = False) -> None:
    """A node that could not come up must not leave a shim behind, unless it holds something.

    That is tasks of an earlier daemon, which nobody can give back now, or etcd (`with_etcd`: that ends, too).
    """
    try:
        async with asyncio.timeout(CLEAN_UP_S):
            etcd = await runtime.service(ETCD_SERVICE)
            held = await runtime.held()
            if held:
                log.warning("%d tasks of an earlier daemon stay with the shim", len(held))
            elif with_etcd or etcd is None or etcd.exit is not None:
                await runtime.shutdown_shim()
    except (RuntimeUnavailable, TimeoutError) as e:
        log.warning("the shim could not be asked to end: %s; the next start uses it, `spinetta node stop` ends it", e)
