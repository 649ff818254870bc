"""Keys of labels on a real store: who gets them, who loses them, and what becomes of what waits."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from spinetta import codec, keys, lifecycle, payload, trustcodec, txn
from spinetta.access import MEMBERS, LabelGeneration, NodeRole
from spinetta.errors import Denied
from spinetta.model import Holding, IncarnationId, NodeId, Reason, Revision, TaskId, TaskSpec
from spinetta.node import vault as vaults
from spinetta.node.labeldesk import DirectDesk
from spinetta.node.labels import DROP_AFTER_S
from spinetta.node.vault import CannotOpen, wrap_for
from spinetta.trust.envelope import KeyMissing, open_envelope
from spinetta.trust.sealing import new_sealing_key, public_of
from tests.contract.api_world import Etcd, etcd, etcd_member, new_id, put, run
from tests.contract.sealed_world import Party, sealed_world

pytestmark = pytest.mark.contract
_ = (etcd, etcd_member)  # fixtures

MARK = "scan-of-patient-4711"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is to hand over a key meanwhile."""
    monkeypatch.setattr(vaults, "WAIT_S", 0.3)
    monkeypatch.setattr(vaults, "AGAIN_S", 0.05)


def secret_task(*clearance: str, owner: str = "ann", secrets: tuple[tuple[str, str], ...] = ()) -> TaskSpec:
    return TaskSpec(
        TaskId(new_id()),
        ("/bin/analyse", MARK),
        name=MARK,
        labels=(("who", MARK),),
        env=(("WHO", MARK),),
        working_directory=f"/data/{MARK}",
        clearance=clearance,
        owner=owner,
        secrets=secrets,
    )


async def opens(party: Party, spec: TaskSpec) -> TaskSpec:
    return (await party.vault.open_task(spec)).spec


async def cannot_open(party: Party, spec: TaskSpec) -> CannotOpen:
    with pytest.raises(CannotOpen) as e:
        await party.vault.open_task(spec)
    assert MARK not in str(e.value)
    return e.value


def test_the_cleared_open_and_nobody_else(etcd: Etcd) -> None:
    async def scenario() -> None:
        async with sealed_world(etcd) as world:
            a = await world.join("a", "phi", "pci")
            b = await world.join("b", "phi")
            c = await world.join("c")
            await world.settle()
            assert [w.node for w in (await world.key("phi")).latest.wraps] == ["a", "b"]
            assert [w.node for w in (await world.key("pci")).latest.wraps] == ["a"]
            assert [w.node for w in (await world.key(MEMBERS)).latest.wraps] == ["a", "b", "c"]
            one, both, all_ = (secret_task(*labels) for labels in (("phi",), ("pci", "phi"), (MEMBERS,)))
            for spec, may in ((one, [a, b]), (both, [a]), (all_, [a, b, c])):
                sealed = await world.submit(spec)
                assert sealed.command == ()
                assert MARK.encode() not in codec.encode_task(await world.task(spec))
                for party in (a, b, c):
                    if party in may:
                        assert await opens(party, sealed) == spec
                    else:
                        assert (await cannot_open(party, sealed)).reason is Reason.NODE_UNFIT

    run(scenario())


def test_a_newly_cleared_node_is_handed_the_key(etcd: Etcd) -> None:
    async def scenario() -> None:
        async with sealed_world(etcd) as world:
            await world.join("a", "phi")
            c = await world.join("c")
            await world.settle()
            spec = secret_task("phi")
            sealed = await world.submit(spec)
            await cannot_open(c, sealed)
            await world.grant("c", "phi")
            await world.parties["a"].keeper.look()
            assert await opens(c, sealed) == spec
            assert len((await world.key("phi")).generations) == 1

    run(scenario())


def test_one_who_waits_for_the_key_gets_it(etcd: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vaults, "WAIT_S", 20.0)

    async def scenario() -> None:
        async with sealed_world(etcd) as world:
            await world.join("a", "phi")
            await world.settle()
            spec = secret_task("phi")
            sealed = await world.submit(spec)
            c = await world.join("c", "phi")
            async with asyncio.TaskGroup() as group:
                opening = group.create_task(opens(c, sealed))
                await asyncio.sleep(0)
                await world.parties["a"].keeper.look()
            assert opening.result() == spec

    run(scenario())


