"""Lists of who has access show what can be read, and tell which records cannot, so that somebody can mend them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spinetta import keys
from spinetta.access import TokenRole
from spinetta.model import NodeId
from spinetta.node.founding import ADMIN_FILE
from spinetta.v1 import trust_pb2 as pb
from tests.contract.api_world import Etcd, etcd, etcd_member, put, run
from tests.contract.test_cli_secured import Shell
from tests.contract.test_unreadable import FUTURE, GARBAGE
from tests.contract.trust_world import World, acl_key, world

__all__ = ["etcd", "etcd_member"]
pytestmark = pytest.mark.contract

LISTS = {
    "node access": ("nodes", "n1"),
    "node requests": ("requests", ""),
    "user list": ("users", "admin"),
    "group list": ("groups", ""),
}


@pytest.mark.parametrize("value", [b"", GARBAGE, FUTURE], ids=["empty", "garbage", "future"])
def test_one_record_that_cannot_be_read_hides_no_other(etcd: Etcd, tmp_path: Path, value: bytes) -> None:
    async def story(w: World) -> None:
        bad = sorted([acl_key("n9"), keys.request(NodeId("n8")), keys.acl_user("eve"), keys.ACL_GROUP + "\n"])
        token = keys.token("t9")
        stub = await w.admin()
        assert not (await stub.ListAccess(pb.ListAccessRequest())).unreadable
        await stub.CreateToken(pb.CreateTokenRequest(role=TokenRole.WORKER.value))  # type: ignore[arg-type]
        for key in (*bad, token):
            await put(w.voter.store, key, GARBAGE if key.startswith(keys.ACL_GROUP) else value)
        etcd.ctl("put", "--", keys.ACL_USER + "\udcff\udcfe", "\x01")
        strange = keys.ACL_USER + r"\udcff\udcfe"  # not a key of ours at all
        listed = await stub.ListAccess(pb.ListAccessRequest())
        assert sorted(listed.unreadable) == sorted([*bad, strange])
        assert [n.name for n in listed.nodes] == ["n1"]
        assert [u.name for u in listed.users] == ["admin"]
        tokens = await stub.ListTokens(pb.ListTokensRequest())
        assert (len(tokens.tokens), list(tokens.unreadable)) == (1, [token])

        admin = Shell(w, tmp_path / "admin-home")
        admin.env["SPINETTA_CREDENTIALS"] = str(tmp_path / ADMIN_FILE)
        for command, (what, there) in LISTS.items():
            document = await admin.json(*command.split())
            assert sorted(document["unreadable"]) == sorted([*bad, strange])
            assert [x["name"] for x in document[what]] == ([there] if there else [])
            shown = await admin.good(*command.split())
            assert there in shown.out
            assert f"warning: {acl_key('n9')} cannot be read" in shown.err
            assert "spinetta etcdctl del" in shown.err
        document = await admin.json("token", "list")
        assert (len(document["tokens"]), document["unreadable"]) == (1, [token])
        assert f"warning: {token} cannot be read" in (await admin.good("token", "list")).err
        # What cannot be read is neither there nor absent.
        assert "cannot be read" in await admin.refused(2, "user", "set", "eve", "--role", "operator")
        assert "cannot be read" in await admin.refused(2, "node", "approve", "n8")
        assert "cannot be read" in await admin.refused(2, "node", "approve", "n9")

    _play(etcd, tmp_path, story)


def test_where_all_can_be_read_nothing_is_said(etcd: Etcd, tmp_path: Path) -> None:
    async def story(w: World) -> None:
        admin = Shell(w, tmp_path / "admin-home")
        admin.env["SPINETTA_CREDENTIALS"] = str(tmp_path / ADMIN_FILE)
        for command in (*LISTS, "token list"):
            assert (await admin.json(*command.split()))["unreadable"] == []
            assert (await admin.good(*command.split())).err == ""

    _play(etcd, tmp_path, story)


def _play(etcd: Etcd, directory: Path, story: Callable[[World], Any]) -> None:
    async def main() -> None:
        async with world(etcd, directory) as w:
            await story(w)

    run(main())
