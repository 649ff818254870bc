"""What this node holds: attempts from their claim to the record of their end.

Two truths are brought together: the running keys under this node in the store, each with its token, and the attempts
that the runtime knows. A key without a process is started (its claim was committed, nothing else happened yet); a
process without a key has been fenced and is stopped; an end is recorded under the token of its attempt only.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from spinetta import codec, keys, lifecycle, txn
from spinetta.attempt import GiveBack, Held, Step
from spinetta.events import (
    AttemptEnded,
    Commit,
    CommitDone,
    Effect,
    Entry,
    Forget,
    NoAnswer,
    Notice,
    Read,
    ReadDone,
    Rejected,
    RuntimeListed,
    Start,
    Started,
    parse_attempt_key,
)
from spinetta.mirror import Delta
from spinetta.model import (
    Exit,
    Holding,
    IncarnationId,
    NodeId,
    QueueHint,
    Reason,
    Resources,
    Revision,
    Task,
    TaskId,
)
from spinetta.processes import Processes

RETRY_S = 0.5
FINISHES_MAX = txn.NESTED_MAX
NAMED_AFTER_S = 1.0  # of preparing: an image that is here takes less, and so no start is held up by a heartbeat
READ_MAX = 100  # records read at once: below etcd's 128 operations a transaction


class Holdings:
    """The attempts of one node."""

    def __init__(self, node: NodeId) -> None:
        self.node = node
        self.held: dict[TaskId, Held] = {}
        self._demand: Resources | None = None  # of `held`; None: to be summed up again
        self._runtime = Processes()
        self.store_known = False  # both truths must be known before anything is judged a stray
        self._reading: frozenset[TaskId] = frozenset()
        self._finishing: tuple[tuple[TaskId, Revision], ...] = ()
        self._resolving: tuple[tuple[TaskId, Revision], ...] = ()
        self._ends_max = FINISHES_MAX  # fewer after the store has refused a batch: which one it is shows alone
        self._refused_at_s: float | None = None  # when to try what was refused again
        self._retry_at_s: float | None = None
        self.giving_back = GiveBack.NOTHING
        self._over: dict[TaskId, Revision] = {}  # tokens known to be spent, until a listing is newer than they
        self._listed_at = Revision(0)
        self.waiting: frozenset[Revision] = frozenset()  # tokens of what is not to be started now
        self.preparing: frozenset[Revision] = frozenset()  # the same, while what they need is brought in
        self.wanted: frozenset[Revision] = frozenset()  # of what would be, had the node not promised otherwise

    # --- outside view ---

    @property
    def next_s(self) -> float | None:
        """When `poll` has something to do that failed before, or to ask for again."""
        times = (self._retry_at_s, self._runtime.next_s, self._refused_at_s)
        return min((t for t in times if t is not None), default=None)

    @property
    def processes(self) -> Mapping[str, Revision]:
        """The tokens of attempts that the runtime knows to run or has not forgotten."""
        return self._runtime.tokens

    @property
    def runtime_known(self) -> bool:
        """True once the runtime has said what it holds."""
        return self._runtime.known

    @property
    def nothing_runs(self) -> bool:
        """True once the runtime has said what it holds, none of it runs and nothing is being started."""
        return self._runtime.nothing_runs

    @property
    def empty(self) -> bool:
        """True when neither the store nor the runtime has anything of ours."""
        return self.runtime_known and not self.held and not self._runtime.tokens

    @property
    def listed_at(self) -> Revision:
        """The revision of the latest listing of what this node holds: no claim up to it is unknown."""
        return self._listed_at

    def counted(self) -> set[TaskId]:
        """The tasks whose demand is in `demand`."""
        return {t for t, h in self.held.items() if h.task is not None}

    def demand(self) -> Resources:
        """The sum of what all held attempts were promised (those whose record is unread are not counted)."""
        if self._demand is None:
            total = Resources()
            for h in self.held.values():
                if h.task is not None:
                    total = total + h.task.spec.resources
            self._demand = total
        return self._demand

    @property
    def all_read(self) -> bool:
        """True when the demand of everything held is known: only then is it known what is free."""
        return all(h.task is not None for h in self.held.values())

    # --- from the store ---

    def claimed(self, task: Task, token: Revision, holding: Holding) -> None:
        """A claim was committed; the watch will say the same."""
        known = self.held.get(task.id)
        if known is not None and known.token >= token:
            if known.task is None and known.token == token:
                self._demand = None
                known.task, known.step = task, Step.STARTING
            return
        if self._spent(task.id, token):
            return
        self._demand = None
        self.held[task.id] = Held(task.id, token, holding, Step.STARTING, token, task)

    def follow(self, deltas: Iterable[Delta]) -> list[Effect]:
        """The store's view of what this node holds has changed."""
        effects: list[Effect] = []
        for d in deltas:
            found = keys.find_running(d.key)
            if found is None:
                continue
            task_id = found[1]
            known = self.held.get(task_id)
            if d.new is None:
                if known is not None and known.token < d.revision and known.step is not Step.RECORDING:
                    self._drop(known)
                continue
            effects += self._see(task_id, d.new, known)
        return effects

    def listed(self, entries: Mapping[str, Entry], revision: Revision) -> None:
        """The store was listed: what it did not show, though it is older than the listing, is no longer ours.

        The mirror reports only what changed in it; a claim that was committed and taken away between two of its
        listings would never appear in it.
        """
        self.store_known = True
        self._listed_at = max(self._listed_at, revision)
        self._over = {t: token for t, token in self._over.items() if token > revision}
        for task_id, h in list(self.held.items()):
            gone = keys.running(self.node, task_id) not in entries
            if gone and h.token <= revision and h.step is not Step.RECORDING:
                self._drop(h)

    def _drop(self, h: Held) -> None:
        """It is no longer ours, and late news of its claim must not bring it back."""
        self._demand = None
        del self.held[h.task_id]
        self._over[h.task_id] = h.token

    def _spent(self, task_id: TaskId, token: Revision) -> bool:
        # What a listing as new as the token did not show (or has been dropped since) is over.
        return self._over.get(task_id, 0) >= token or (task_id not in self.held and token <= self._listed_at)

    def _see(self, task_id: TaskId, entry: Entry, known: Held | None) -> list[Effect]:
        holding = codec.readable(codec.decode_holding, entry.value)
        if holding is None:
            return []
        if known is None or known.token < entry.created:
            if self._over.get(task_id, 0) >= entry.created:
                return []
            self._demand = None
            known = Held(task_id, entry.created, holding, Step.UNREAD, entry.modified)
            self.held[task_id] = known
        elif known.token > entry.created or known.seen > entry.modified:
            return []
        known.holding, known.seen = holding, entry.modified
        return []

    # --- from the runtime ---

    def runtime_listed(self, listed: RuntimeListed, now: float) -> list[Effect]:
        """The runtime is connected (again): this is all it holds."""
        self._runtime.listed(listed, now)
        for h in self.held.values():
            if h.step is Step.RUNNING and h.key not in self._runtime.tokens and not self._runtime.is_asked(h.key):
                h.step = Step.STARTING
        return []

    def started(self, done: Started, now: float) -> list[Effect]:
        """The answer to a start."""
        effects = self._runtime.started(done, now)
        held = self._by_key(done.key) if isinstance(done.exit, NoAnswer) else None
        if held is not None and held.step is Step.RUNNING and done.key not in self._runtime.tokens:
            held.step = Step.STARTING
        return effects

    def prepared(self, key: str) -> None:
        """What an attempt needs is here."""
        self._runtime.prepared(key)

    def attempt_ended(self, ended: AttemptEnded) -> list[Effect]:
        """A process is gone. Its end may be told more than once, and before the answer to its start."""
        held = self._by_key(ended.key)
        if held is None and self._runtime.is_past(ended.key):
            return [Forget(ended.key)]
        self._runtime.ended(ended, held.token if held is not None else Revision(0))
        return []

    def life_changed(self) -> None:
        """Another life of this node begins, or this one has ended."""
        self._runtime.forget_past()

    # --- what to do ---

    def give_back(self, what: GiveBack) -> None:
        """Give so much back to the queue: what runs is stopped, waiting starts are not made. NOTHING: no longer."""
        self.giving_back = what

    def poll(
        self,
        now: float,
        now_ms: int,
        life: IncarnationId | None,
        life_seen: Revision,
        *,
        may_start: bool,
        must_stop: bool,
        acl_seen: Revision = Revision(0),
        clearances: Collection[str] | None = None,
        promised: Collection[Revision] = (),
    ) -> list[Effect]:
        """Bring the two truths together; idempotent. Starts, stops, forgets, and records ends in one batch.

        `life`: the incarnation that is ours. What another one of the same name holds (an earlier life, or a node
        elsewhere that has the name) is not touched in the store, and not ours to run. `life_seen`: the revision of its
        record, 0 while it is not known; ends are recorded under it.
        `must_stop`: this life of the node has been ended by others. What ended by itself before may still be recorded
        while its key stands; all else is stopped and given back.
        `acl_seen`: the revision of this node's rights, under which ends are recorded. `clearances`: the labels it is
        cleared for, None while that is not known; what is no longer covered is given back, all else goes on.
        `promised`: tokens that the node has said it would not start; see `Session.poll`.
        """
        self.waiting = self.preparing = self.wanted = frozenset()
        # Also when nothing can be done now: a time that is past would have us asked again and again.
        if self._retry_at_s is not None and self._retry_at_s <= now:
            self._retry_at_s = None
        if self._refused_at_s is not None and self._refused_at_s <= now:
            self._refused_at_s = None
        asked = self._runtime.ask(now)
        if asked:
            return asked
        if not self.runtime_known or not self.store_known:
            return []
        stop = Reason.FENCED if must_stop else None
        ours = [h for h in self.held.values() if h.holding.incarnation == life]
        effects = self._runtime.tend_strays({h.key: h.token for h in ours}, now)
        for h in ours:
            if h.step is Step.STARTING and h.key in self._runtime.tokens:
                h.step = Step.RUNNING  # before it is judged: a drain gives back what was not started, and this was
            effects += self._tend(
                h, now, now_ms, stop or h.goes_back(self.giving_back) or h.barred(clearances), may_start, promised
            )
        self.waiting = frozenset(h.token for h in ours if self._is_unstarted(h)) - self.wanted
        self.preparing = frozenset(h.token for h in ours if self._prepares_long(h, now)) - self.wanted
        effects += self._read_unread()
        if self._retry_at_s is None:
            effects += self._record_ends(now, now_ms, life_seen, acl_seen)
            effects += self._resolve_doubts()
        return effects

    def _is_unstarted(self, h: Held) -> bool:
        known = h.key in self._runtime.tokens or self._runtime.may_run(h.key) or self._runtime.is_past(h.key)
        return h.step in (Step.UNREAD, Step.STARTING) and not known

    def _prepares_long(self, h: Held, now: float) -> bool:
        return self._runtime.preparing_for_s(h.key, now) >= NAMED_AFTER_S

    def _tend(
        self,
        h: Held,
        now: float,
        now_ms: int,
        stop: Reason | None,
        may_start: bool,
        promised: Collection[Revision],
    ) -> list[Effect]:
        if h.task is None:
            return []
        end = self._runtime.end_of(h.key)
        if h.step in (Step.STARTING, Step.RUNNING) and end is not None:
            h.exit, h.step = end, Step.ENDED
        why = Reason.CANCELLED if h.holding.cancel_requested else stop
        if why is None:
            self._runtime.let_run(h.key)
        if h.step is Step.STARTING:
            if self._runtime.may_run(h.key):
                return []  # it may run: not to be started again, and not to be called "not started"
            if why is not None:
                h.exit = Exit(why, message="before it was started", ended_ms=now_ms)
                h.step = Step.ENDED
            elif may_start and self._retry_at_s is None and h.token in promised:
                self.wanted |= {h.token}
            elif may_start and self._retry_at_s is None:
                h.step = Step.RUNNING
                self._runtime.start(h.key, now, prepares=h.task.spec.container is not None)
                grace_s = math.inf if h.holding.overlap else h.holding.grace_s  # never killed for silence
                return [Start(h.task.spec, h.holding.attempt, h.token, h.holding.incarnation, grace_s)]
        elif (
            h.step is Step.RUNNING
            and why is not None
            and (h.key in self._runtime.tokens or self._runtime.is_preparing(h.key))
        ):
            return self._runtime.stop(h.key, why, now)
        elif why is None and may_start and self._runtime.is_prepared(h.key):
            if h.token in promised:
                self.wanted |= {h.token}
            else:
                return [self._runtime.begin(h.key)]
        return []

    def _read_unread(self) -> list[Effect]:
        wanted = sorted(t for t, h in self.held.items() if h.task is None)[:READ_MAX]
        if not wanted or self._reading or self._retry_at_s is not None:
            return []
        self._reading = frozenset(wanted)
        return [Read("held", tuple(keys.task(t) for t in wanted))]

    def read_done(self, done: ReadDone, now: float) -> list[Effect]:
        """Records of attempts that were found in the store."""
        wanted, self._reading = self._reading, frozenset()
        if done.reading is None:
            self._retry_at_s = now + RETRY_S
            return []
        for task_id in wanted:
            held = self.held.get(task_id)
            entry = done.reading.entries.get(keys.task(task_id))
            if held is None or held.task is not None or held.token > done.reading.revision:
                continue
            task = codec.readable(codec.decode_task, entry.value) if entry is not None else None
            if task is not None and lifecycle.is_attempt(task, self.node, held.holding):
                self._demand = None
                held.task, held.step = task, Step.STARTING
            else:
                self._drop(held)  # the record has moved on, so the key has gone too; or nobody can read it
        return []

    def _record_ends(self, now: float, now_ms: int, life_seen: Revision, acl_seen: Revision) -> list[Effect]:
        if self._finishing or not life_seen:
            return []
        ended = [h for h in self.held.values() if h.step is Step.ENDED]
        ready = [h for h in ended if h.not_before_s <= now]
        self._refused_at_s = min((h.not_before_s for h in ended if h.not_before_s > now), default=None)
        # What was refused goes alone, so that it keeps nobody else's end from being recorded.
        ready = [h for h in ready if not h.refused][: self._ends_max] or ready[:1]
        if not ready:
            return []
        nested = [self._end_of(h, now_ms) for h in ready]
        fitting = txn.leading(nested)  # the rest follow when these have been answered
        for h in ready[:fitting]:
            h.step = Step.RECORDING
        self._finishing = tuple((h.task_id, h.token) for h in ready[:fitting])
        # Under the life as this daemon knows it: what it has under way when it dies must not be recorded once the next
        # one has gone on with the life, and perhaps started what this one gave back before it was started. And under
        # its rights: of a node that has been thrown out no result counts from that revision on.
        guards = txn.finish_guards(self.node, life_seen, acl_seen)
        return [Commit("finish", txn.batch(nested[:fitting], guards))]

    def _end_of(self, h: Held, now_ms: int) -> txn.Txn:
        assert h.task is not None and h.exit is not None  # noqa: S101, PT018 - step ENDED
        asked, why = h.holding.cancel_requested, h.holding.cancel_reason
        end = lifecycle.ended(h.task, h.exit, h.token, cancel_requested=asked, cancel_reason=why, now_ms=now_ms)
        record = codec.encode_task(end.task)
        if end.event in (lifecycle.Event.FINISH, lifecycle.Event.GIVE_UP):
            completed = codec.completed_by(self.node, end.task)
            return txn.finish(self.node, h.task_id, h.token, record, completed)
        hint = codec.encode_hint(QueueHint.of(end.task.spec, end.delay_s))
        return txn.give_back(self.node, h.task_id, h.seen, record, hint)

    def finished(self, done: CommitDone, now: float) -> list[Effect]:
        """The answer to a batch of ends."""
        batch, self._finishing = self._finishing, ()
        if isinstance(done.result, Rejected):
            return self._refused(batch, done.result, now)
        if not isinstance(done.result, txn.Committed):
            self._retry_at_s = now + RETRY_S
            for task_id, token in batch:
                held = self._current(task_id, token)
                if held is not None:
                    held.step = Step.DOUBTFUL
            return []
        # One that did not commit has lost its token, so that its end counts for nothing, or has been asked to end.
        for (task_id, token), recorded in zip(batch, done.result.nested, strict=True):
            held = self._current(task_id, token)
            if held is None:
                continue
            if recorded:
                self._drop(held)
            else:
                held.step = Step.DOUBTFUL
                self._retry_at_s = now + RETRY_S  # not at once: it may be refused again
        self._ends_max = min(2 * self._ends_max, FINISHES_MAX)
        return []

    def _refused(self, batch: Sequence[tuple[TaskId, Revision]], why: Rejected, now: float) -> list[Effect]:
        """The store does not take these ends as they are. Nothing was recorded, so there is nothing to read back."""
        current = [held for task_id, token in batch if (held := self._current(task_id, token)) is not None]
        for held in current:
            held.step = Step.ENDED
        if len(batch) > 1 or not current:
            self._ends_max = max(len(batch) // 2, 1)
            self._retry_at_s = now + RETRY_S
            return []
        current[0].shorten_end(now)
        self._refused_at_s = current[0].not_before_s
        return [Notice(f"the end of {current[0].key} cannot be recorded as it is: {why.text}")]

    def _resolve_doubts(self) -> list[Effect]:
        if self._resolving:
            return []
        doubtful = [h for h in self.held.values() if h.step is Step.DOUBTFUL][:READ_MAX]
        if not doubtful:
            return []
        self._resolving = tuple((h.task_id, h.token) for h in doubtful)
        return [Read("doubtful", tuple(keys.running(self.node, h.task_id) for h in doubtful))]

    def doubts_read(self, done: ReadDone, now: float) -> list[Effect]:
        """Whether the ends whose answer was lost were recorded: if the key still has our token, they were not (yet).

        Recording again is safe then: both proposals carry the same guard, so at most one of them commits.
        """
        batch, self._resolving = self._resolving, ()
        if done.reading is None:
            self._retry_at_s = now + RETRY_S
            return []
        for task_id, token in batch:
            held = self._current(task_id, token)
            if held is None:
                continue
            entry = done.reading.entries.get(keys.running(self.node, task_id))
            if entry is not None and entry.created == token:
                held.step = Step.ENDED
                held.holding = codec.readable(codec.decode_holding, entry.value) or held.holding
                held.seen = entry.modified
            else:
                self._drop(held)
        return []

    def _current(self, task_id: TaskId, token: Revision) -> Held | None:
        held = self.held.get(task_id)
        return held if held is not None and held.token == token else None

    def _by_key(self, key: str) -> Held | None:
        held = self.held.get(parse_attempt_key(key)[0])
        return held if held is not None and held.key == key else None