@pytest.mark.parametrize("how", ["withdrawn", "revoked"])
def test_who_is_no_longer_cleared_opens_nothing_sealed_afterwards(etcd: Etcd, how: str) -> None:
    async def scenario() -> None:
        async with sealed_world(etcd) as world:
            a = await world.join("a", "phi")
            b = await world.join("b", "phi")
            await world.settle()
            waiting = secret_task("phi", secrets=(("token", "token"),))
            old = await world.submit(waiting)
            await world.put_secret("ann", "token", MARK.encode(), "phi")
            assert await opens(b, old) == waiting
            await world.grant("b", *(["phi"] if how == "revoked" else []), revoked=how == "revoked")
            await world.settle()
            key = await world.key("phi")
            assert [g.number for g in key.generations] == [1, 2]
            assert [[w.node for w in g.wraps] for g in key.generations] == [["a"], ["a"]]
            # What waits is sealed to the new key, so that the old one does not open what is in the store now.
            now = (await world.task(waiting)).spec
            assert now.sealed is not None
            assert [s.generation for s in now.sealed.shares] == [2]
            assert payload.comparable(now) == payload.comparable(old)
            new = await world.submit(secret_task("phi"))
            for spec in (now, new):
                assert (await cannot_open(b, spec)).reason is Reason.NODE_UNFIT
                assert spec.sealed is not None
                purpose = payload.task_purpose(spec.id, ["phi"])
                with pytest.raises(KeyMissing):
                    open_envelope(spec.sealed, ["phi"], purpose, b.vault.private_of)
            opened = await a.vault.open_task(now)
            assert opened.spec == waiting
            assert opened.secrets == (("token", MARK.encode()),)
            # The queue key was written with the record, or nobody could claim the task any more.
            found = (await world.store.read([keys.queued(now.id), keys.task(now.id)])).entries
            queued, record = found[keys.queued(now.id)], found[keys.task(now.id)]
            assert queued is not None
            assert record is not None
            assert queued.modified == record.modified

    run(scenario())


def test_an_old_key_goes_when_nothing_needs_it(etcd: Etcd) -> None:
    async def scenario() -> None:
        async with sealed_world(etcd) as world:
            a = await world.join("a", "phi")
            await world.join("b", "phi")
            await world.settle()
            spec = secret_task("phi")
            sealed = await world.submit(spec)
            # It runs, so its record is left alone.
            task = lifecycle.claimed(await world.task(spec), NodeId("a"), IncarnationId("i"), now_ms=1)
            holding = codec.encode_holding(Holding(1, IncarnationId("i"), 9.0))
            seen = (await world.store.read([keys.queued(spec.id)])).entries[keys.queued(spec.id)]
            assert seen is not None
            claim = txn.claim(NodeId("a"), spec.id, seen.modified, codec.encode_task(task), holding)
            assert isinstance(await world.store.commit(claim), txn.Committed)
            await world.grant("b")
            await world.settle()
            world.clock_s += DROP_AFTER_S + 1
            await world.settle()
            assert [g.number for g in (await world.key("phi")).generations] == [1, 2]
            assert await opens(a, sealed) == spec
            # It ends.
            token = (await world.store.read([keys.running(NodeId("a"), spec.id)])).entries
            held = token[keys.running(NodeId("a"), spec.id)]
            assert held is not None
            done = txn.finish(NodeId("a"), spec.id, held.created, codec.encode_task(task))
            assert isinstance(await world.store.commit(done), txn.Committed)
            await world.settle()
            assert len((await world.key("phi")).generations) == 2, "a submit may be under way"
            world.clock_s += DROP_AFTER_S + 1
            await world.settle()
            assert [g.number for g in (await world.key("phi")).generations] == [2]

    run(scenario())


def test_another_machine_under_the_same_name_is_another(etcd: Etcd) -> None:
    async def scenario() -> None:
        async with sealed_world(etcd) as world:
            await world.join("a", "phi")
            before = await world.join("b", "phi")
            await world.settle()
            again = await world.join("b", "phi")
            await world.settle()
            assert [g.number for g in (await world.key("phi")).generations] == [1, 2]
            spec = secret_task("phi")
            sealed = await world.submit(spec)
            assert await opens(again, sealed) == spec
            await cannot_open(before, sealed)

    run(scenario())


def test_a_label_whose_keepers_are_gone_begins_anew(etcd: Etcd) -> None:
    async def scenario() -> None:
        async with sealed_world(etcd) as world:
            await world.join("a", "phi")
            await world.settle()
            lost = await world.submit(secret_task("phi"))
            await world.grant("a", "phi", revoked=True)
            b = await world.join("b", "phi")
            await world.settle()
            spec = secret_task("phi")
            assert await opens(b, await world.submit(spec)) == spec
            failed = await cannot_open(b, lost)
            assert (failed.reason, "its key is lost" in str(failed)) == (Reason.SPAWN_FAILED, True)

    run(scenario())


