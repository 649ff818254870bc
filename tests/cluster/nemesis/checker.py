"""Compares the store's history, the ledger that attempts wrote, and what was acknowledged."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spinetta import codec, keys
from spinetta.model import Life, NodeId, Outcome, Revision, State, Task, TaskId
from spinetta.store.protocol import Change
from tests.cluster import history
from tests.cluster.nemesis.load import RETRIES_FAILS
from tests.cluster.nemesis.plan import Times
from tests.cluster.nemesis.recorder import read_history

SEEN_LATE_S = 2.0  # at most: the recorder follows every member, and tries again after 0.3 s
STORIES_MAX = 20  # violations of one kind that are told in full


# --- what is compared ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Lived:
    """What the ledger says of one attempt. Times in seconds; `end_s` and `code` None: it never told of its end."""

    task: str
    number: int
    node: str
    begin_s: float
    last_s: float
    code: int | None = None


def read_ledger(lines: Iterable[str]) -> tuple[dict[tuple[str, int], Lived], list[str]]:
    """Attempts by task and number, and what is wrong with the ledger itself."""
    found: dict[tuple[str, int], Lived] = {}
    wrong: list[str] = []
    for line in lines:
        what, task, attempt, node, ns, *more = line.split()
        key, at_s = (task, int(attempt)), int(ns) / 1e9
        known = found.get(key)
        if what == "B":
            if known is not None:
                wrong.append(f"attempt {key} was started twice: on {known.node}, on {node}")
            found[key] = Lived(task, int(attempt), node, at_s, at_s)
        elif known is None:
            wrong.append(f"attempt {key} tells of itself and never began")
        else:
            known.last_s = max(known.last_s, at_s)
            if what == "E":
                known.code = int(more[0])
    return found, wrong


@dataclass(slots=True)
class Told:
    """What the clients were told.

    Attributes:
        kinds: of every task that was sent.
        acknowledged: submits.
        cancelled_waiting: cancels answered with "it is over", and when.
        cancels: cancels that were answered.
    """

    kinds: dict[str, str] = field(default_factory=dict)
    acknowledged: set[str] = field(default_factory=set)
    cancelled_waiting: dict[str, float] = field(default_factory=dict)
    cancels: set[str] = field(default_factory=set)


def read_acks(lines: Iterable[str]) -> Told:
    """From the load's own record."""
    told = Told()
    for line in lines:
        row = json.loads(line)
        if row["op"] == "sent":
            told.kinds.update(zip(row["ids"], row["kinds"], strict=True))
        elif row["op"] == "acknowledged":
            told.acknowledged.update(row["ids"])
        else:
            told.cancels.update(row["ids"])
            if row["waiting"]:
                told.cancelled_waiting.update(dict.fromkeys(row["ids"], row["t"]))
    return told


@dataclass(frozen=True, slots=True)
class Hit:
    """A fault that happened: to whom, from when, and when it was mended."""

    kind: str
    nodes: tuple[str, ...]
    from_s: float
    until_s: float


def read_hits(lines: Iterable[str]) -> list[Hit]:
    """From the nemesis's own record."""
    rows = (json.loads(line) for line in lines)
    return [Hit(r["kind"], tuple(r["nodes"]), r["from_s"], r["until_s"]) for r in rows]


