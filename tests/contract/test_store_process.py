"""How etcd is started, and which etcds are."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from spinetta.errors import UserError
from spinetta.store.process import (
    EtcdSettings,
    EtcdTls,
    check_version,
    etcd_argv,
    etcd_version,
    find_etcd,
    initial_cluster,
    parse_version,
)
from tests.contract import etcds
from tests.contract.etcds import Program, find_program

pytestmark = pytest.mark.contract

SETTINGS = EtcdSettings(
    program="/usr/bin/etcd",
    name="a",
    data_dir=Path("/data/etcd"),
    client_url="http://127.0.0.1:7221",
    peer_url="http://127.0.0.1:7222",
    initial_cluster=initial_cluster([("b", "http://127.0.0.2:7222"), ("a", "http://127.0.0.1:7222")]),
)


def test_arguments() -> None:
    assert etcd_argv(replace(SETTINGS, existing=True, token="t")) == [  # noqa: S106 - a name
        "/usr/bin/etcd",
        "--name=a",
        "--data-dir=/data/etcd",
        "--listen-client-urls=http://127.0.0.1:7221",
        "--advertise-client-urls=http://127.0.0.1:7221",
        "--listen-peer-urls=http://127.0.0.1:7222",
        "--initial-advertise-peer-urls=http://127.0.0.1:7222",
        "--initial-cluster=a=http://127.0.0.1:7222,b=http://127.0.0.2:7222",
        "--initial-cluster-state=existing",
        "--initial-cluster-token=t",
        "--strict-reconfig-check=true",
        "--pre-vote=true",
        "--auto-compaction-mode=periodic",
        "--auto-compaction-retention=1h",
        "--quota-backend-bytes=2147483648",
        "--max-txn-ops=128",
        "--experimental-initial-corrupt-check",
        "--logger=zap",
        "--log-level=warn",
        "--log-outputs=stderr",
    ]
    assert "--initial-cluster-state=new" in etcd_argv(SETTINGS)
    assert "--feature-gates=InitialCorruptCheck=true" in etcd_argv(SETTINGS, (3, 6, 14))


SECURED = replace(
    SETTINGS,
    client_url="https://10.0.0.1:7221",
    peer_url="https://10.0.0.1:7222",
    tls=EtcdTls(Path("/data/trust/etcd-ca.pem"), Path("/data/trust/etcd.pem"), Path("/data/trust/etcd.key")),
)


def test_arguments_under_tls() -> None:
    more = etcd_argv(SECURED)[len(etcd_argv(SETTINGS)) :]
    assert more == [
        "--cert-file=/data/trust/etcd.pem",
        "--key-file=/data/trust/etcd.key",
        "--trusted-ca-file=/data/trust/etcd-ca.pem",
        "--client-cert-auth=true",
        "--peer-cert-file=/data/trust/etcd.pem",
        "--peer-key-file=/data/trust/etcd.key",
        "--peer-trusted-ca-file=/data/trust/etcd-ca.pem",
        "--peer-client-cert-auth=true",
        "--experimental-peer-skip-client-san-verification=true",
        "--cipher-suites=TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,"
        "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
        "--enable-grpc-gateway=false",
    ]
    assert "--peer-skip-client-san-verification=true" in etcd_argv(SECURED, (3, 6, 14))
    assert "--experimental-peer-skip-client-san-verification=true" in etcd_argv(SECURED, (3, 5, 33))
    etcd_argv(replace(SECURED, client_url="https://127.0.0.2:7221", peer_url="https://[2001:db8::1]:7222"))


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://10.0.0.1:1", "https://host:1", "https://10.0.0.1", ""])
def test_under_tls_nothing_is_plain(url: str) -> None:
    for settings in (replace(SECURED, client_url=url), replace(SECURED, peer_url=url)):
        with pytest.raises(UserError, match="is not https://ADDRESS:PORT"):
            etcd_argv(settings)


@pytest.mark.parametrize("url", ["https://0.0.0.0:1", "https://[::]:1", "https://224.0.0.1:1"])
def test_an_address_is_of_one_machine(url: str) -> None:
    with pytest.raises(UserError, match="is not one machine's"):
        etcd_argv(replace(SECURED, peer_url=url))


@pytest.mark.parametrize("url", ["http://10.0.0.1:1", "http://0.0.0.0:1", "https://127.0.0.1:1", "http://[::1]:1"])
def test_loopback_only(url: str) -> None:
    for settings in (replace(SETTINGS, client_url=url), replace(SETTINGS, peer_url=url)):
        with pytest.raises(UserError) as caught:
            etcd_argv(settings)
        assert "127.0.0.0/8" in caught.value.hint


@pytest.mark.parametrize("url", ["127.0.0.1:1", "http://127.0.0.1", "http://localhost:1", "http://127.0.0.1:x", ""])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(UserError, match="is not http://ADDRESS:PORT"):
        etcd_argv(replace(SETTINGS, peer_url=url))


@pytest.mark.parametrize("version", ["3.5.33", "3.5.40", "3.6.14", "3.7.0", "4.0.0"])
def test_good_versions(version: str) -> None:
    assert check_version(f"etcd Version: {version}\nGit SHA: x\nGo Version: go1.19.8\n") == ()


@pytest.mark.parametrize("version", ["3.4.21", "3.4.23", "3.4.37", "3.5.3", "3.5.32", "3.6.0", "3.6.13"])
def test_versions_that_will_do(version: str) -> None:
    (warning,) = check_version(f"etcd Version: {version}\n")
    assert version in warning


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("3.5.0", "corrupts"),
        ("3.5.1", "corrupts"),
        ("3.5.2", "corrupts"),
        ("3.4.20", "too old"),
        ("3.3.27", "too old"),
        ("2.3.8", "too old"),
    ],
)
def test_versions_that_will_not(version: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_version(f"etcd Version: {version}\n")
    assert caught.value.reason == "etcd-version"


@pytest.mark.parametrize("text", ["", "bash: etcd: not found", "GNU coreutils 9.1.2"])
def test_what_is_no_etcd(text: str) -> None:
    with pytest.raises(UserError, match="not etcd"):
        parse_version(text)


def test_the_etcds_of_this_machine(program: Program) -> None:
    text = asyncio.run(etcd_version(program.path))
    assert parse_version(text) == program.version >= (3, 4, 21)
    check_version(text)


def test_the_newer_etcd_is_newer() -> None:
    assert find_program("newer").version >= (3, 5, 3)


def test_a_newer_etcd_that_is_not_there_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcds, "NEWER", tmp_path)
    with pytest.raises(pytest.fail.Exception, match="--dev fetches it"):
        find_program("newer")
    (tmp_path / "missing").write_text("apt could not fetch etcd-server\n")
    with pytest.raises(pytest.skip.Exception, match="could not get: apt could not fetch"):
        find_program("newer")


def test_no_etcd() -> None:
    with pytest.raises(UserError) as caught:
        find_etcd("etcd-that-is-not-installed")
    assert "apt install etcd-server" in caught.value.hint


@pytest.mark.parametrize(("script", "message"), [("exit 3", "ended with 3"), ("echo hello", "not etcd")])
def test_a_program_that_is_something_else(tmp_path: Path, script: str, message: str) -> None:
    program = tmp_path / "etcd"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    with pytest.raises(UserError, match=message):
        check_version(asyncio.run(etcd_version(str(program))))
    program.chmod(0o644)
    with pytest.raises(UserError, match="cannot be run"):
        asyncio.run(etcd_version(str(program)))