def test_many_at_once_make_one_key(etcd: Etcd) -> None:
    async def scenario() -> None:
        async with sealed_world(etcd) as world:
            parties = [await world.join(f"n{i}", "phi", live=False) for i in range(6)]
            for i in range(6):
                await put(world.store, keys.node(NodeId(f"n{i}")), b"")
            for _ in range(3):
                await asyncio.gather(*(p.keeper.look() for p in parties))
            key = await world.key("phi")
            assert len(key.generations) == 1
            spec = secret_task(MEMBERS, "phi")
            sealed = await world.submit(spec)
            for p in parties:
                assert await opens(p, sealed) == spec

    run(scenario())


def test_more_nodes_than_one_write_takes(etcd: Etcd) -> None:
    async def scenario() -> None:
        async with sealed_world(etcd) as world:
            for i in range(130):
                await world.join(f"n{i}", "phi", live=i < 2)
            for _ in range(3):
                for i in range(2):
                    await world.parties[f"n{i}"].keeper.look()
            assert len((await world.key("phi")).latest.wraps) == 130
            assert len((await world.key(MEMBERS)).latest.wraps) == 130

    run(scenario())


def test_a_worker_may_write_what_it_should_only(etcd: Etcd) -> None:
    async def scenario() -> None:
        async with sealed_world(etcd) as world:
            a = await world.join("a", "phi", role=NodeRole.WORKER)
            await world.join("b", "phi", role=NodeRole.WORKER)
            c = await world.join("c")
            await world.settle()
            key = await world.key("phi")
            desk = DirectDesk(world.store, NodeId("voter"))
            state = (await desk.states(["phi"]))[0]
            private = a.vault.private_of("phi", 1)
            assert private is not None
            foreign = wrap_for("phi", 1, private, "c", c.acl.sealing_key)
            bad = replace(key, generations=(replace(key.latest, wraps=(*key.latest.wraps, foreign)),))
            with pytest.raises(Denied, match="c is not cleared"):
                await desk.update_for("a", bad, state.revision)
            with pytest.raises(Denied, match="c is not cleared"):
                await desk.update_for("c", key, state.revision)
            other = replace(key, generations=(replace(key.latest, public_key=public_of(new_sealing_key())),))
            with pytest.raises(Denied, match="another public key"):
                await desk.update_for("a", other, state.revision)
            assert not await desk.update_for("a", key, Revision(state.revision - 1))
            alone = replace(key, generations=(replace(key.latest, wraps=key.latest.wraps[:1]),))
            with pytest.raises(Denied, match="taken from b"):
                await desk.update_for("a", alone, state.revision)
            private2 = new_sealing_key()
            wraps = (wrap_for("phi", 2, private2, "a", a.acl.sealing_key),)
            more = replace(key, generations=(*key.generations, LabelGeneration(2, public_of(private2), wraps)))
            with pytest.raises(Denied, match="needs no new key"):
                await desk.update_for("a", more, state.revision)
            await world.grant("b")
            more = replace(more, generations=(replace(key.latest, wraps=key.latest.wraps[:1]), *more.generations[1:]))
            assert await desk.update_for("a", more, state.revision)
            assert await world.key("phi") == more

    run(scenario())


def test_nonsense_instead_of_a_wrap_is_no_key(etcd: Etcd) -> None:
    async def scenario() -> None:
        async with sealed_world(etcd) as world:
            await world.join("a", "phi")
            b = await world.join("b", "phi")
            await world.settle()
            sealed = await world.submit(secret_task("phi"))
            key = await world.key("phi")
            wrong = wrap_for("phi", 1, new_sealing_key(), "b", b.acl.sealing_key)
            wraps = tuple(wrong if w.node == "b" else w for w in key.latest.wraps)
            fresh = await world.join("b", "phi")
            fresh.private[0] = b.private[0]
            await world.grant("b", "phi")
            await put(
                world.store,
                keys.label("phi"),
                trustcodec.encode(replace(key, generations=(replace(key.latest, wraps=wraps),))),
            )
            assert (await cannot_open(fresh, sealed)).reason is Reason.NODE_UNFIT

    run(scenario())


def test_a_record_that_cannot_be_read_stops_no_other(etcd: Etcd) -> None:
    async def scenario() -> None:
        async with sealed_world(etcd) as world:
            await put(world.store, keys.label("bad"), b"\xff")
            await put(world.store, keys.label("empty"), b"")
            await put(world.store, keys.acl_node(NodeId("x")), b"\xff")
            a = await world.join("a", "bad", "empty", "phi")
            await world.settle()
            spec = secret_task("phi")
            assert await opens(a, await world.submit(spec)) == spec
            found = (await world.store.read([keys.label("bad"), keys.label("empty")])).entries
            assert [e.value for e in found.values() if e is not None] == [b"\xff", b""]

    run(scenario())


