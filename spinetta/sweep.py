"""The leader's slow round through all tasks, in search of what does not agree with itself; how it is mended is in
`orphans`.

One page every few seconds, of records and of status keys in turn. What a page shows is old by the time its other half
has been read, so whatever seems odd is looked at once more, all of it at one revision; only that is believed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spinetta import codec, keys, orphans, txn
from spinetta.events import Commit, CommitDone, Effect, Entry, List, ListDone, Notice, Read, ReadDone
from spinetta.model import IncarnationId, NodeId, TaskId
from spinetta.settings import AgentSettings

PAGE_S = 5.0  # between two pages: 20 keys a second, two keys a task, so that a hundred thousand tasks take three hours
RETRY_S = 2.0
PAGE_KEYS = 100  # below etcd's 128 operations a transaction, as each takes one read
LOOK_MAX = 12  # tasks looked at together: four keys each and two for each of two nodes make 96
NODES_MAX = 2  # that a task is looked for at: its record names one, an orphaned key another
SUSPECTS_MAX = 1000  # that wait; more are found again in the next round
ROUND = (keys.RUNNING, keys.TASK, keys.QUEUED, keys.BLOCKED, keys.COMPLETE)


@dataclass(frozen=True, slots=True)
class Suspect:
    """A task that must stay as it is for a while before it can be mended."""

    body: txn.Txn
    due_s: float
    nodes: frozenset[NodeId]


@dataclass(frozen=True, slots=True)
class Half:
    """A key of a page. The other half is to be read: of a record its status key, of a status key the record."""

    task: TaskId
    node: NodeId | None  # that holds the task, by what was listed
    status_key: str  # that was listed; empty: the record was


class Sweep:
    """The round, as a state machine: only for whoever holds the office."""

    def __init__(self, settings: AgentSettings) -> None:
        self.settings = settings
        self._turn = 0
        self._after = ""
        self._busy = False
        self._act_at_s: float | None = None
        self._odd: dict[TaskId, frozenset[NodeId]] = {}  # to be looked at: where it is, or should be
        self._page: dict[str, Half] = {}  # by the key to be read
        self._looking: dict[TaskId, frozenset[NodeId]] = {}
        self._suspects: dict[TaskId, Suspect] = {}
        self._said: set[str] = set()
        self._office: txn.OfficeHeld | None = None

    @property
    def begun(self) -> bool:
        """Whether it has been asked for anything yet."""
        return self._act_at_s is not None

    @property
    def next_s(self) -> float | None:
        """When `poll` has something to do."""
        return None if self._busy else self._act_at_s

    def poll(self, now: float, office: txn.OfficeHeld) -> list[Effect]:
        """What time asks for."""
        self._office = office  # guards are of now
        if self._act_at_s is None:
            self._act_at_s = now + PAGE_S
        if self._busy or self._act_at_s > now:
            return []
        self._busy = True
        self._odd |= {task: suspect.nodes for task, suspect in self._suspects.items() if suspect.due_s <= now}
        if self._odd:
            self._looking = dict(list(self._odd.items())[:LOOK_MAX])
            for task in self._looking:
                del self._odd[task]
            wanted = (k for t, nodes in self._looking.items() for k in orphans.wanted_keys(t, nodes))
            return [Read("sweep-look", tuple(dict.fromkeys(wanted)))]
        return [List("sweep", ROUND[self._turn], self._after, PAGE_KEYS)]

    # --- a page ---

    def listed(self, done: ListDone, now: float) -> list[Effect]:
        """A page of the round."""
        if done.listing is None or not self._busy:
            return self._rest(now, RETRY_S)
        self._page = {}
        for entry in done.listing.entries:
            self._note(entry)
        if done.listing.more and done.listing.entries:
            self._after = done.listing.entries[-1].key
        else:
            self._turn, self._after = (self._turn + 1) % len(ROUND), ""
        if not self._page:
            return self._rest(now)
        return [Read("sweep-page", tuple(self._page))]

    def _note(self, entry: Entry) -> None:
        """What else must be there if all is well with this key: asked for next."""
        if entry.key.startswith(keys.TASK):
            task = keys.parse_task(entry.key)
            record = codec.readable(codec.decode_task, entry.value)
            expected = orphans.status_key(record) if record is not None and record.id == task else None
            if expected is None:
                self._suspect(task, None)
            else:
                self._page[expected] = Half(task, orphans.holder(record), "")
            return
        found = keys.find_running(entry.key)
        if found is None and entry.key.startswith(keys.RUNNING):
            return  # somebody's own key: nobody's task
        node, task = found if found is not None else (None, keys.parse_task(entry.key))
        self._page[keys.task(task)] = Half(task, node, entry.key)

    def page_read(self, done: ReadDone, lives: Mapping[str, Entry], now: float) -> list[Effect]:
        """The other half of a page."""
        page, self._page = self._page, {}
        if done.reading is None or not self._busy:
            return self._rest(now, RETRY_S)
        for key, half in page.items():
            if self._is_odd(half, done.reading.entries.get(key), lives):
                self._suspect(half.task, half.node)
        return self._rest(now, 0.0 if self._odd else PAGE_S)

    def _is_odd(self, half: Half, other: Entry | None, lives: Mapping[str, Entry]) -> bool:
        if other is None:
            return True
        if not half.status_key:
            holding = codec.readable(codec.decode_holding, other.value)
            begun = holding.incarnation if holding is not None else None
            return half.node is not None and self._is_of_no_life(half.node, begun, lives)
        record = codec.readable(codec.decode_task, other.value)
        if record is None or orphans.status_key(record) != half.status_key:
            return True
        return half.node is not None and self._is_of_no_life(half.node, record.attempts[-1].incarnation, lives)

    def _is_of_no_life(self, node: NodeId, incarnation: IncarnationId | None, lives: Mapping[str, Entry]) -> bool:
        """Whether a running key belongs to no life that somebody looks after."""
        entry = lives.get(keys.incarnation(node))
        if entry is None:
            return True
        life = codec.readable(codec.decode_incarnation, entry.value)
        return life is not None and life.id != incarnation  # one that cannot be read counts as condemned

    def _suspect(self, task: TaskId, node: NodeId | None) -> None:
        if len(self._odd) < SUSPECTS_MAX:
            nodes = self._odd.get(task, frozenset())
            self._odd[task] = nodes | ({node} if node is not None and len(nodes) < NODES_MAX else frozenset())

    # --- a closer look ---

    def looked(self, done: ReadDone, now: float, now_ms: int) -> list[Effect]:
        """All of what seemed odd, at one revision."""
        looking, self._looking = self._looking, {}
        if done.reading is None or not self._busy:
            return self._rest(now, RETRY_S)
        effects: list[Effect] = []
        bodies = []
        for task, nodes in looking.items():
            entry = done.reading.entries.get(keys.task(task))
            record = codec.readable(codec.decode_task, entry.value) if entry is not None else None
            held_by = orphans.holder(record)
            if held_by is not None and held_by not in nodes:
                self._odd[task] = nodes | {held_by}  # the record names another node: look there, too
                continue
            wanted = orphans.wanted_keys(task, nodes)
            found = orphans.mending(
                task, {k: done.reading.entries.get(k) for k in wanted}, self.settings, now_ms=now_ms
            )
            before = self._suspects.pop(task, None)
            if isinstance(found, str):
                effects += self._say(found)
            elif found is not None and found.wait_s and not self._waited(before, found, now):
                self._wait(task, nodes, found, before, now)
            elif found is not None:
                bodies.append(found.body)
                effects.append(Notice(f"mending: {found.why}"))
        if not bodies:
            return effects + self._rest(now, 0.0 if self._odd else PAGE_S)
        assert self._office is not None  # noqa: S101 - set by poll, which asked
        batch = txn.batch(bodies[: txn.leading(bodies)], self._office.guards())
        return [*effects, Commit("sweep-mend", batch)]

    def _waited(self, before: Suspect | None, found: orphans.Mending, now: float) -> bool:
        """Whether all has stayed as it was for as long as it must: what is guarded is what was seen."""
        return before is not None and before.body.when == found.body.when and before.due_s <= now

    def _wait(
        self, task: TaskId, nodes: frozenset[NodeId], found: orphans.Mending, before: Suspect | None, now: float
    ) -> None:
        if before is not None and before.body.when == found.body.when:
            self._suspects[task] = before
        elif len(self._suspects) < SUSPECTS_MAX:
            self._suspects[task] = Suspect(found.body, now + found.wait_s, nodes)

    def mended(self, _done: CommitDone, now: float) -> list[Effect]:
        """Committed, lost or not answered: the round comes by again."""
        return self._rest(now)

    def _rest(self, now: float, for_s: float = PAGE_S) -> list[Effect]:
        self._busy = False
        self._act_at_s = now + for_s
        return []

    def _say(self, text: str) -> list[Effect]:
        if text in self._said or len(self._said) >= SUSPECTS_MAX:
            return []
        self._said.add(text)
        return [Notice(text)]