class Replay(history.Checker):
    """The invariants at every revision, and what is needed to compare.

    Attributes:
        claims: token and incarnation of each attempt, by task and number.
        beats: when renewals of each incarnation were seen.
        condemned: when which node's life was ended by the leader.
        requeued: when a task was put back after that, from which node and attempt.
    """

    def __init__(self) -> None:
        super().__init__()
        self.claims: dict[tuple[str, int], tuple[Revision, str]] = {}
        self.beats: dict[str, list[float]] = defaultdict(list)
        self.condemned: list[tuple[float, NodeId]] = []
        self.requeued: list[tuple[float, TaskId, NodeId, int]] = []
        self.claimed_at: dict[tuple[str, int], float] = {}
        self.broken: list[str] = []
        self.completions: Counter[str] = Counter()
        self.lives: dict[NodeId, str] = {}

    def take(self, revision: Revision, seen_s: float, events: Sequence[Change]) -> None:
        """One revision."""
        for event in events:
            if event.key.startswith(keys.INCARNATION):
                self._life(event, seen_s)
        for event in events:
            if event.key.startswith(keys.BEAT) and event.value is not None:
                life = self.lives.get(keys.parse_node(event.key))
                if life:
                    self.beats[life].append(seen_s)
            elif event.key.startswith(keys.TASK) and event.value is not None:
                self._task(codec.decode_task(event.value.value), revision, seen_s)
        try:
            self.feed(revision, events)
        except history.Violation as violation:
            self.broken.append(str(violation))
            for event in events:  # feed went no further; go on from what is there
                if event.key.startswith(keys.TASK) and event.value is not None:
                    task = codec.decode_task(event.value.value)
                    self.tasks[task.id] = task

    def _life(self, event: Change, seen_s: float) -> None:
        node = keys.parse_node(event.key)
        if event.value is None:
            self.lives.pop(node, None)
            return
        life = codec.decode_incarnation(event.value.value)
        self.lives[node] = life.id
        if life.state is Life.CONDEMNED:
            self.condemned.append((seen_s, node))

    def _task(self, task: Task, revision: Revision, seen_s: float) -> None:
        old = self.tasks.get(task.id)
        if task.state is State.RUNNING and (old is None or old.attempts_started < task.attempts_started):
            last = task.attempts[-1]
            self.claims[task.id, last.number] = revision, last.incarnation
            self.claimed_at[task.id, last.number] = seen_s
        elif task.state is State.QUEUED and old is not None and old.state is State.RUNNING:
            last = task.attempts[-1]
            if last.reason == "node-lost":
                self.requeued.append((seen_s, task.id, last.node, last.number))
        if task.state is State.COMPLETE and (old is None or old.state is not State.COMPLETE):
            self.completions[task.id] += 1


def replayed(items: Iterator[tuple[Revision, float, list[Change]]]) -> Replay:
    """A whole history."""
    replay = Replay()
    last = Revision(0)
    for revision, seen_s, events in items:
        if revision <= last:
            replay.broken.append(f"the history is out of order: {revision} after {last}")
        last = revision
        replay.take(revision, seen_s, events)
    return replay


# --- the comparison --------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """What is wrong, by the promise that is broken, and what was excused because an assumption was broken."""

    wrong: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    excused: Counter[str] = field(default_factory=Counter)

    def say(self, promise: str, story: str) -> None:
        """One violation."""
        self.wrong[promise].append(story)

    @property
    def good(self) -> bool:
        """No promise was broken."""
        return not self.wrong

    def text(self) -> str:
        """For people."""
        lines = []
        for promise, stories in sorted(self.wrong.items()):
            lines.append(f"{promise}: {len(stories)}")
            lines += [f"  {story}" for story in stories[:STORIES_MAX]]
        return "\n".join(lines) or "no promise was broken"


def check(
    replay: Replay,
    ledger: Mapping[tuple[str, int], Lived],
    told: Told,
    hits: Sequence[Hit],
    times: Times,
    present: Mapping[str, tuple[int, str]] | None = None,
) -> Verdict:
    """Compare all of it. `present`: the tasks' records at the end, by a read of their own."""
    verdict = Verdict()
    for story in replay.broken:
        verdict.say("the history keeps the invariants", story)
    _complete(verdict, replay, told)
    _once(verdict, replay, told)
    _in_ledger(verdict, replay, ledger)
    _cancelled(verdict, replay, ledger, told)
    _overlaps(verdict, replay, ledger, hits, times)
    _deadlines(verdict, replay, ledger, hits, times)
    if present is not None:
        for key, (revision, _) in present.items():
            held = replay.now.get(key)
            if held is None or held.modified != revision:
                seen = None if held is None else held.modified
                verdict.say("the history is whole", f"{key} was written at {revision}, the history has {seen}")
    return verdict


