"""How etcd is started: which program, with which flags."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from spinetta.errors import UserError

Version = tuple[int, int, int]

VERSION_MIN: Version = (3, 4, 21)  # older ones lose leases and watches in ways we do not work around
VERSIONS_CORRUPTING: tuple[Version, Version] = ((3, 5, 0), (3, 5, 2))  # data corruption after a crash, both included
VERSION_GOOD_3_5: Version = (3, 5, 33)
VERSION_GOOD_3_6: Version = (3, 6, 14)
VERSION_ASK_S = 10.0

QUOTA_BYTES = 2 << 30  # etcd's own default; past it etcd refuses writes, so it must be far above what we keep
COMPACT_AFTER = "1h"  # history for a checker and for watchers that were away; all that a reconcile does not need
TXN_OPS_MAX = 128  # etcd's default; `txn.NESTED_MAX` is made to fit

# For TLS 1.2; those of 1.3 are fixed. Forward secret and authenticated; ECDSA because all our keys are on P-256. HTTP/2
# insists on the first.
CIPHER_SUITES = (
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
)


@dataclass(frozen=True, slots=True)
class EtcdTls:
    """The files that open etcd: as server, as peer and as client. Only voters have them.

    etcd and we read certificate and key anew for each connection, so that a renewal needs no restart. The two must fit
    each other at every moment: renew the certificate for the same key, or keep both in one file that both name.

    Attributes:
        ca_file: the CAs trusted, one or more. etcd reads this one only when it starts.
        cert_file: this voter's certificate.
        key_file: its key.
    """

    ca_file: Path
    cert_file: Path
    key_file: Path


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """One member.

    Attributes:
        program: path or name on PATH.
        name: of the node.
        data_dir: etcd's own; nothing else is in it.
        client_url: where daemons reach it. With `tls` ``https://``; without, ``http://`` on loopback.
        peer_url: where the other members reach it; likewise.
        initial_cluster: exactly the members there are, ``NAME=PEER_URL,…``; see `initial_cluster`.
        existing: the cluster exists, and this member has been added to it.
        token: keeps the members of two clusters apart that were given each other's addresses.
        quota_bytes: of the database.
        tls: None: plain text, on loopback.
    """

    program: str
    name: str
    data_dir: Path
    client_url: str
    peer_url: str
    initial_cluster: str
    existing: bool = False
    token: str = "spinetta"  # noqa: S105 - a name, not a secret
    quota_bytes: int = QUOTA_BYTES
    tls: EtcdTls | None = None


def initial_cluster(members: Iterable[tuple[str, str]]) -> str:
    """``NAME=PEER_URL,…`` of all members, in one order on all nodes."""
    return ",".join(f"{name}={url}" for name, url in sorted(members))


def etcd_argv(settings: EtcdSettings, version: Version = (3, 4, 23)) -> list[str]:
    """Program and arguments.

    Heartbeat (100 ms) and election timeout (1 s) are etcd's defaults.

    Raises:
        UserError: an address is not on loopback, or with `tls`: is not ``https://ADDRESS:PORT``.
    """
    require = require_loopback if settings.tls is None else require_https
    require(settings.client_url, "etcd's client address")
    require(settings.peer_url, "etcd's peer address")
    corrupt_check = (
        "--feature-gates=InitialCorruptCheck=true" if version >= (3, 6, 0) else "--experimental-initial-corrupt-check"
    )
    return [
        settings.program,
        f"--name={settings.name}",
        f"--data-dir={settings.data_dir}",
        f"--listen-client-urls={settings.client_url}",
        f"--advertise-client-urls={settings.client_url}",
        f"--listen-peer-urls={settings.peer_url}",
        f"--initial-advertise-peer-urls={settings.peer_url}",
        f"--initial-cluster={settings.initial_cluster}",
        f"--initial-cluster-state={'existing' if settings.existing else 'new'}",
        f"--initial-cluster-token={settings.token}",
        "--strict-reconfig-check=true",
        "--pre-vote=true",  # a member that was cut off does not unseat the leader when it returns
        "--auto-compaction-mode=periodic",
        f"--auto-compaction-retention={COMPACT_AFTER}",
        f"--quota-backend-bytes={settings.quota_bytes}",
        f"--max-txn-ops={TXN_OPS_MAX}",
        corrupt_check,
        "--logger=zap",
        "--log-level=warn",
        "--log-outputs=stderr",
        *(_tls_flags(settings.tls, version) if settings.tls is not None else ()),
    ]


def _tls_flags(tls: EtcdTls, version: Version) -> tuple[str, ...]:
    """Mutual TLS on both ports, on loopback too: a task on this machine must not reach what its node may."""
    # etcd would look up the DNS names of a peer's certificate and compare them with where the connection comes from.
    # Only voters have certificates of this CA, and behind address translation a voter comes from anywhere.
    skip = "peer-skip-client-san-verification"
    return (
        f"--cert-file={tls.cert_file}",
        f"--key-file={tls.key_file}",
        f"--trusted-ca-file={tls.ca_file}",
        "--client-cert-auth=true",
        f"--peer-cert-file={tls.cert_file}",
        f"--peer-key-file={tls.key_file}",
        f"--peer-trusted-ca-file={tls.ca_file}",
        "--peer-client-cert-auth=true",
        f"--{skip}=true" if version >= (3, 6, 0) else f"--experimental-{skip}=true",
        f"--cipher-suites={','.join(CIPHER_SUITES)}",  # TLS 1.2 is the least that etcd takes anyway
        "--enable-grpc-gateway=false",  # JSON over HTTP: nobody here uses it, and it is a door
    )


def etcd_env(path: str) -> Mapping[str, str]:
    """The whole environment: PATH only, because etcd takes any ``ETCD_*`` variable it finds for a flag."""
    return {"PATH": path}


def require_loopback(url: str, what: str) -> None:
    """The peer port serves the whole client API, unauthenticated: without TLS it stays on this machine.

    Raises:
        UserError: the URL is not ``http://`` with an address of 127.0.0.0/8 and a port.
    """
    hint = "use an address of 127.0.0.0/8: other machines can be part only of a cluster that has certificates"
    if _address(url, what, "http", hint) not in ipaddress.ip_network("127.0.0.0/8"):
        raise UserError(f"{what} {url!r} is not on loopback", hint=hint, field="node.address", reason="not-loopback")


def require_https(url: str, what: str) -> None:
    """With certificates any address will do at which others can reach this machine.

    Raises:
        UserError: the URL is not ``https://ADDRESS:PORT``, or the address stands for all or many.
    """
    hint = "use an address of this machine at which the other voters reach it"
    address = _address(url, what, "https", hint)
    if address.is_unspecified or address.is_multicast:
        raise UserError(f"{what} {url!r} is not one machine's", hint=hint, field="node.address")


def _address(url: str, what: str, scheme: str, hint: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        parts = urlsplit(url)
        if parts.scheme == scheme and parts.port:
            return ipaddress.ip_address(parts.hostname or "")
    except ValueError:
        pass
    raise UserError(f"{what} {url!r} is not {scheme}://ADDRESS:PORT", hint=hint, field="node.address")


# --- versions --------------------------------------------------------------------------------------------------


def find_etcd(program: str = "etcd") -> str:
    """The path of etcd.

    Raises:
        UserError: there is none.
    """
    path = shutil.which(program)
    if path is None:
        raise UserError(
            f"there is no program {program!r}",
            field="node.etcd_program",
            hint="on Debian: apt install etcd-server; or name its path with --etcd-program",
            reason="no-etcd",
        )
    return path


async def etcd_version(program: str) -> str:
    """What ``etcd --version`` prints.

    Raises:
        UserError: it does not run.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            program,
            "--version",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=etcd_env(""),
        )
    except OSError as error:
        raise UserError(f"{program} cannot be run: {error.strerror}", field="node.etcd_program") from error
    try:
        async with asyncio.timeout(VERSION_ASK_S):
            output, _ = await process.communicate()
    except TimeoutError:
        raise UserError(f"{program} --version does not end", field="node.etcd_program") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise UserError(f"{program} --version ended with {process.returncode}", field="node.etcd_program")
    return output.decode(errors="replace")