@pytest.mark.parametrize("part", ["moved", "altered", "dropped", "payload"])
def test_what_was_tampered_with_in_the_store_is_not_run(etcd: Etcd, part: str) -> None:
    async def scenario() -> None:
        async with sealed_world(etcd) as world:
            a = await world.join("a", "phi", "pci")
            await world.settle()
            sealed = await world.sealed(secret_task("pci", "phi"))
            other = await world.sealed(secret_task("pci", "phi"))
            assert sealed.sealed is not None
            assert other.sealed is not None
            bad = {
                "moved": replace(sealed, sealed=other.sealed),
                "altered": replace(sealed, sealed=replace(sealed.sealed, ciphertext=other.sealed.ciphertext)),
                "dropped": replace(
                    sealed, clearance=("phi",), sealed=replace(sealed.sealed, shares=sealed.sealed.shares[1:])
                ),
                "payload": await world.sealed(replace(secret_task("phi"), command=("a\0" + MARK,))),
            }[part]
            assert (await cannot_open(a, bad)).reason is Reason.SPAWN_FAILED

    run(scenario())


@pytest.mark.parametrize(
    ("refs", "owner", "clearance", "words"),
    [
        ((("none", "none"),), "ann", ("phi",), "no secret none of ann"),
        ((("token", "token"),), "bob", ("phi",), "no secret token of bob"),
        ((("token", "token"),), "", ("phi",), "without an owner"),
        ((("token", "token"),), "ann", (MEMBERS,), "for tasks with clearance phi only"),
        ((("moved", "moved"),), "ann", ("phi",), "the seal is broken"),
        ((("broken", "broken"),), "ann", ("phi",), "cannot be read"),
    ],
)
def test_secrets_that_are_not_given(
    etcd: Etcd, refs: tuple[tuple[str, str], ...], owner: str, clearance: tuple[str, ...], words: str
) -> None:
    async def scenario() -> None:
        async with sealed_world(etcd) as world:
            a = await world.join("a", "phi")
            await world.settle()
            await world.put_secret("ann", "token", MARK.encode(), "phi")
            entry = (await world.store.read([keys.secret("ann", "token")])).entries[keys.secret("ann", "token")]
            assert entry is not None
            await put(world.store, keys.secret("ann", "moved"), entry.value)
            await put(world.store, keys.secret("ann", "broken"), b"\xff")
            sealed = await world.sealed(secret_task(*clearance, owner=owner, secrets=refs))
            failed = await cannot_open(a, sealed)
            assert words in str(failed)
            assert failed.reason is Reason.SPAWN_FAILED

    run(scenario())


def test_a_task_without_labels_gets_secrets_for_members(etcd: Etcd) -> None:
    async def scenario() -> None:
        async with sealed_world(etcd) as world:
            a = await world.join("a")
            await world.settle()
            await world.put_secret("ann", "token", MARK.encode(), MEMBERS)
            spec = replace(secret_task(), secrets=(("token", "x"), ("token", "y")))
            opened = await a.vault.open_task(spec)
            assert (opened.spec, opened.private) == (spec, False)
            assert opened.secrets == (("x", MARK.encode()), ("y", MARK.encode()))
            assert MARK not in repr(opened)

    run(scenario())


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[tuple[Etcd, Path]]:
    member = Etcd(tmp_path)
    try:
        yield member, tmp_path
    finally:
        member.stop()
        shutil.rmtree(tmp_path / "data", ignore_errors=True)


def shown_by_strings(path: Path) -> bytes:
    return subprocess.run(["strings", "-a", "-n", "4", str(path)], capture_output=True, check=True).stdout


def test_strings_finds_nothing_of_it_in_etcd(own_etcd: tuple[Etcd, Path]) -> None:
    member, folder = own_etcd

    async def scenario() -> None:
        async with sealed_world(member) as world:
            a = await world.join("a", "phi")
            await world.join("b", "phi")
            await world.settle()
            await world.put_secret("ann", "token", f"password-{MARK}".encode(), "phi")
            spec = secret_task("phi", secrets=(("token", "token"),))
            await world.submit(spec)
            await put(world.store, "/marker", b"this-is-to-be-found")
            await world.grant("b")
            await world.settle()
            assert await opens(a, (await world.task(spec)).spec) == spec
            keys_ = [a.private[0], *filter(None, (a.vault.private_of("phi", n) for n in (1, 2)))]
            assert len(keys_) == 3
            member.ctl("snapshot", "save", str(folder / "snapshot.db"))
            files = [p for p in folder.rglob("*") if p.is_file()]
            assert {p.suffix for p in files} >= {".db", ".wal"}
            found = b"".join(shown_by_strings(path) for path in files)
            for path in files:
                assert not any(private in path.read_bytes() for private in keys_), path
            assert b"this-is-to-be-found" in found
            assert MARK.encode() not in found
            assert b"/bin/analyse" not in found
            assert b"password" not in found

    run(scenario())
