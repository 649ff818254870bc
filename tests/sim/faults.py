"""What one seed does to its world: how large it is, what is submitted, and what goes wrong when."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from spinetta.model import NodeId, Resources, TaskId, TaskSpec
from tests.builders import GIB, cpus, node_id, task_id

KINDS = (
    "net",  # requests that never arrive, arrive late, or are never answered
    "partition",  # one node cut off from the store for a while
    "daemon",  # the daemon dies and is started again
    "shim",  # the shim dies, and all that it holds
    "machine",  # a whole machine dies; some come back with another boot id
    "pause",  # a daemon is not run for a while, perhaps past its lease
    "etcd",  # the store stands still for seconds, then gives every lease its full time again
    "compact",  # history is thrown away
    "watch",  # watches break, lag, and now and then drop an event
    "runtime",  # the shim does not answer
    "unfit",  # a machine can start nothing for a while
    "disk",  # what should be remembered cannot be written
    "admin",  # nodes are drained, undrained, leave and come back
    "join",  # a node joins late
    "rights",  # nodes are thrown out, let in again, and cleared for more or less
)
LABELS = ("blue", "red")
OFTEN = {"partition": 4, "net": 3, "daemon": 3, "machine": 2, "pause": 2, "rights": 3}  # what safety hangs on most
CANDIDATES = 3  # how many, from the first on, may lead
HORIZON_S = 14.0  # faults happen within; a seed must be cheap, and more seeds find more than longer ones
PIECES_MAX = 12
PAUSE_S = 10  # that a daemon asks for when it ends in order


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong at a time. `node` is empty for the store."""

    at_s: float
    kind: str
    node: NodeId = NodeId("")
    for_s: float = 0.0
    mode: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """One node of the plan."""

    name: NodeId
    capacity: Resources
    tags: tuple[str, ...]
    joins_s: float
    clock_rate: float
    clock_s: float
    clearances: tuple[str, ...] = ()
    allows: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rates:
    """How often single messages meet a fate, as probabilities."""

    lost: float = 0.0
    answer_lost: float = 0.0
    late: float = 0.0
    slow: float = 0.0
    drop_event: float = 0.0
    slow_watch: float = 0.0
    disk: float = 0.0
    runtime: float = 0.0
    repeat: float = 0.0
    replay: float = 0.0
    slow_disk: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a seed decides beforehand.

    `no_hint`: tasks submitted with an empty queue key. `tight`: limits are so low that they are reached.
    `long`: tasks come early and last long, so that what happens to their nodes happens under them.
    `secured`: nodes have records of their rights, and may do nothing without.
    `wild`: clocks and shims are beyond what is assumed of them, so that what rests on time may be broken.
    `lying`: tasks whose queue key says that they need nothing, while their record asks for a container.
    `unsynced`: a machine that loses its power loses what its shim had not synced.
    `bombs`: tasks whose image takes a machine down as it is unpacked there.
    """

    seed: int
    kinds: tuple[str, ...]
    machines: tuple[Machine, ...]
    submits: tuple[tuple[float, TaskSpec], ...]
    cancels: tuple[tuple[float, TaskId], ...]
    faults: tuple[Fault, ...]
    rates: Rates
    gone: frozenset[NodeId]
    no_hint: frozenset[TaskId]
    tight: bool
    long: bool
    lease_ttl_s: int
    grace_s: float
    rho: float
    horizon_s: float = HORIZON_S
    kill_margin_s: float = 0.5
    reconcile_s: float = 6.0
    secured: bool = True
    wild: bool = False
    unsynced: bool = False
    lying: frozenset[TaskId] = frozenset()
    bombs: frozenset[TaskId] = frozenset()


@dataclass(slots=True)
class _Draft:
    rng: random.Random
    machines: list[Machine]
    faults: list[Fault] = field(default_factory=list)
    gone: set[NodeId] = field(default_factory=set)

    def some(self) -> NodeId:
        return self.rng.choice(self.machines).name

    def when(self) -> float:
        return self.rng.uniform(0.3, HORIZON_S * self.rng.choice((0.4, 1.0)))


_Adder = Callable[[_Draft], None]


def plan(seed: int, only: Collection[str] = ()) -> Plan:
    """The plan of a seed; with `only`, these kinds of faults and no others."""
    rng = random.Random(seed)
    rho = 0.02
    count = rng.choice((1, 2, 2, 3, 3, 3, 4, 5))
    machines = [
        Machine(
            node_id(i),
            cpus(rng.choice((1, 2, 4)), 4 * GIB, **({"gpu": 1} if rng.random() < 0.3 else {})),
            ("fast",) if rng.random() < 0.5 else (),
            rng.uniform(0.0, 0.3),
            1.0 + rng.uniform(-rho / 2, rho / 2.1),
            rng.uniform(0.0, 5000.0),
            tuple(label for label in LABELS if rng.random() < 0.7),
        )
        for i in range(1, count + 1)
    ]
    chosen = rng.choices(KINDS, [OFTEN.get(k, 1) for k in KINDS], k=rng.choice((0, 1, 1, 2, 3, 3, 4, 6, 8)))
    kinds = tuple(only) or tuple(sorted(set(chosen)))
    draft = _Draft(rng, machines)
    for kind in KINDS:
        if kind in kinds:
            _ADD[kind](draft)
    long = rng.random() < 0.4
    many = range(1, rng.randint(2, PIECES_MAX) + 1)
    labelled = 0.25 if "rights" in kinds else 0.05  # what nobody may run is in nobody's way: not too much of it
    submits = tuple(sorted((_submit(rng, n, long=long, labelled=labelled) for n in many), key=lambda s: s[0]))
    submits = tuple((at_s, _later_fields(seed, spec)) for at_s, spec in submits)
    cancels = tuple((rng.uniform(at_s, HORIZON_S), spec.id) for at_s, spec in submits if rng.random() < 0.4)
    rates = Rates(
        lost=rng.uniform(0, 0.25) if "net" in kinds else 0.0,
        answer_lost=rng.uniform(0, 0.25) if "net" in kinds else 0.0,
        late=rng.uniform(0, 0.25) if "net" in kinds else 0.0,
        slow=rng.uniform(0, 0.3) if "net" in kinds else 0.0,
        drop_event=rng.uniform(0, 0.1) if "watch" in kinds else 0.0,
        slow_watch=rng.uniform(0, 0.5) if "watch" in kinds else 0.0,
        disk=0.5 if "disk" in kinds else 0.0,
        runtime=rng.uniform(0, 0.3) if "runtime" in kinds else 0.0,
        repeat=0.1 if rng.random() < 0.3 else 0.0,
    )
    return Plan(
        seed,
        kinds,
        tuple(draft.machines),
        submits,
        cancels,
        tuple(sorted(draft.faults, key=lambda f: f.at_s)),
        rates,
        frozenset(draft.gone),
        frozenset(spec.id for _, spec in submits if rng.random() < 0.1),
        tight=rng.random() < 0.4,
        long=long,
        lease_ttl_s=rng.choice((2, 3)),
        grace_s=rng.choice((2.0, 3.0, 5.0, 6.0)),
        rho=rho,
        secured="rights" in kinds or rng.random() < 0.7,
    )


def _submit(rng: random.Random, n: int, *, long: bool, labelled: float) -> tuple[float, TaskSpec]:
    need = cpus(rng.choice((0.5, 1, 1, 1, 2, 4)), rng.choice((0, GIB, 2 * GIB)))
    if rng.random() < 0.1:
        need = cpus(1, gpu=1)
    spec = TaskSpec(
        task_id(n),
        ("work",),
        resources=need,
        priority=rng.choice((0, 0, 0, 1, -1)),
        tags_required=("fast",) if rng.random() < 0.15 else (),
        tags_forbidden=("fast",) if rng.random() < 0.1 else (),
        retries=rng.choice((0, 1, 2)),
        retry_backoff_s=rng.choice((0.0, 0.3)),
        walltime_s=1.0 if rng.random() < 0.1 else 0.0,
        restart_on_node_failure=rng.random() < 0.9,
        grace_s=rng.choice((0.0, 0.0, 0.0, 1.5, 4.0)),
        clearance=tuple(label for label in LABELS if rng.random() < labelled),
    )
    return rng.uniform(0.0, HORIZON_S * (0.1 if long else rng.choice((0.2, 0.8)))), spec


def _later_fields(seed: int, spec: TaskSpec) -> TaskSpec:
    """What specifications have learnt since the first seeds were told: drawn apart, so that those tell the same."""
    rng = random.Random(f"later {seed} {spec.id}")
    if seed % 5 != 1:
        return spec
    if rng.random() < 0.4:
        spec = replace(spec, overlap=True, grace_s=0.0)
    return replace(spec, losses_allowed=rng.choice((0, 1, 5)))


def _spread(kind: str, most: int, longest_s: float, modes: tuple[str, ...] = ("",)) -> _Adder:
    def add(d: _Draft) -> None:
        for _ in range(d.rng.randint(1, most)):
            for_s = d.rng.choice((d.rng.uniform(0.1, longest_s / 3), d.rng.uniform(longest_s / 2, longest_s)))
            d.faults.append(Fault(d.when(), kind, d.some(), for_s, d.rng.choice(modes)))

    return add


def _machine(d: _Draft) -> None:
    """Crashes; a minority at most stays away for ever, or the leader would rightly refuse to condemn anybody."""
    _spread("machine", 3, 9.0, ("", "", "claim", "finish", "register"))(d)
    if d.rng.random() < 0.2:
        d.faults.append(Fault(d.when(), "machine", d.some(), d.rng.uniform(0.1, 9.0), "wiped"))
        return
    for m in d.rng.sample(d.machines, k=d.rng.randint(0, max(0, (len(d.machines) - 1) // 2))):
        d.gone.add(m.name)
        d.faults.append(Fault(d.when(), "machine", m.name, float("inf")))


def _join(d: _Draft) -> None:
    last = d.machines[-1]
    d.machines[-1] = replace(last, joins_s=d.when())


def _rights(d: _Draft) -> None:
    """Rights come and go; one node at most is thrown out for ever, and not the last that may lead."""
    _spread("rights", 5, 6.0, ("revoke", "claim", "finish", "renew", "withdraw", "uncover", "grant", "rewrite"))(d)
    stays = [m.name for m in d.machines[:CANDIDATES] if m.name not in d.gone]
    able = [m.name for m in d.machines if m.name not in d.gone and (m.name not in stays or len(stays) > 1)]
    if able and len(d.machines) > 1 and d.rng.random() < 0.3:
        d.faults.append(Fault(d.when(), "rights", d.rng.choice(able), float("inf"), "revoke"))


def _nothing(_d: _Draft) -> None:
    """The rates of the plan say it all."""


_ADD = {
    "net": _nothing,
    "partition": _spread("partition", 3, 12.0, ("requests", "answers", "both", "lease", "keep")),
    "daemon": _spread("daemon", 4, 7.0, ("", "", "claim", "finish", "register", "held", "renew")),
    "shim": _spread("shim", 2, 1.0),
    "machine": _machine,
    "pause": _spread("pause", 3, 9.0),
    "etcd": _spread("etcd", 2, 4.0),
    "compact": _spread("compact", 4, 1.0),
    "watch": _spread("watch", 6, 1.0),
    "runtime": _spread("runtime", 3, 1.5),
    "unfit": _spread("unfit", 3, 4.0),
    "disk": _nothing,
    "admin": _spread("admin", 3, 4.0, ("drain", "leave", "release", "stay")),
    "join": _join,
    "rights": _rights,
}
