"""Agents driven by hand against the model of etcd: effects wait until the test lets them happen, or loses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from spinetta import accesstxn, codec, keys, lifecycle, trustcodec, txn
from spinetta.access import NodeAcl, NodeRole
from spinetta.agent import Agent
from spinetta.events import (
    AttemptEnded,
    Begin,
    Change,
    Changed,
    Commit,
    CommitDone,
    Effect,
    Entry,
    Forget,
    GrantLease,
    Happening,
    KeepAlive,
    KeptAlive,
    LeaseGranted,
    List,
    ListDone,
    Listing,
    ListRuntime,
    NoAnswer,
    Notice,
    Prepared,
    Read,
    ReadDone,
    Reading,
    Remember,
    Remembered,
    RenewRuntime,
    RevokeLease,
    RuntimeListed,
    Start,
    Started,
    Stop,
    Tick,
    Unwatch,
    Watch,
    attempt_key,
)
from spinetta.model import (
    Exit,
    Holding,
    IncarnationId,
    NodeId,
    QueueHint,
    Reason,
    Revision,
    State,
    Task,
    TaskId,
    TaskSpec,
)
from spinetta.settings import AgentSettings
from spinetta.store.protocol import Changes, KeyValue
from tests.sim.etcd_model import EtcdModel
from tests.sim.shim_model import Script, ShimModel

STEPS_MAX = 2000


def entry_of(kv: KeyValue | None) -> Entry | None:
    """A stored key as the agent sees it."""
    return None if kv is None else Entry(kv.key, kv.value, kv.created, kv.modified, kv.lease)


def changed_of(tag: str, serial: int, batches: tuple[Changes, ...] | list[Changes]) -> Changed:
    """Several revisions as one delivery of a watch."""
    changes = tuple(Change(c.key, entry_of(c.value), c.revision) for batch in batches for c in batch.events)
    return Changed(tag, serial, changes, batches[-1].revision)


def answer_of(model: EtcdModel, effect: Effect) -> Happening | None:
    """What the store answers to an effect, at once; None for those that get no answer."""
    match effect:
        case Commit(tag, body):
            return CommitDone(tag, model.commit(body))
        case Read(tag, wanted):
            snapshot = model.read(wanted)
            return ReadDone(tag, Reading(snapshot.revision, {k: entry_of(v) for k, v in snapshot.entries.items()}))
        case List(tag, prefix, after, limit):
            page = model.list(prefix, after=after, limit=limit)
            entries = tuple(e for kv in page.entries if (e := entry_of(kv)) is not None)
            return ListDone(tag, Listing(page.revision, entries, page.more, page.total))
        case GrantLease(tag, ttl_s):
            return LeaseGranted(tag, model.grant_lease(ttl_s))
        case KeepAlive(tag, lease):
            return KeptAlive(tag, lease, model.keep_alive(lease))
        case RevokeLease(lease):
            model.revoke_lease(lease)
            return None
    raise AssertionError(f"not an effect on the store: {effect}")


def no_answer_of(effect: Effect) -> Happening | None:
    """What the agent hears when nobody answered."""
    match effect:
        case Commit(tag, _):
            return CommitDone(tag, None)
        case Read(tag, _):
            return ReadDone(tag, None)
        case List(tag):
            return ListDone(tag, None)
        case GrantLease(tag, _):
            return LeaseGranted(tag, None)
        case KeepAlive(tag, lease):
            return KeptAlive(tag, lease, NoAnswer.UNKNOWN)
        case Start(spec, attempt, token):
            return Started(attempt_key(spec.id, attempt), token, NoAnswer.UNKNOWN)
        case Remember(incarnation):
            return Remembered(incarnation, done=False)
    return None


@dataclass
class Node:
    """One agent, its shim and disk, and what it wants done."""

    settings: AgentSettings
    agent: Agent
    shim: ShimModel
    disk: IncarnationId | None = None
    pending: list[Effect] = field(default_factory=list)
    preparing: dict[str, Start] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    done: list[Effect] = field(default_factory=list)
    watches: dict[str, Watch] = field(default_factory=dict)


class Direct:
    """Several nodes on one clock. Effects happen in order and at once, unless the test takes them out first."""

    def __init__(self, *settings: AgentSettings, script: Callable[[Start], Script] | None = None) -> None:
        self.model = EtcdModel()
        self.now = 0.0
        self.nodes: dict[NodeId, Node] = {}
        self.has_images = True  # False: what a container needs is not brought in before the test says so
        self._script = script or (lambda _start: Script(1.0))
        for each in settings:
            self.add(each)

    # --- nodes ---

    def add(self, settings: AgentSettings, disk: IncarnationId | None = None) -> Node:
        node = Node(settings, Agent(settings, disk), ShimModel(settings.kill_margin_s, self._script), disk)
        self.nodes[settings.name] = node
        self.tell(node, RuntimeListed(()))
        return node

    def node(self, name: str = "n1") -> Node:
        return self.nodes[NodeId(name)]

    def restart(self, node: Node) -> None:
        """The daemon alone: what it knew and wanted is gone, the shim goes on."""
        node.agent = Agent(node.settings, node.disk)
        node.pending.clear()
        node.preparing.clear()
        node.watches.clear()
        self.tell(node, RuntimeListed(node.shim.listing()))

    def tell(self, node: Node, *events: Happening) -> None:
        node.pending += node.agent.handle(self.now, int(self.now * 1000), *(events or (Tick(),)))

    # --- effects ---

    def take(self, node: Node, want: Callable[[Effect], bool]) -> Effect:
        """Remove the first pending effect that is wanted, so that the test decides what becomes of it."""
        effect = next(e for e in node.pending if want(e))
        node.pending.remove(effect)
        return effect

    def perform(self, node: Node, effect: Effect) -> None:
        """Carry out one effect and tell the agent the answer."""
        node.done.append(effect)
        answer: Happening | None = None
        match effect:
            case Start(spec, attempt) if spec.container is not None:
                node.preparing[attempt_key(spec.id, attempt)] = effect
                if self.has_images:
                    answer = Prepared(attempt_key(spec.id, attempt))
            case Start():
                answer = self._start(node, effect)
            case Begin(key):
                answer = self._start(node, node.preparing.pop(key))
            case Stop(key, why) if key in node.preparing:
                answer = Started(key, node.preparing.pop(key).token, Exit(Reason(why), message="before it was started"))
            case Stop(key, why):
                node.shim.stop(key, why, self.now)
            case Forget(key):
                node.shim.forget(key)
            case ListRuntime():
                answer = RuntimeListed(node.shim.listing())
            case RenewRuntime(at_s):
                node.shim.renew(at_s)
            case Remember(incarnation):
                node.disk = incarnation
                answer = Remembered(incarnation, done=True)
            case Notice(text):
                node.notices.append(text)
            case Watch(tag):
                node.watches[tag] = effect
            case Unwatch(tag):
                node.watches.pop(tag, None)
            case _:
                answer = answer_of(self.model, effect)
        if answer is not None:
            self.tell(node, answer)
        self.deliver()

    def _start(self, node: Node, start: Start) -> Happening:
        _, exit_ = node.shim.start(start, self.now)
        return Started(attempt_key(start.spec.id, start.attempt), start.token, exit_)

    def lose(self, node: Node, effect: Effect, *, arrives: bool = False) -> None:
        """Nobody answers; what was asked has happened or not."""
        if arrives:
            answer_of(self.model, effect)
            self.deliver()
        answer = no_answer_of(effect)
        if answer is not None:
            self.tell(node, answer)

    def deliver(self) -> None:
        """Bring the watches what they are owed."""
        for node in self.nodes.values():
            for tag, watch in list(node.watches.items()):
                owed = self.model.events_since(watch.start, watch.prefix)
                if owed:
                    node.watches[tag] = Watch(tag, watch.serial, watch.prefix, Revision(owed[-1].revision + 1))
                    self.tell(node, changed_of(tag, watch.serial, owed))

    # --- time ---

    def settle(self) -> None:
        """Carry out all that is wanted now."""
        for _ in range(STEPS_MAX):
            node = next((n for n in self.nodes.values() if n.pending), None)
            if node is None:
                return
            self.perform(node, node.pending.pop(0))
        raise AssertionError(f"no rest at {self.now}: {[n.pending[:5] for n in self.nodes.values()]}")

    def run(self, until_s: float, *, stop: Callable[[], bool] = lambda: False) -> None:
        """Let time pass, event by event, until `until_s` or until `stop` says so."""
        self.settle()
        for _ in range(STEPS_MAX):
            if stop():
                return
            wakes = [n.agent.next_s for n in self.nodes.values()] + [n.shim.next_s for n in self.nodes.values()]
            at_s = min([until_s, *(w for w in wakes if w is not None)])
            self.pass_time(at_s)
            if self.now >= until_s:
                return
        raise AssertionError(f"too much happens before {until_s}: now {self.now}")

    def pass_time(self, at_s: float) -> None:
        """Jump to `at_s`, let what is due happen, and settle."""
        self.now = max(self.now, at_s)
        self.model.advance(self.now)
        self.deliver()
        for node in self.nodes.values():
            for process in node.shim.advance(self.now):
                assert process.exit is not None
                self.tell(node, AttemptEnded(process.key, process.exit))
            self.tell(node)
        self.settle()

    # --- users ---

    def submit(self, spec: TaskSpec) -> None:
        task = lifecycle.submitted(spec, now_ms=int(self.now * 1000), at_node="test")
        hint = codec.encode_hint(QueueHint.of(spec))
        assert isinstance(self.model.commit(txn.submit(spec.id, codec.encode_task(task), hint)), txn.Committed)
        self.deliver()

    def cancel(self, task_id: TaskId) -> None:
        task = self.task(task_id)
        if task.state is State.RUNNING:
            name = task.attempts[-1].node
            kv = self.model.get(keys.running(name, task_id))
            assert kv is not None
            old = codec.decode_holding(kv.value)
            asked = Holding(old.attempt, old.incarnation, old.grace_s, cancel_requested=True)
            self.model.commit(txn.cancel_running(name, task_id, kv.modified, codec.encode_holding(asked)))
        else:
            kv = self.model.get(keys.queued(task_id))
            assert kv is not None
            over = lifecycle.cancelled_waiting(task, "by a test", now_ms=0)
            self.model.commit(txn.cancel_waiting(task_id, kv.key, kv.modified, codec.encode_task(over)))
        self.deliver()

    # --- administrators ---

    def rights(self, name: str, *labels: str, revoked: bool = False) -> None:
        """What a node may do from now on. Nobody has heard of it when this returns: `deliver` tells those who watch."""
        key = keys.acl_node(NodeId(name))
        kv = self.model.get(key)
        acl = NodeAcl(name, NodeRole.VOTER, labels, effective=labels, revoked=revoked)
        seen = accesstxn.Seen(key, kv.modified if kv is not None else Revision(0))
        change = accesstxn.Change(seen, trustcodec.encode(acl))
        body = accesstxn.change((change,))
        if revoked:
            body = accesstxn.revoke_node(NodeId(name), change, (), None, ())
        assert isinstance(self.model.commit(body), txn.Committed)

    def task(self, task_id: TaskId) -> Task:
        kv = self.model.get(keys.task(task_id))
        assert kv is not None
        return codec.decode_task(kv.value)


def commits(tag: str) -> Callable[[Effect], bool]:
    return lambda e: isinstance(e, Commit) and e.tag == tag


def until_wanted(d: Direct, node: Node, wanted: Callable[[Effect], bool]) -> Effect:
    """Carry out what comes before; what is wanted is taken out and returned, not yet done."""
    for _ in range(2000):
        if any(wanted(e) for e in node.pending):
            return d.take(node, wanted)
        if node.pending:
            d.perform(node, node.pending.pop(0))
        else:
            assert node.agent.next_s is not None
            d.now = max(d.now, node.agent.next_s)
            d.model.advance(d.now)
            d.tell(node)
    raise AssertionError("it never wants that")


def long_tasks(_: Start) -> Script:
    return Script(1000.0)


def until_wanted_later(d: Direct, node: Node, wanted: Callable[[Effect], bool]) -> Effect:
    """As `until_wanted`, letting processes end meanwhile."""
    for _ in range(2000):
        if any(wanted(e) for e in node.pending):
            return d.take(node, wanted)
        if node.pending:
            d.perform(node, node.pending.pop(0))
            continue
        assert node.agent.next_s is not None
        d.now = max(d.now, min(node.agent.next_s, node.shim.next_s))
        d.model.advance(d.now)
        for process in node.shim.advance(d.now):
            assert process.exit is not None
            d.tell(node, AttemptEnded(process.key, process.exit))
        d.tell(node)
    raise AssertionError("it never wants that")
