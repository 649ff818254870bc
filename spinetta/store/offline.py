"""Reading a member's own data while its cluster cannot form.

For the one thing that cannot wait for the cluster: when all voters were off until after the end of their etcd
certificates, the authority that could renew them is in the data that nobody serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

from spinetta.errors import StoreUnavailable, UserError
from spinetta.store.etcd import EtcdStore
from spinetta.store.members import status
from spinetta.store.process import EtcdSettings, EtcdTls, Version, etcd_argv, etcd_env, initial_cluster
from spinetta.store.protocol import Snapshot
from spinetta.store.wal import wal_owner
from spinetta.trust.certificates import create_authority, csr, issue_etcd, key_pem, new_key

HOST = "127.0.0.1"
POLL_S = 0.05
END_S = 5.0  # etcd ends within a second
CERTIFICATE_S = 3600.0  # of the certificate made for one reading, which takes seconds
CLUSTER = "0" * 16  # of the authority made for one reading


async def read_offline(
    settings: EtcdSettings, keys: Sequence[str], *, version: Version = (3, 4, 23), timeout_s: float = 60.0
) -> Snapshot:
    """What this member's data says of some keys. It may be behind what the others have.

    A copy of the data is served for a moment, as a cluster of one, to this process alone: on loopback, under an
    authority made for the occasion. The data itself is not touched. Its etcd must not be running.

    Raises:
        StoreUnavailable: etcd did not serve the copy in time.
        UserError: there is no data, or it cannot be copied (disk full).
    """
    if await asyncio.to_thread(wal_owner, settings.data_dir) is None:
        # etcd would begin a new cluster there, and say that there are no keys.
        raise UserError(f"there is no data of a member in {settings.data_dir}", field="node.data_dir", reason="no-data")
    try:
        folder = await asyncio.to_thread(_copy, settings.data_dir)
    except OSError as error:
        raise UserError(
            f"etcd's data in {settings.data_dir} cannot be copied: {error}", field="node.data_dir", reason="disk"
        ) from error
    try:
        async with asyncio.timeout(timeout_s), served(settings, folder, version) as store:
            return await store.read(keys)
    except TimeoutError:
        raise StoreUnavailable(f"a copy of etcd's data was not served within {timeout_s:g} s") from None
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def _copy(data_dir: Path) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f".{data_dir.name}-reading-", dir=data_dir.parent))  # 0700
    try:
        shutil.copytree(data_dir, folder / "etcd")
    except (OSError, shutil.Error) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(str(error)[:500]) from error
    return folder


@contextlib.asynccontextmanager
async def served(
    settings: EtcdSettings, folder: Path, version: Version, *, alone: bool = True
) -> AsyncIterator[EtcdStore]:
    """Serve the data in ``FOLDER/etcd`` to this process only: on loopback, under an authority made for the occasion.

    What is committed is written there. For ever, unless the caller limits it.

    Args:
        folder: for its owner alone; holds the data, and the certificates and etcd's log of the occasion.
        alone: of a cluster of several, the others are forgotten first. The ids of cluster and member stay.

    Raises:
        StoreUnavailable: etcd does not serve it.
    """
    tls = _occasional(folder)
    client_port, peer_port = _free_ports()
    peer_url = f"https://{HOST}:{peer_port}"
    private = replace(
        settings,
        data_dir=folder / "etcd",
        client_url=f"https://{HOST}:{client_port}",
        peer_url=peer_url,
        initial_cluster=initial_cluster([(settings.name, peer_url)]),
        existing=False,
        tls=tls,
    )
    log_path = folder / "log"
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *etcd_argv(private, version),
            *(["--force-new-cluster=true"] if alone else []),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=etcd_env(os.environ.get("PATH", "/usr/bin:/bin")),
        )
    store = EtcdStore([private.client_url], lambda: tls)
    try:
        while not await _healthy(private.client_url, tls):
            if process.returncode is not None:
                last = log_path.read_text(errors="replace").strip().splitlines()[-1:] or ["it wrote no log"]
                raise StoreUnavailable(f"etcd does not serve a copy of its data: {last[0][:500]}")
            await asyncio.sleep(POLL_S)
        yield store
    finally:
        await store.close()
        await _end(process)


async def _healthy(url: str, tls: EtcdTls) -> bool:
    try:
        return (await status(url, lambda: tls, timeout_s=1.0)).healthy
    except StoreUnavailable:
        return False


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(END_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def _occasional(folder: Path) -> EtcdTls:
    """Certificates for one reading, so that nobody else on this machine can read along."""
    now_s, key = time.time(), new_key()
    authority = create_authority("etcd", CLUSTER, now_s=now_s, lifetime_s=CERTIFICATE_S)
    request = csr(key, "reader")
    pem = issue_etcd(authority, request, name="reader", address=HOST, now_s=now_s, lifetime_s=CERTIFICATE_S)
    tls = EtcdTls(folder / "ca.pem", folder / "reader.pem", folder / "reader.key")
    for path, data in (
        (tls.ca_file, authority.certificate_pem),
        (tls.cert_file, pem),
        (tls.key_file, key_pem(key)),
    ):
        path.touch(mode=0o600)
        path.write_bytes(data)
    return tls


def _free_ports() -> tuple[int, int]:
    with socket.socket() as a, socket.socket() as b:
        a.bind((HOST, 0))
        b.bind((HOST, 0))
        return int(a.getsockname()[1]), int(b.getsockname()[1])