def _story(replay: Replay, task: str) -> str:
    record = replay.tasks.get(TaskId(task))
    if record is None:
        return f"{task}: no record"
    tries = "; ".join(f"{a.number} on {a.node}: {a.reason or 'runs'} {a.message}".strip() for a in record.attempts)
    return f"{task} is {record.state.name} {record.outcome.name} {record.reason} {record.message} [{tries}]"


def _complete(verdict: Verdict, replay: Replay, told: Told) -> None:
    for task in sorted(told.acknowledged):
        record = replay.tasks.get(TaskId(task))
        if record is None:
            verdict.say("an acknowledged task is never lost", f"{task} has no record")
        elif record.state is not State.COMPLETE:
            verdict.say("an acknowledged task comes to an end", _story(replay, task))
        elif problem := _unexpected(record, told.kinds[task], task in told.cancels):
            verdict.say("a task ends as it should", f"{problem}: {_story(replay, task)}")
    for task in sorted(set(told.kinds) - told.acknowledged):
        verdict.say("a submit is answered in the end", task)


def _unexpected(record: Task, kind: str, cancel_answered: bool) -> str:
    """What is wrong with the way a task of this kind ended; empty: nothing."""
    outcome = record.outcome
    if outcome is Outcome.LOST:
        if record.spec.restart_on_node_failure:
            return "given up though it was to be started again"
        return "" if record.reason and record.losses else "given up without a reason"
    if kind.startswith("cancelled"):
        may = {Outcome.CANCELLED} if kind == "cancelled-waiting" else {Outcome.CANCELLED, Outcome.SUCCEEDED}
        return "" if outcome in may and cancel_answered else f"{kind} and {outcome.name}"
    if kind == "fails":
        code = record.attempts[-1].exit_code if record.attempts else None
        return (
            ""
            if (outcome, record.failures, code) == (Outcome.FAILED, RETRIES_FAILS + 1, 7)
            else f"fails always, {record.failures} failures"
        )
    return "" if outcome is Outcome.SUCCEEDED else f"{kind} and {outcome.name}"


def _once(verdict: Verdict, replay: Replay, told: Told) -> None:
    for task in told.kinds:
        if replay.completions[task] > 1:
            verdict.say("a result is recorded once", f"{replay.completions[task]} times: {_story(replay, task)}")


def _in_ledger(verdict: Verdict, replay: Replay, ledger: Mapping[tuple[str, int], Lived]) -> None:
    """A recorded end by an exit code was told by that very attempt, on that node; and each that began was claimed."""
    promise = "a recorded result is that of an attempt that ran"
    for task, record in replay.tasks.items():
        for attempt in record.attempts:
            if attempt.reason != "exit":
                continue
            lived = ledger.get((task, attempt.number))
            if lived is None or lived.code is None:
                verdict.say(promise, f"attempt {attempt.number} did not end by itself: {_story(replay, task)}")
            elif (lived.code, lived.node) != (attempt.exit_code, attempt.node):
                verdict.say(promise, f"the ledger has {lived.code} on {lived.node}: {_story(replay, task)}")
    for key, lived in ledger.items():
        if key not in replay.claims:
            verdict.say("only what was claimed is started", f"attempt {key} on {lived.node}")


def _cancelled(verdict: Verdict, replay: Replay, ledger: Mapping[tuple[str, int], Lived], told: Told) -> None:
    promise = "a task whose cancel was acknowledged while it waited never starts"
    by_task: dict[str, list[Lived]] = defaultdict(list)
    for lived in ledger.values():
        by_task[lived.task].append(lived)
    for task, at_s in told.cancelled_waiting.items():
        record = replay.tasks.get(TaskId(task))
        if record is None or record.outcome is not Outcome.CANCELLED:
            verdict.say(promise, f"not cancelled: {_story(replay, task)}")
        for lived in by_task[task]:
            if lived.begin_s > at_s or record is None or lived.number > record.attempts_started:
                verdict.say(promise, f"attempt {lived.number} began {lived.begin_s - at_s:.2f} s after: {task}")


