"""A node is let in by the key that an administrator has compared: no other that asks under its name meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from spinetta.access import NodeAcl, fingerprint
from spinetta.node.founding import ADMIN_FILE
from spinetta.v1 import trust_pb2 as pb
from tests.contract.api_world import Etcd, etcd, etcd_member, failure, run
from tests.contract.test_cli_secured import LIMIT_S, Shell
from tests.contract.trust_world import Newcomer, World, acl_key, world

__all__ = ["etcd", "etcd_member"]
pytestmark = pytest.mark.contract


@pytest.fixture
def play(etcd: Etcd, tmp_path: Path) -> Callable[..., None]:
    """A story with an administrator's shell."""

    def go(story: Callable[[World, Shell], Any]) -> None:
        async def main() -> None:
            async with world(etcd, tmp_path) as w:
                admin = Shell(w, tmp_path / "admin-home")
                admin.env["SPINETTA_CREDENTIALS"] = str(tmp_path / ADMIN_FILE)
                await story(w, admin)

        run(main())

    return go


async def waits(w: World, name: str = "n2") -> Newcomer:
    """A machine asks, and has to wait."""
    newcomer = Newcomer(name)
    assert (await w.join(newcomer, await w.token(approval=True))).decision == pb.JoinResponse.PENDING
    return newcomer


async def replaced(w: World, name: str = "n2") -> Newcomer:
    """Another machine gets to wait under the name: the first one was rejected."""
    await (await w.admin()).DecideJoin(pb.DecideJoinRequest(name=name, approve=False))
    return await waits(w, name)


async def approve(w: World, key_hash: bytes, name: str = "n2") -> None:
    await (await w.admin()).DecideJoin(pb.DecideJoinRequest(name=name, approve=True, key_hash=key_hash))


async def is_in(w: World, name: str = "n2") -> bool:
    return await w.voter.record(NodeAcl, acl_key(name)) is not None


def test_another_machine_under_the_same_name_is_not_approved_in_its_place(play: Callable[..., None]) -> None:
    async def story(w: World, _: Shell) -> None:
        looked_at = await waits(w)
        other = await replaced(w)
        failed = await failure(approve(w, looked_at.key_hash))
        assert (failed.code, failed.detail.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "changed")
        assert fingerprint(other.key_hash) in failed.detail.message
        assert "spinetta node requests" in failed.detail.hint
        assert not await is_in(w)
        for _again in range(2):  # the answer may be lost
            await approve(w, other.key_hash)
        assert await is_in(w)
        assert (await failure(approve(w, looked_at.key_hash))).detail.reason == "changed"

    play(story)


@pytest.mark.parametrize("looked_at", ["the first", "the second"])
def test_one_that_takes_the_place_in_the_very_moment(play: Callable[..., None], looked_at: str) -> None:
    """Between the service's look and its transaction: the revision of the request is its guard."""

    async def story(w: World, _: Shell) -> None:
        first, others = await waits(w), list[Newcomer]()

        async def swap() -> None:
            others.append(await replaced(w))

        w.meddling.before.append(swap)
        if looked_at == "the first":
            assert (await failure(approve(w, first.key_hash))).detail.reason == "changed"
            assert not await is_in(w)
            await approve(w, others[0].key_hash)
        else:
            await swap()
            w.meddling.before.append(lambda: replaced(w))
            assert (await failure(approve(w, others[0].key_hash))).detail.reason == "changed"
            assert not await is_in(w)

    play(story)


@pytest.mark.parametrize("part", [b"", b"short", bytes(32)])
def test_who_does_not_say_which_key_approves_nothing(play: Callable[..., None], part: bytes) -> None:
    async def story(w: World, _: Shell) -> None:
        newcomer = await waits(w)
        failed = await failure(approve(w, part and (newcomer.key_hash[:4] if part == b"short" else part)))
        assert (failed.detail.field, failed.detail.reason) == (("name", "changed") if part else ("key_hash", "invalid"))
        assert failed.detail.hint
        assert not await is_in(w)
        stub = await w.admin()
        rejection = pb.DecideJoinRequest(name="n2", approve=False, key_hash=bytes(32))
        assert (await failure(stub.DecideJoin(rejection))).detail.reason == "changed"

    play(story)


# --- on the command line -------------------------------------------------------------------------------------------


def test_without_a_terminal_the_fingerprint_may_be_named(play: Callable[..., None]) -> None:
    async def story(w: World, admin: Shell) -> None:
        whole = (await waits(w)).key_hash.hex()
        listed = (await admin.good("node", "requests")).out
        assert whole[:16] in listed
        for wrong in ("0" * 16, "0" * 64):
            said = await admin.refused(2, "node", "approve", "n2", "--fingerprint", wrong)
            assert whole[:16] in said
            assert "spinetta node requests" in said
        for unusable in (whole[:7], "", "hello", whole + "00"):
            assert "not a fingerprint" in await admin.refused(2, "node", "approve", "n2", "--fingerprint", unusable)
        assert not await is_in(w)
        for given in (whole[:16], whole[:8].upper(), whole):
            found = await admin.json("node", "approve", "n2", "--fingerprint", given)
            assert found == {"node": "n2", "decision": "approved", "fingerprint": whole[:16]}
        assert (await admin.json("node", "approve", "n2", "--yes"))["decision"] == "approved"
        await waits(w, "n3")
        await admin.good("node", "approve", "n3")
        assert await is_in(w, "n3")
        assert "no node n9 waits" in await admin.refused(3, "node", "approve", "n9")

    play(story)


@dataclass(frozen=True)
class AtTerminal:
    """A command that somebody looks at, and can answer."""

    process: asyncio.subprocess.Process
    terminal: int

    async def asks(self) -> str:
        """What is shown up to the question."""
        assert self.process.stderr is not None
        async with asyncio.timeout(LIMIT_S):
            return (await self.process.stderr.readuntil(b"[y/N]: ")).decode()

    async def answer(self, word: str) -> tuple[int | None, str]:
        os.write(self.terminal, word.encode() + b"\n")
        async with asyncio.timeout(LIMIT_S):
            out, err = await self.process.communicate()
        assert b"Traceback" not in err, err
        return self.process.returncode, (out + err).decode()


@contextlib.asynccontextmanager
async def at_terminal(shell: Shell, *argv: str) -> AsyncIterator[AtTerminal]:
    mine, theirs = os.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "spinetta.cli", *argv,
        stdin=theirs, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=shell.env, cwd=shell.home,
    )  # fmt: skip
    os.close(theirs)
    try:
        yield AtTerminal(process, mine)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
        os.close(mine)


def test_at_a_terminal_what_was_shown_is_what_is_approved(play: Callable[..., None]) -> None:
    async def story(w: World, admin: Shell) -> None:
        first = await waits(w)
        async with at_terminal(admin, "node", "approve", "n2", "--clearance", "eu") as asked:
            shown = await asked.asks()
            for what in ("n2", first.address, "worker", "eu", fingerprint(first.key_hash)):
                assert what in shown
            await asked.answer("n")
        assert not await is_in(w)
        async with at_terminal(admin, "node", "approve", "n2") as asked:
            assert fingerprint(first.key_hash) in await asked.asks()
            other = await replaced(w)
            code, said = await asked.answer("y")
            assert code == 2
            assert fingerprint(other.key_hash) in said
        assert not await is_in(w)
        async with at_terminal(admin, "node", "approve", "n2") as asked:
            assert fingerprint(other.key_hash) in await asked.asks()
            assert (await asked.answer("y"))[0] == 0
        assert await is_in(w)

    play(story)
