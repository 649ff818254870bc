"""``spinetta etcdctl`` and ``decode`` where etcd asks for a voter's certificate; the real etcdctl."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spinetta.cli.etcd import _credentials, _fetch
from spinetta.errors import StoreUnavailable, UserError
from spinetta.store.etcd import EtcdStore
from spinetta.trust import generations
from spinetta.txn import Put, Txn
from tests.contract.etcds import Etcd

pytestmark = pytest.mark.contract

KEY = "/etcdctl/a"


@pytest.fixture
def data_dir(etcd_tls_server: Etcd, tmp_path: Path) -> Path:
    """A voter's."""
    assert etcd_tls_server.files is not None
    tls = etcd_tls_server.files.tls
    files = {"etcd-ca.pem": tls.ca_file, "etcd.pem": tls.cert_file, "etcd.key": tls.key_file}
    generations.save(tmp_path / "trust", {name: path.read_bytes() for name, path in files.items()}, 0)
    asyncio.run(put(etcd_tls_server))
    return tmp_path


async def put(server: Etcd) -> None:
    store = EtcdStore([server.client], server.tls)
    try:
        await store.commit(Txn(then=(Put(KEY, b"value"),)))
    finally:
        await store.close()


def spinetta(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ETCDCTL_", "SPINETTA_"))}
    return subprocess.run(
        [sys.executable, "-m", "spinetta.cli", *arguments],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_voter_finds_its_certificate_by_itself(etcd_tls_server: Etcd, data_dir: Path) -> None:
    get = ("--endpoints", f"https://{etcd_tls_server.client}", "get", KEY, "--print-value-only")
    done = spinetta("etcdctl", "--data-dir", str(data_dir), *get)
    assert (done.returncode, done.stdout) == (0, "value\n"), done.stderr
    done = spinetta("etcdctl", *get, SPINETTA_DATA_DIR=str(data_dir))
    assert (done.returncode, done.stdout) == (0, "value\n"), done.stderr
    trust = data_dir / "trust" / generations.CURRENT
    flags = (f"--cacert={trust / 'etcd-ca.pem'}", "--cert", str(trust / "etcd.pem"), f"--key={trust / 'etcd.key'}")
    done = spinetta("etcdctl", *get, *flags, SPINETTA_DATA_DIR="/nonexistent")
    assert (done.returncode, done.stdout) == (0, "value\n"), done.stderr


def test_others_are_told_where_it_works(etcd_tls_server: Etcd, tmp_path: Path) -> None:
    done = spinetta(
        "etcdctl", "--data-dir", str(tmp_path), "--endpoints", f"https://{etcd_tls_server.client}", "get", KEY
    )
    assert done.returncode == 2
    assert "run this on a voter" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_value_of_a_key(etcd_tls_server: Etcd, data_dir: Path) -> None:
    urls = [f"https://{etcd_tls_server.client}"]
    environment = {"PATH": os.environ["PATH"], "ETCDCTL_API": "3", "ETCDCTL_ENDPOINTS": urls[0]}
    assert _fetch(KEY, environment | _credentials(urls, str(data_dir), None)) == b"value"
    with pytest.raises(StoreUnavailable):
        _fetch(KEY, environment | {"ETCDCTL_DIAL_TIMEOUT": "1s", "ETCDCTL_COMMAND_TIMEOUT": "1s"})


def test_plain_text_needs_none(tmp_path: Path) -> None:
    assert _credentials(["http://127.0.0.1:1"], str(tmp_path), None) == {}
    with pytest.raises(UserError) as caught:
        _credentials(["http://127.0.0.1:1,https://127.0.0.2:1"], str(tmp_path), None)
    assert caught.value.reason == "no-etcd-certificate"