def _frozen(hits: Sequence[Hit], times: Times) -> dict[str, list[tuple[float, float]]]:
    """When a node's shim was denied the CPU for longer than its margin: the one assumption that the nemesis breaks."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for hit in hits:
        if hit.kind in ("stop-shim", "stop-node") and hit.until_s - hit.from_s > times.kill_margin_s / 2:
            for node in hit.nodes:
                found[node].append((hit.from_s, hit.until_s + times.kill_margin_s))
    return found


def _was_frozen(frozen: Mapping[str, Sequence[tuple[float, float]]], lived: Lived) -> bool:
    return any(a <= lived.last_s and lived.begin_s <= b for a, b in frozen.get(lived.node, ()))


def _overlaps(
    verdict: Verdict,
    replay: Replay,
    ledger: Mapping[tuple[str, int], Lived],
    hits: Sequence[Hit],
    times: Times,
) -> None:
    """An attempt lived at least from its first to its last line. No other of its task may have lived then."""
    frozen = _frozen(hits, times)
    by_task: dict[str, list[Lived]] = defaultdict(list)
    for lived in ledger.values():
        by_task[lived.task].append(lived)
    for task, those in by_task.items():
        record = replay.tasks.get(TaskId(task))
        for i, one in enumerate(ordered := sorted(those, key=lambda a: a.begin_s)):
            for other in ordered[i + 1 :]:
                if other.begin_s > one.last_s:
                    continue
                if record is not None and record.spec.overlap:
                    verdict.excused["two attempts at once, of a task that allows it"] += 1
                elif _was_frozen(frozen, one) or _was_frozen(frozen, other):
                    verdict.excused["two attempts at once, where a shim was denied the CPU"] += 1
                else:
                    both = f"{one.number} on {one.node} and {other.number} on {other.node}"
                    told = f"{both} for {one.last_s - other.begin_s:.2f} s: {_story(replay, task)}"
                    verdict.say("at most one attempt of a task executes at any time", told)


def _deadlines(
    verdict: Verdict,
    replay: Replay,
    ledger: Mapping[tuple[str, int], Lived],
    hits: Sequence[Hit],
    times: Times,
) -> None:
    """Nothing lives longer than its grace after the last renewal. One is seen after it was sent, never before."""
    frozen = _frozen(hits, times)
    for key, lived in ledger.items():
        record, claim = replay.tasks.get(TaskId(lived.task)), replay.claims.get(key)
        if record is None or claim is None or record.spec.overlap:
            continue
        beats = replay.beats.get(claim[1], [])
        if not beats or lived.begin_s < beats[0] - SEEN_LATE_S:
            verdict.say("nothing runs past its deadline", f"no renewal before it: {_story(replay, key[0])}")
            continue
        grace_s = record.spec.grace_s or times.grace_s
        # The longest silence that the attempt lived through: from the last beat seen before any moment of it on.
        for beat_s, next_s in zip(beats, [*beats[1:], float("inf")], strict=True):
            until_s = min(lived.last_s, next_s)
            if until_s <= max(beat_s, lived.begin_s) or until_s <= beat_s + grace_s + SEEN_LATE_S:
                continue
            if _was_frozen(frozen, lived):
                verdict.excused["past the deadline, where a shim was denied the CPU"] += 1
            else:
                past = f"{until_s - beat_s - grace_s:.2f} s on {lived.node}"
                verdict.say("nothing runs past its deadline", f"{past}: {_story(replay, key[0])}")
            break


def read_all(directory: Path) -> tuple[Replay, dict[tuple[str, int], Lived], Told, list[Hit], list[str]]:
    """What a run has left in its directory."""
    with (directory / "ledger").open() as file:
        ledger, wrong = read_ledger(file)
    replay = replayed(read_history(directory / "history"))
    with (directory / "acks").open() as acks, (directory / "hits").open() as hits:
        return replay, ledger, read_acks(acks), read_hits(hits), wrong
