"""A cluster made anew, in its parts: what fences, what is put in place and when, who follows."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from spinetta import codec, keys, txn
from spinetta.config import Settings
from spinetta.errors import UserError
from spinetta.lineage import Generation, decode_generation, encode_generation
from spinetta.model import Holding, Incarnation, IncarnationId, LeaseId, Life, NodeId, Revision, State, Task
from spinetta.node import recovery
from spinetta.node.following import find_successor
from spinetta.node.rebuilding import check_lost, recover, restore
from spinetta.node.recovery import Place
from spinetta.store import identity as identities
from spinetta.store.etcd import EtcdStore
from spinetta.store.identity import Identity, check_data_dir
from spinetta.store.members import status
from spinetta.store.process import etcd_version, find_etcd, parse_version
from spinetta.store.snapshot import SnapshotWriter, find_tool, stream
from spinetta.store.wal import wal_owner
from spinetta.txn import Put, Txn
from tests.builders import node_record, queued, spec, task_id
from tests.contract.etcds import Etcd, etcd

pytestmark = pytest.mark.timeout(120)

ME = NodeId("n1")
GENERATION = Generation("g1", ("abc",), 1, "recover")


def settings_in(directory: Path, member: Etcd) -> Settings:
    return Settings(ME, f"{member.host}:7220", str(directory), grace_s=60.0, kill_margin_s=5.0, clock_rate_error=0.01)


@contextlib.asynccontextmanager
async def store_of(member: Etcd) -> AsyncIterator[EtcdStore]:
    store = EtcdStore([member.settings.client_url])
    try:
        yield store
    finally:
        await store.close()


def with_store(work: Callable[[Etcd, EtcdStore], Awaitable[None]]) -> None:
    async def main() -> None:
        async with etcd() as member, store_of(member) as store:
            await work(member, store)

    asyncio.run(main())


async def put(store: EtcdStore, key: str, value: bytes = b"", lease: LeaseId = LeaseId(0)) -> Revision:
    return (await store.commit(Txn(then=(Put(key, value, lease),)))).revision


def life(id_: str, state: Life = Life.OPEN, kill_margin_s: float = 1.0) -> bytes:
    return codec.encode_incarnation(Incarnation(IncarnationId(id_), state, "boot", 3, kill_margin_s))


# --- fencing -------------------------------------------------------------------------------------------------------


async def alive(store: EtcdStore) -> tuple[txn.Registration, txn.OfficeHeld]:
    """A node that lives and leads."""
    lease = await store.grant_lease(60)
    created = await put(store, keys.node(ME), codec.encode_node(node_record(ME)), lease)
    inc = await put(store, keys.incarnation(ME), life("a"))
    office = await put(store, keys.OFFICE, codec.encode_office(ME), lease)
    return txn.Registration(ME, created, inc, Revision(0)), txn.OfficeHeld(office, ME)


@pytest.mark.parametrize("nothing_runs", [False, True])
def test_nothing_of_the_time_before_commits_any_more(nothing_runs: bool) -> None:
    async def work(_: Etcd, store: EtcdStore) -> None:
        registration, office = await alive(store)
        task = task_id(1)
        token = await put(store, keys.running(ME, task), codec.encode_holding(Holding(1, IncarnationId("a"), 8.0)))
        seen = await put(store, keys.queued(task_id(2)))
        for name, state in (("n2", Life.OPEN), ("n3", Life.CONDEMNED), ("n4", Life.DEAD)):
            await put(store, keys.incarnation(NodeId(name)), life(name, state))
        inc = registration.incarnation_revision
        await recovery.fence(store, GENERATION, nothing_runs=nothing_runs)

        old = {
            "renewal": txn.renew(registration),
            "claim": txn.batch([txn.claim(ME, task_id(2), seen, b"r", b"h")], registration.guards()),
            "end": txn.batch([txn.finish(ME, task, token, b"r", b"")], txn.finish_guards(ME, inc, Revision(0))),
            "own death": txn.concede(ME, inc, b"dead"),
            "coming back": txn.reattach(ME, LeaseId(0), b"n", inc, Revision(0)),
            "another's death": txn.condemn(office, NodeId("n2"), inc, b"x"),
            "new life under the old generation": txn.register(NodeId("n9"), LeaseId(0), b"n", b"i", Revision(0)),
        }
        for what, body in old.items():
            assert isinstance(await store.commit(body), txn.Conflict), what
        entries = {kv.key: kv.value for kv in (await store.list("/")).entries}
        written = Life.DEAD if nothing_runs else Life.CONDEMNED
        states = {k: codec.decode_incarnation(v).state for k, v in entries.items() if k.startswith(keys.INCARNATION)}
        assert states == {
            keys.incarnation(ME): written,
            keys.incarnation(NodeId("n2")): written,
            keys.incarnation(NodeId("n3")): written,
            keys.incarnation(NodeId("n4")): Life.DEAD,
        }
        assert decode_generation(entries[keys.GENERATION]) == GENERATION
        assert keys.node(ME) not in entries
        assert keys.OFFICE not in entries
        assert keys.running(ME, task) in entries, "the leader puts it back, with its reason"

    with_store(work)


def test_more_nodes_than_one_transaction_takes() -> None:
    async def work(_: Etcd, store: EtcdStore) -> None:
        names = [NodeId(f"n{i}") for i in range(2 * recovery.WRITES_MAX + 10)]
        for at in range(0, len(names), 100):
            await store.commit(Txn(then=tuple(Put(keys.incarnation(n), life(n)) for n in names[at : at + 100])))
        await recovery.fence(store, GENERATION, nothing_runs=False)
        lives = [codec.decode_incarnation(kv.value) for kv in (await store.list(keys.INCARNATION)).entries]
        assert {each.state for each in lives} == {Life.CONDEMNED}
        assert len(lives) == len(names)

    with_store(work)


def test_the_wait_is_for_the_longest_grace_of_what_is_not_complete(tmp_path: Path) -> None:
    async def work(member: Etcd, store: EtcdStore) -> None:
        settings = settings_in(tmp_path, member)
        assert (await recovery.survey(store, settings)).wait_s == pytest.approx(60 * 1.01 + 5)
        over = replace(queued(1), state=State.COMPLETE, spec=replace(spec(1), grace_s=9000.0))
        await put(store, keys.task(task_id(1)), codec.encode_task(over))
        await put(store, keys.task(task_id(2)), b"\xff")
        waits: Task = replace(queued(3), spec=replace(spec(3), grace_s=300.0))
        await put(store, keys.task(task_id(3)), codec.encode_task(waits))
        await put(store, keys.incarnation(ME), life("a", kill_margin_s=7.0))
        found = await recovery.survey(store, settings)
        assert found.wait_s == pytest.approx(300 * 1.01 + 7)
        assert dict(found.tasks) == {"waiting": 1, "running": 0, "complete": 1}
        held = codec.encode_holding(Holding(1, IncarnationId("a"), 400.0))
        await put(store, keys.running(ME, task_id(4)), held)
        assert (await recovery.survey(store, settings)).wait_s == pytest.approx(400 * 1.01 + 7)
        assert found.nodes == (ME,)
        assert found.cluster == ""

    with_store(work)


# --- putting in place ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("snapshot") / "a.db"

    async def work(_: Etcd, store: EtcdStore) -> None:
        await put(store, "/task/x", b"1")
        with SnapshotWriter(file) as writer:
            async with contextlib.aclosing(stream(store.connections)) as pieces:
                async for piece in pieces:
                    writer.write(piece.data)
            writer.finish()

    with_store(work)
    return file


async def place_in(directory: Path, member: Etcd) -> Place:
    program = find_etcd()
    version = parse_version(await etcd_version(program))
    urls = member.settings.client_url, member.settings.peer_url
    return Place(settings_in(directory, member), directory, *urls, version, await find_tool(program, version))


class _Power(Exception):
    """It has failed."""


@pytest.mark.parametrize("steps", range(5))
def test_what_was_cut_short_is_completed(
    tmp_path: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """After any of: plan, old data aside, new data there, identity written, plan removed."""
    member = Etcd(tmp_path)
    data_dir = tmp_path / "node"
    (data_dir / "etcd" / "old").mkdir(parents=True)

    async def make() -> tuple[Place, Path]:
        place = await place_in(data_dir, member)
        folder = data_dir / f"{recovery.WORKSHOP_PREFIX}x"
        folder.mkdir()
        return place, await recovery.make(place, snapshot, folder)

    place, made = asyncio.run(make())
    done = 0

    def step(real: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object) -> object:
            nonlocal done
            if done == steps:
                raise _Power
            done += 1
            return real(*args)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", step(Path.rename))
        patch.setattr(identities, "save", step(identities.save))
        with contextlib.suppress(_Power):
            recovery.plan(place, made, GENERATION, incarnation_id="a")
    if (data_dir / recovery.PLAN_FILE).exists():
        with contextlib.suppress(UserError):
            asyncio.run(_swept(data_dir))
        assert recovery.complete(data_dir)
        assert not recovery.complete(data_dir)
        assert not list(data_dir.glob(f"{recovery.WORKSHOP_PREFIX}*"))
        known = identities.load(data_dir / "identity.json")
        assert known is not None
        assert wal_owner(data_dir / "etcd") == (known.member_id, known.cluster_id)
        check_data_dir(known, data_dir / "etcd")
        (aside,) = data_dir.glob("etcd.before-*")
        assert (aside / "old").is_dir()
    else:  # nothing had been decided yet, or all was done
        assert (data_dir / "etcd" / "old").is_dir() or wal_owner(data_dir / "etcd")


async def _swept(data_dir: Path) -> None:
    """Another attempt, that is given up again, removes nothing that a plan needs."""
    async with recovery.workshop(data_dir):
        raise UserError("given up")


def test_what_a_plan_needs_is_kept_when_it_could_not_be_put_in_place(tmp_path: Path) -> None:
    async def work() -> None:
        async with recovery.workshop(tmp_path) as folder:
            (folder / "made").mkdir()
            (tmp_path / recovery.PLAN_FILE).write_text("{}")
            raise UserError("the disk is full")

    with pytest.raises(UserError, match="full"):
        asyncio.run(work())
    (folder,) = tmp_path.glob(f"{recovery.WORKSHOP_PREFIX}*")
    assert (folder / "made").is_dir()


def test_another_try_completes_the_one_that_was_cut_short(
    tmp_path: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would else find neither the old data, which is aside, nor the new."""
    member = Etcd(tmp_path)
    data_dir = tmp_path / "node"
    (data_dir / "etcd" / "old").mkdir(parents=True)

    def fail(_: Path) -> None:
        raise OSError(28, "No space left on device")

    async def work() -> None:
        place = await place_in(data_dir, member)
        async with recovery.workshop(data_dir) as folder:
            made = await recovery.make(place, snapshot, folder)
            with monkeypatch.context() as patch:
                patch.setattr(recovery, "_put", lambda *_: fail(data_dir))
                recovery.plan(place, made, GENERATION, incarnation_id="a")

    with pytest.raises(UserError, match="cannot be written"):
        asyncio.run(work())
    settings = settings_in(data_dir, member)
    with pytest.raises(UserError, match="has been completed now") as caught:
        asyncio.run(recover(settings, data_dir, None, confirm=print, tell=print, nothing_runs=True))
    assert caught.value.reason == "completed"
    assert wal_owner(data_dir / "etcd")


