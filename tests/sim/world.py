"""A simulated cluster: many machines, one store, simulated time, and everything that goes wrong, from one seed."""

from __future__ import annotations

import functools
import heapq
import random
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar
from unittest import mock

from spinetta import agent, claims, codec, collect, holdings, keys, lifecycle, queue, recover, steal, trustcodec
from spinetta.access import NodeAcl, NodeRole
from spinetta.events import PauseWanted, SetDraining
from spinetta.model import IncarnationId, Life, NodeId, State, TaskId
from spinetta.session import Phase
from spinetta.settings import AgentSettings
from tests.builders import node_record
from tests.sim.administrators import Administrators
from tests.sim.archives import Archives
from tests.sim.etcd_model import EtcdModel
from tests.sim.faults import CANDIDATES, PAUSE_S, Fault, Plan, Rates
from tests.sim.invariants import Ability, Checker
from tests.sim.liveness import recovery_limit_s, work_limit_s
from tests.sim.machine import Machine
from tests.sim.points import Armed, Striker
from tests.sim.shim_model import Script
from tests.sim.users import Users, Wish

R = TypeVar("R")
REST_S = 3.0
LOOK_S = 0.5  # how often it is asked whether all has come to its end
REST_TURNS_MAX_HZ = 25.0  # a node at rest renews, keeps two leases alive and hears of its peers
STEPS_MAX = 60_000
# Limits that a dozen tasks reach, so that pages, batches and starvation are part of the story.
TIGHT: tuple[tuple[Any, str, float], ...] = (
    (claims, "PAGE_KEYS", 3),
    (collect, "PAGE_KEYS", 2),
    (collect, "ELSEWHERE_AFTER_S", 4.0),
    (claims, "LINGER_S", 1.0),
    (claims, "HOLD_OFF_S", 2.0),
    (holdings, "FINISHES_MAX", 2),
    (lifecycle, "PREPARING_LOSSES_MAX", 1),
    (holdings, "READ_MAX", 2),
    (queue, "WINDOW_MAX", 2),
    (queue, "HINTS_READ_MAX", 1),
    (recover, "REQUEUE_MAX", 2),
    (steal, "CLAIMS_MAX", 2),
    (steal, "STARVED_AFTER_S", 2.0),
)


# Records are values: what the same bytes say need be found out once only. Half of a run would be spent on it.
CACHED: tuple[tuple[Any, str, Any], ...] = (
    (codec, "decode_incarnation", functools.lru_cache(4096)(codec.decode_incarnation)),
    (codec, "decode_holding", functools.lru_cache(4096)(codec.decode_holding)),
    (codec, "decode_task", functools.lru_cache(4096)(codec.decode_task)),
    (codec, "decode_node", functools.lru_cache(4096)(codec.decode_node)),
    (agent, "decode_node", functools.lru_cache(4096)(codec.decode_node)),
    (trustcodec, "decode", functools.lru_cache(4096)(trustcodec.decode)),
)


class Stuck(AssertionError):
    """The world has healed, and yet something feasible has not come to its end."""


