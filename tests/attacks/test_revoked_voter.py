"""A voter that was revoked, but still has its etcd certificate, goes past all of our services, to etcd itself."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from spinetta.node import founding
from spinetta.node.entry import etcd_tls

NOT_SHUT_OUT = """etcd can refuse single certificates (EtcdTls.crl_file, shown in test_store_tls.py), but no node gives
it a list: a revoked voter reads and writes all of etcd until the etcd authority has been exchanged, and the old one
retired."""


@pytest.mark.xfail(strict=True, reason=NOT_SHUT_OUT)
def test_a_voters_etcd_is_told_whose_certificates_were_revoked(tmp_path: Path) -> None:
    credentials = asyncio.run(founding.found_cluster(tmp_path / "trust", "n1", "127.0.0.1:7220"))
    assert credentials.etcd is not None
    assert etcd_tls(credentials.etcd).crl_file is not None