def test_leftovers_of_an_attempt_that_was_killed_are_removed(tmp_path: Path) -> None:
    (tmp_path / f"{recovery.WORKSHOP_PREFIX}old").mkdir()
    with pytest.raises(UserError, match="given up"):
        asyncio.run(_swept(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_plan_is_not_guessed_at(tmp_path: Path) -> None:
    (tmp_path / recovery.PLAN_FILE).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        recovery.complete(tmp_path)


def test_too_little_room_is_told_before_anything_is_begun(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(UserError, match="of disk are needed") as caught:
        recovery.check_room(tmp_path, 2 * free)
    assert caught.value.reason == "disk"


# --- whether it may be done ------------------------------------------------------------------------------------------


def confirmed(wanted: list[str]) -> Callable[[str], None]:
    return wanted.append


def test_a_cluster_that_has_a_majority_is_not_recovered(tmp_path: Path) -> None:
    async def work(member: Etcd, _: EtcdStore) -> None:
        url = member.settings.client_url
        found = await status(url)
        known = Identity(ME, cluster_id=found.cluster_id, endpoints=(url,))
        with pytest.raises(UserError, match="has a majority") as caught:
            await check_lost(known, "http://127.0.0.1:1", None)
        assert caught.value.reason == "not-lost"
        with pytest.raises(UserError, match="of another cluster") as caught:
            await check_lost(replace(known, cluster_id="abc"), "http://127.0.0.1:1", None)
        assert caught.value.reason == "recovered-elsewhere"
        member.kill()
        await check_lost(known, "http://127.0.0.1:1", None)

    with_store(work)


@pytest.mark.parametrize("there", ["identity.json", "etcd", "shim"])
def test_nothing_is_restored_over_a_node(tmp_path: Path, snapshot: Path, there: str) -> None:
    (tmp_path / there).mkdir()
    member = Etcd(tmp_path)
    with pytest.raises(UserError, match="this is the directory of a node"):
        asyncio.run(
            restore(settings_in(tmp_path, member), tmp_path, snapshot, confirm=print, tell=print, nothing_runs=True)
        )


def test_restored_and_then_recovered(tmp_path: Path, snapshot: Path) -> None:
    """Each time another cluster, which knows those before it."""

    async def main() -> None:
        member = Etcd(tmp_path)
        data_dir = tmp_path / "node"
        data_dir.mkdir()
        ports = [int(each.rpartition(":")[2]) for each in (member.client, member.peer)]
        settings = replace(settings_in(data_dir, member), etcd_client_port=ports[0], etcd_peer_port=ports[1])
        asked: list[str] = []
        first = await restore(
            settings, data_dir, snapshot, confirm=asked.append, tell=lambda _: None, nothing_runs=True
        )
        assert asked == [""], "this snapshot does not say of which cluster it is"
        assert first.generation.former_cluster_ids == ()
        made = [first]
        for _ in range(1):
            known = identities.load(data_dir / "identity.json")
            made.append(
                await recover(settings, data_dir, known, confirm=asked.append, tell=lambda _: None, nothing_runs=True)
            )
        ids = [each.cluster_id for each in made]
        assert len(set(ids)) == 2
        assert asked == ["", ids[0]]
        assert list(made[-1].generation.former_cluster_ids) == ids[:1]
        assert len(list(data_dir.glob("etcd.before-*"))) == 1
        member.settings = replace(member.settings, name=ME, data_dir=data_dir / "etcd")
        member.launch()
        try:
            await member.ready()
            async with store_of(member) as store:
                entries = (await store.read(["/task/x", keys.GENERATION])).entries
            task, generation = entries["/task/x"], entries[keys.GENERATION]
            assert task is not None
            assert generation is not None
            assert task.value == b"1"
            assert decode_generation(generation.value) == made[-1].generation
        finally:
            member.kill()

    asyncio.run(main())


# --- who follows ---------------------------------------------------------------------------------------------------


def test_a_node_follows_only_who_says_that_it_follows_its_cluster() -> None:
    async def work(member: Etcd, store: EtcdStore) -> None:
        url, nobody = member.settings.client_url, "http://127.0.0.1:1"
        own = (await status(url)).cluster_id
        lost = Identity(ME, cluster_id="abc")

        async def found(identity: Identity, *urls: str, more: tuple[str, ...] = ()) -> str:
            async def told() -> tuple[str, ...]:
                return more

            successor = await find_successor(identity, urls, None, told)
            return successor.cluster_id if successor is not None else ""

        assert await found(lost, url) == "", "it says nothing of the sort"
        await put(store, keys.GENERATION, b"\xff")
        assert await found(lost, url) == ""
        await put(store, keys.GENERATION, encode_generation(GENERATION))
        assert await found(lost, nobody, url) == own
        assert await found(lost, nobody, more=(nobody, url)) == own
        assert await found(lost, nobody) == ""
        assert await found(Identity(ME, cluster_id="other"), url) == ""
        assert await found(Identity(ME), url) == ""
        assert await found(Identity(ME, cluster_id=own), url) == ""

    with_store(work)


def test_a_node_stays_while_its_own_cluster_has_a_majority() -> None:
    """Two clusters live after a recovery that should not have been made: nobody gives the larger one up by himself."""

    async def main() -> None:
        async with etcd() as old, etcd() as new, store_of(new) as store:
            own = (await status(old.settings.client_url)).cluster_id
            await put(store, keys.GENERATION, encode_generation(Generation("g", (own,), 1, "recover")))
            identity = Identity(ME, cluster_id=own)
            urls = [new.settings.client_url, old.settings.client_url]
            assert await find_successor(identity, urls, None) is None
            old.kill()
            assert await find_successor(identity, urls, None) is not None

    asyncio.run(main())
