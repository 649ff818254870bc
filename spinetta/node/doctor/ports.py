"""Addresses of the node to be: by listening on them, or by looking who does."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import psutil

from spinetta import names
from spinetta.checkup import Finding, Level, ok
from spinetta.config import Settings
from spinetta.errors import UserError
from spinetta.node.lock import holder
from spinetta.store import identity as identities

EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - compared with
CHOOSE = "stop that program, or choose another port: spinetta node join --address HOST:PORT --etcd-client-port PORT"


async def ports(settings: Settings) -> list[Finding]:
    """One finding for each address."""
    host = names.bare_host(settings.address)
    wanted = [("the API", settings.port)]
    if settings.candidate:
        client, peer = _etcd_ports(settings)
        wanted += [("etcd's clients", client), ("etcd's peers", peer)]
    return [_port(settings, host, port, what) for what, port in wanted if port]


def _etcd_ports(settings: Settings) -> tuple[int, int]:
    """As chosen at the first start, or as they are set."""
    try:
        known = identities.load(Path(settings.data_dir) / "identity.json")
    except (UserError, OSError):  # the check of the node tells
        known = None
    if known is not None and known.etcd_client_port:
        return known.etcd_client_port, known.etcd_peer_port
    return settings.etcd_client_port, settings.etcd_peer_port


def _port(settings: Settings, host: str, port: int, what: str) -> Finding:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
            sock.listen(1)
        except OSError as error:
            return _refused(settings, (host, port), f"{address} for {what}", error)
    return ok("ports", f"{address} is free for {what}")


def _refused(settings: Settings, address: tuple[str, int], seen: str, error: OSError) -> Finding:
    if error.errno == errno.EADDRNOTAVAIL:
        return Finding(
            "ports", Level.PROBLEM, f"{seen}: no address of this machine", "the node cannot start",
            "spinetta node join --address HOST:PORT with an address that `ip address` shows",
        )  # fmt: skip
    if error.errno != errno.EADDRINUSE:
        return Finding("ports", Level.PROBLEM, f"{seen}: {error.strerror}", "the node cannot start", CHOOSE)
    who = listener(*address)
    if who is None:
        return Finding(
            "ports", Level.WARNING, f"{seen} is in use, by whom this user may not see",
            "if it is not the node of this data directory, the node cannot start", "run this as root",
        )  # fmt: skip
    if _is_ours(who, Path(settings.data_dir)):
        return ok("ports", f"{seen} is in use by this node ({who.name()}, process {who.pid})")
    return Finding(
        "ports", Level.PROBLEM, f"{seen} is in use by {who.name()} (process {who.pid})", "the node cannot start", CHOOSE
    )


def listener(host: str, port: int) -> psutil.Process | None:
    """A process that listens on an address of this machine; None when we may not see it."""
    wanted = {(h, port) for h in (host, f"::ffff:{host}", *EVERYWHERE)}  # gRPC listens by IPv6 for both
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and tuple(connection.laddr) in wanted and connection.pid:
                return psutil.Process(connection.pid)
    except (psutil.Error, OSError):
        pass
    return None


def _is_ours(process: psutil.Process, data_dir: Path) -> bool:
    """The daemon that holds the data directory's lock, or its etcd, whose command line names its folder in it."""
    try:
        if holder(data_dir) == process.pid:
            return True
        arguments = process.cmdline()
    except (psutil.Error, OSError, UserError):
        return False
    wanted = os.path.abspath(data_dir / "etcd")  # noqa: PTH100 - as it was told etcd
    return any(argument.partition("=")[2] == wanted for argument in arguments)
