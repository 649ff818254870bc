"""What administrators do in a simulated world: drain nodes, throw them out, clear them for more or less."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from spinetta import accesstxn, codec, keys, trustcodec, txn
from spinetta.access import NodeAcl
from spinetta.events import LeaveWanted, SetDraining
from spinetta.model import Life, NodeId, NodeRecord, Revision, TaskSpec
from tests.sim.contained import allowed
from tests.sim.etcd_model import EtcdModel
from tests.sim.faults import LABELS, Fault, Plan
from tests.sim.invariants import ADMINISTRATOR, Checker
from tests.sim.machine import Machine

R = TypeVar("R")
VOUCHED = 0.4  # of the machines that crash
HEAL_LIMIT_S = 60.0  # after the last fault, besides the work itself: leases, a wait-out, rounds of claims


class Administrators:
    """The part of a world that people with rights over it play."""

    plan: Plan
    now: float
    model: EtcdModel
    checker: Checker

    def at(self, at_s: float, what: Callable[..., None], *args: Any) -> None:
        """Let something happen at a time."""
        raise NotImplementedError

    def after(self, delay_s: float, what: Callable[..., None], *args: Any) -> None:
        """Let something happen after a while."""
        raise NotImplementedError

    def on_store(self, do: Callable[[], R], author: NodeId | None = None) -> R:
        """Do something to the store."""
        raise NotImplementedError

    def administer(self, machine: Machine, fault: Fault) -> None:
        """Drain a node, or let it leave and come back."""
        if fault.mode == "drain":
            machine.tell(SetDraining(True))
            self.after(fault.for_s, machine.tell, SetDraining(False))
            return
        if fault.mode == "stay":  # told to leave, with everything given back, and then to stay after all
            self.checker.released.add(machine.name)
            machine.tell(SetDraining(True, leaving=True, release=True))
            self.after(fault.for_s, machine.tell, SetDraining(False))
            return
        if fault.mode == "release":
            self.checker.released.add(machine.name)
        machine.returning = True
        machine.tell(LeaveWanted(release=fault.mode == "release"))
        self.after(fault.for_s + 2.0, self._rejoin, machine)

    def perhaps_vouch(self, machine: Machine, fault: Fault) -> None:
        """Now and then somebody looks after a machine that went off, and vouches that it is."""
        chance = random.Random(f"{self.plan.seed} vouch {fault.at_s}")  # of its own: what else a seed does stays
        if chance.random() < VOUCHED:
            self.after(chance.uniform(0.0, min(fault.for_s, 9.0)), self._vouch, machine, chance.uniform(0.0, 1.0))

    def _vouch(self, machine: Machine, later_s: float) -> None:
        """The word is written a little later: the machine may have come up meanwhile, and its daemon registered."""
        life = self.model.get(keys.incarnation(machine.name))
        if machine.up or life is None:
            return
        dead = codec.encode_incarnation(replace(codec.decode_incarnation(life.value), state=Life.DEAD))
        word = txn.confirm_dead(machine.name, life.modified, dead)
        self.after(later_s, self.on_store, lambda: self.model.commit(word), ADMINISTRATOR)

    def _rejoin(self, machine: Machine) -> None:
        """One that has left comes back; one that has not yet is told to stay."""
        if machine.daemon is None or not machine.daemon.agent.leaving:
            self.checker.released.discard(machine.name)
            machine.returning = False
            machine.start_daemon()
        elif self.now < self.plan.horizon_s + HEAL_LIMIT_S / 2:
            self.after(1.0, self._rejoin, machine)

    # --- rights ---

    def rights_of(self, node: NodeId) -> NodeAcl | None:
        """What the store says of a node's rights; None in an open cluster."""
        kv = self.model.get(keys.acl_node(node))
        return None if kv is None else trustcodec.decode(NodeAcl, kv.value)

    def rights_become(self, acl: NodeAcl) -> None:
        """An administrator writes a node's rights."""
        kv = self.model.get(keys.acl_node(NodeId(acl.name)))
        seen = accesstxn.Seen(keys.acl_node(NodeId(acl.name)), kv.modified if kv is not None else Revision(0))
        change = accesstxn.Change(seen, trustcodec.encode(acl))
        if acl.revoked:
            body = accesstxn.revoke_node(NodeId(acl.name), change, (), None, ())
        else:
            body = accesstxn.change((change,))
        assert isinstance(self.on_store(lambda: self.model.commit(body)), txn.Committed)

    def change_rights(self, machine: Machine, fault: Fault) -> None:
        """Throw a node out, or clear it for more or less, now or while just something is under way."""
        if fault.mode in ("claim", "finish", "renew"):  # thrown out while just that is under way
            machine.rights_change_on = fault.mode, partial(self.throw_out, machine, fault.for_s)
            return
        if fault.mode == "uncover":
            machine.rights_change_on = "claim", partial(self.change_rights, machine, replace(fault, mode="withdraw"))
            return
        acl = self.rights_of(machine.name)
        if acl is None or acl.revoked:
            return
        if fault.mode == "revoke":
            self.throw_out(machine, fault.for_s)
            return
        cleared = {"withdraw": (), "grant": LABELS, "rewrite": acl.effective}[fault.mode]
        self.rights_become(replace(acl, clearances=cleared, effective=cleared))
        back = next(m.clearances for m in self.plan.machines if m.name == machine.name)
        self.at(min(self.now + fault.for_s, self.plan.horizon_s), self._rights_again, machine, back)

    def _rights_again(self, machine: Machine, cleared: tuple[str, ...]) -> None:
        acl = self.rights_of(machine.name)
        if acl is not None and not acl.revoked:
            self.rights_become(replace(acl, clearances=cleared, effective=cleared))

    def throw_out(self, machine: Machine, for_s: float) -> None:
        """An administrator revokes a node's rights, and perhaps lets it in again."""
        acl = self.rights_of(machine.name)
        if acl is None or acl.revoked:
            return
        self.rights_become(replace(acl, revoked=True))
        if for_s < float("inf"):
            self.at(min(self.now + for_s, self.plan.horizon_s), self._let_in, machine)

    def _let_in(self, machine: Machine) -> None:
        acl = self.rights_of(machine.name)
        assert acl is not None
        if acl.revoked:
            self.rights_become(replace(acl, revoked=False))

    def is_thrown_out(self, machine: Machine) -> bool:
        """Whether its rights are revoked now."""
        acl = self.rights_of(machine.name)
        return acl is not None and acl.revoked

    def may_run(self, spec: TaskSpec, machine: Machine) -> bool:
        """Whether a node could run a task, were it empty."""
        record, acl = machine.settings.record, self.rights_of(machine.name)
        return (
            spec.resources.fits_in(record.capacity)
            and set(spec.tags_required) <= set(record.tags)
            and not set(spec.tags_forbidden) & set(record.tags)
            and set(spec.clearance) <= set(acl.effective if acl is not None else ())
            and allowed(spec, record.allows)
            and self._is_looked_at(spec, record)
        )

    def _is_looked_at(self, spec: TaskSpec, record: NodeRecord) -> bool:
        """A queue key that lies, and says that its task is a plain process, is for nodes that run processes."""
        queued = self.model.get(keys.queued(spec.id))
        hint = codec.decode_hint(queued.value) if queued is not None else None
        return hint is None or bool(hint.needs) or not record.allows or "process" in record.allows