def parse_version(text: str) -> Version:
    """The version in what ``etcd --version`` prints, or in a bare ``3.4.23``.

    Raises:
        UserError: there is none.
    """
    found = re.search(r"(?:etcd Version:\s*|\A\s*v?)(\d+)\.(\d+)\.(\d+)", text)
    if found is None:
        raise UserError(
            f"this is not etcd: --version printed {text.strip()[:80]!r}",
            field="node.etcd_program",
            hint="on Debian: apt install etcd-server",
        )
    return int(found[1]), int(found[2]), int(found[3])


def check_version(text: str) -> tuple[str, ...]:
    """Warnings about a version that will do.

    Raises:
        UserError: it will not.
    """
    version = parse_version(text)
    name = ".".join(map(str, version))
    hint = "use 3.5.33, 3.6.14 or newer; Debian 12's 3.4.23 will do for development"
    if VERSIONS_CORRUPTING[0] <= version <= VERSIONS_CORRUPTING[1]:
        raise UserError(f"etcd {name} corrupts data when it is killed", hint=hint, reason="etcd-version")
    if version < VERSION_MIN:
        raise UserError(f"etcd {name} is too old", hint=hint, reason="etcd-version")
    good = VERSION_GOOD_3_6 if version >= (3, 6, 0) else VERSION_GOOD_3_5
    if version < good:
        return (f"etcd {name} has known bugs in watches and membership: for production {hint}",)
    return ()