class World(Administrators, Users):
    """Runs one plan. Everything that happens goes through `step`."""

    def __init__(self, plan: Plan, *, trace: bool = False, mutate: Callable[[World], None] | None = None) -> None:
        self.plan = plan
        self.trace = trace
        self.lines: list[str] = []
        self.now = 0.0
        self.steps = 0
        self.rng = random.Random(f"world {plan.seed}")
        self.rates = plan.rates
        self.chance = random.Random(f"chance {plan.seed}")  # for what came later than the first seeds
        self.striker: Striker | None = None
        self.tally: Counter[str] = Counter()  # what has gone wrong, and how often
        self.recovered_s = self.settled_s = 0.0  # after the last fault
        self.electing = False
        self._armed = Armed(self)
        self.model = EtcdModel()
        self.stalled_until_s = 0.0
        abilities = {m.name: Ability(m.capacity, frozenset(m.tags), m.allows) for m in plan.machines}
        self.checker = Checker(abilities, beyond=plan.wild, lying=plan.lying)
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = 0
        self._scripts: dict[tuple[TaskId, int], Script] = {}
        self._expiry_s = float("inf")
        self.submitted: dict[TaskId, Wish] = {}
        self.cancelled: dict[TaskId, Wish] = {}
        self.archives = Archives(self)
        self.checker.archived = self.archives.has
        self.machines: dict[NodeId, Machine] = {m.name: Machine(self, m, self._settings(m.name)) for m in plan.machines}
        if plan.secured:
            for m in plan.machines:
                self.rights_become(NodeAcl(m.name, NodeRole.VOTER, m.clearances, effective=m.clearances))
        for m in plan.machines:
            self.at(m.joins_s, self.machines[m.name].boot)
        for at_s, spec in plan.submits:
            self.at(at_s, self._submit, spec)
        for at_s, task in plan.cancels:
            self.at(at_s, self._cancel, task)
        for fault in plan.faults:
            self.at(fault.at_s, self._fault, fault)
        self.at(plan.horizon_s, self._heal)
        if mutate is not None:
            mutate(self)

    def _settings(self, name: NodeId) -> AgentSettings:
        m = next(m for m in self.plan.machines if m.name == name)
        record = node_record(name, m.capacity, m.tags, incarnation=IncarnationId(""), allows=m.allows)
        settings = AgentSettings(
            record,
            boot_id=f"boot of {name}",
            lease_ttl_s=self.plan.lease_ttl_s,
            grace_s=self.plan.grace_s,
            kill_margin_s=self.plan.kill_margin_s,
            clock_rate_error=self.plan.rho,
            reconcile_s=self.plan.reconcile_s,
            candidate=self.plan.machines.index(m) < CANDIDATES,
            secured=self.plan.secured,
        )
        return self.archives.settle(settings)

    # --- time --------------------------------------------------------------------------------------------------

    def at(self, at_s: float, what: Callable[..., None], *args: Any) -> None:
        """Let something happen at a time; at equal times in the order in which they were asked for."""
        self._serial += 1
        heapq.heappush(self._queue, (max(at_s, self.now), self._serial, what, args))

    def after(self, delay_s: float, what: Callable[..., None], *args: Any) -> None:
        """Let something happen after a while."""
        self.at(self.now + max(delay_s, 0.0), what, *args)

    def step(self) -> bool:
        """The next thing happens; False when nothing is left to happen."""
        if not self._queue:
            return False
        at_s, _, what, args = heapq.heappop(self._queue)
        self.now = at_s
        self.steps += 1
        what(*args)
        return True

    def run_until(self, until_s: float) -> None:
        """Let everything happen that does before a time."""
        while self._queue and self._queue[0][0] <= until_s:
            self.step()
            if self.steps > STEPS_MAX:
                raise Stuck(f"{self.steps} steps at {self.now:.1f} s: something goes round in circles")
        self.now = until_s

    def has_left(self, task: TaskId) -> bool:
        """Whether it has been archived and is in the store no more."""
        return task in self.checker.collected

    def log(self, who: str, text: str) -> None:
        """A line of the trace."""
        if self.trace:
            self.lines.append(f"{self.now:9.4f} {who:>5} {text}")

    # --- the store ---------------------------------------------------------------------------------------------

    def on_store(self, do: Callable[[], R], author: NodeId | None = None) -> R:
        """Do something to the store; what changed is judged and told to those who watch."""
        self.model._now_s = self.now
        before = self.model.revision
        answer = do()
        if self.model.revision != before:
            for batch in self.model.events_since(type(before)(before + 1)):
                if self.trace:
                    told = ", ".join(("+" if e.value else "-") + e.key for e in batch.events)
                    self.log("store", f"@{batch.revision} {told}")
                self.checker.revision_made(batch, author)
                for machine in self.machines.values():
                    machine.changed(batch)
        self._await_expiry()
        return answer

    def _await_expiry(self) -> None:
        next_s = self.model.next_expiry_s()
        if next_s is not None and next_s != self._expiry_s:
            self._expiry_s = next_s
            # etcd looks for leases that have run out twice a second.
            self.at(next_s + self.rng.uniform(0.0, 0.5), self._expire, next_s)

    def _expire(self, of_s: float) -> None:
        if self._expiry_s == of_s:
            self._expiry_s = float("inf")
        if self.now < self.stalled_until_s:
            return  # a new leader of etcd gives every lease its full time again
        self.on_store(lambda: [self.model.expire(lease) for lease in self.model.due_leases(self.now)])

    # --- faults ------------------------------------------------------------------------------------------------

    def _fault(self, fault: Fault) -> None:
        machine = self.machines[fault.node] if fault.node else None
        self.log("FAULT", f"{fault.kind} {fault.node} for {fault.for_s:.2f} s {fault.mode}")
        self.tally[f"{fault.kind} {fault.mode.split(':')[0]}".strip() if fault.kind != "drift" else "drift"] += 1
        match fault.kind:
            case "etcd":
                self.stalled_until_s = self.now + fault.for_s
                self.at(self.stalled_until_s, self._etcd_back)
            case "elect":
                self.elect(fault.for_s)
            case "compact":
                self.compact()
            case _ if machine is not None:
                self._machine_fault(machine, fault)

    def _machine_fault(self, machine: Machine, fault: Fault) -> None:
        match fault.kind:
            case "partition":
                machine.cut_mode = fault.mode
                machine.cut_until_s = min(self.now + fault.for_s, self.plan.horizon_s)
            case "daemon":
                machine.when_it_does(fault.mode, machine.crash_daemon, fault.for_s, machine.start_daemon)
            case "stop":
                machine.tell(PauseWanted(PAUSE_S))
                ends_s = min(self.now + float(fault.mode or 0.0), self.plan.horizon_s - 0.01)
                self.at(ends_s, machine.stop_daemon, fault.for_s)
            case "shim":
                machine.crash_shim(fault.for_s)
            case "machine":
                self.perhaps_vouch(machine, fault)
                if fault.for_s == float("inf"):
                    machine.crash()
                    machine.gone = True
                elif fault.mode == "wiped":
                    machine.crash()
                    machine.wipe()
                    self.after(fault.for_s, machine.boot)
                else:
                    machine.when_it_does(fault.mode, machine.crash, fault.for_s, machine.boot)
            case "pause":
                if machine.daemon is not None:
                    machine.daemon.paused_until_s = min(self.now + fault.for_s, self.plan.horizon_s)
            case "watch":
                tags = sorted(machine.daemon.watches) if machine.daemon is not None else []
                if tags:
                    machine.lose_watch(self.rng.choice(tags))
            case "unfit":
                machine.shim.unfit = True
                self.after(fault.for_s, setattr, machine.shim, "unfit", False)
            case "runtime":
                machine.disconnect(fault.for_s)
            case "admin":
                self.administer(machine, fault)
            case "rights":
                self.change_rights(machine, fault)
            case "drift":
                machine.change_rate(float(fault.mode))
            case "lease":
                self.misjudge(machine, fault.mode)
            case "point":
                how, _, points = fault.mode.partition(":")
                self._armed.aim(machine, how, int(points), fault.for_s)

    def compact(self) -> None:
        """The store forgets its history."""
        if self.model.compacted < self.model.revision:
            self.model.compact(self.model.revision)

    def elect(self, for_s: float) -> None:
        """The store has no leader for a while, and forgets some of what it has been asked."""
        self.electing = True
        self.stalled_until_s = max(self.stalled_until_s, self.now + for_s)
        self.at(self.stalled_until_s, self._etcd_back)

    def misjudge(self, machine: Machine, mode: str) -> None:
        """The store errs about leases: one is taken for run out, or all get their full time again."""
        if mode == "kept":
            self.model._now_s = self.now
            self.model.restart_leases()
            self._await_expiry()
            return
        held = self.model.get(keys.OFFICE if mode == "office" else keys.node(machine.name))
        if held is not None and held.lease and self.now >= self.stalled_until_s:
            self.on_store(lambda: self.model.expire(held.lease))

    def _etcd_back(self) -> None:
        if self.now >= self.stalled_until_s:
            self.electing = False
            self.model._now_s = self.now
            self.model.restart_leases()
            self._await_expiry()

    def _heal(self) -> None:
        """No more faults; who can come back does."""
        self.log("HEAL", "")
        self.rates = Rates()
        self.striker = None
        self.stalled_until_s = min(self.stalled_until_s, self.now)
        self._etcd_back()
        for machine in self.machines.values():
            machine.crash_on = machine.rights_change_on = None
            machine.boot()
            machine.start_daemon()
            machine.tell(SetDraining(False))

    # --- the whole run -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Faults, healing, rest; raises when an invariant is broken or something does not come to its end."""
        with ExitStack() as limits:
            for module, name, value in (*CACHED, *(TIGHT if self.plan.tight else ())):
                limits.enter_context(mock.patch.object(module, name, value))
            self._run()

    def _run(self) -> None:
        self.at(0.5, self._look_round)
        self.run_until(self.plan.horizon_s)
        recovery_s, work_s = recovery_limit_s(self.plan), work_limit_s(self.plan)
        self._until(self.unrecovered, recovery_s)
        self.recovered_s = self.now - self.plan.horizon_s
        self._until(self.unsettled, recovery_s + work_s)
        self.settled_s = self.now - self.plan.horizon_s
        self._rest()

    def _until(self, why_not: Callable[[], str | None], limit_s: float) -> None:
        while (why := why_not()) is not None:
            if self.now >= self.plan.horizon_s + limit_s:
                raise Stuck(f"{self.now - self.plan.horizon_s:.0f} s after the last fault: {why}")
            self.run_until(self.now + LOOK_S)

    def _look_round(self) -> None:
        for machine in self.machines.values():
            if machine.up:
                machine.shim_moves()
                machine.check_deadlines()
            revoked = machine.daemon is not None and machine.daemon.agent.session.revoked
            if revoked and not self.is_thrown_out(machine):  # what was said to a daemon is final: it joins anew
                machine.crash_daemon()
                machine.start_daemon()
        self.after(0.25, self._look_round)

    def _rest(self) -> None:
        before = {m.name: m.daemon.turns for m in self.machines.values() if m.daemon is not None}
        self.run_until(self.now + REST_S)
        for machine in self.machines.values():
            if machine.daemon is not None and machine.name in before:
                rate_hz = (machine.daemon.turns - before[machine.name]) / REST_S
                if rate_hz > REST_TURNS_MAX_HZ:
                    raise Stuck(f"{machine.name} turns {rate_hz:.0f} times a second at rest")
        why = self.unsettled()
        if why is not None:
            raise Stuck(f"what had come to rest has not stayed there: {why}")

    def unrecovered(self) -> str | None:
        """What has not been repaired yet, whatever work is left; None when all has."""
        alive = [m for m in self.machines.values() if not m.gone and not m.left and not self.is_thrown_out(m)]
        for name, held in self.checker.holds.items():
            life = self.checker.lives.get(name)
            if held and (life is None or life.state is not Life.OPEN or name not in self.checker.nodes):
                return f"{name} holds {list(held)}, and its life is {life}"
        for machine in alive:
            if machine.daemon is None or machine.daemon.agent.session.phase is not Phase.ACTIVE:
                return f"{machine.name} does not take part"
        candidates = [m.daemon.agent for m in alive if m.settings.candidate and m.daemon is not None]
        return "nobody leads" if candidates and not any(agent.leading for agent in candidates) else None

    def unsettled(self) -> str | None:
        """What has not come to its end yet; None when all has."""
        alive = [m for m in self.machines.values() if not m.gone and not m.left and not self.is_thrown_out(m)]
        for spec_id in self.submitted:
            known = self.checker.tasks.get(spec_id)
            if known is None:
                return f"{spec_id} was submitted and is not there"
            task = known[0]
            if task.state is State.COMPLETE:
                continue
            if task.state is State.QUEUED and not any(self.may_run(task.spec, m) for m in alive):
                continue
            return f"{spec_id} is {task.state.name}: {task}"
        for name, machine in self.machines.items():
            why = self._machine_unsettled(name, machine)
            if why is not None:
                return f"{name}: {why}"
        candidates = [m.daemon.agent for m in alive if m.settings.candidate and m.daemon is not None]
        return "nobody leads" if candidates and not any(agent.leading for agent in candidates) else None

    def _machine_unsettled(self, name: NodeId, machine: Machine) -> str | None:
        if machine.returning and not machine.gone:
            return "is to leave and come back"
        if self.checker.holds.get(name):
            return f"holds {list(self.checker.holds[name])}"
        if machine.gone or machine.left:
            return "has not been closed" if name in self.checker.lives else None
        if machine.daemon is None:
            return "has no daemon"
        agent = machine.daemon.agent
        thrown_out = self.is_thrown_out(machine)
        if agent.leaving and not thrown_out:
            return "has not left"
        if agent.session.phase is not (Phase.REVOKED if thrown_out else Phase.ACTIVE):
            return f"is {agent.session.phase}"
        if thrown_out and name in self.checker.lives:
            return "was thrown out and has not been closed"
        if machine.shim.held:
            return f"its shim holds {list(machine.shim.held)}"
        if agent.claims.round is not None:
            return f"its claims go on: {agent.claims.round}"
        if not agent.holdings.empty:
            return f"its holdings are {agent.holdings.held} {agent.holdings.processes}"
        return None
