"""One fortress for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.attacks.fortress import Stage
from tests.contract.api_world import Etcd, etcd, etcd_member

__all__ = ["etcd", "etcd_member"]


@pytest.fixture(scope="module")
def stage(etcd_member: Etcd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Everything, in an empty etcd."""
    etcd_member.ctl("del", "", "--from-key=true")
    with Stage(etcd_member, tmp_path_factory.mktemp("fortress")) as made:
        yield made
