"""What users do in a simulated world: submit and cancel, again until they are told; and what their programs do."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from spinetta import codec, keys, lifecycle, txn
from spinetta.model import NodeId, QueueHint, State, TaskId, TaskSpec
from tests.sim.etcd_model import EtcdModel
from tests.sim.faults import Plan, Rates
from tests.sim.shim_model import Script

R = TypeVar("R")
LONGEST_S = 15.0  # a process by itself


@dataclass(slots=True)
class Wish:
    """What a user asked for and has been told."""

    acknowledged: bool = False


class Users:
    """The part of a world that submits and cancels tasks."""

    plan: Plan
    rates: Rates
    rng: random.Random
    now: float
    model: EtcdModel
    stalled_until_s: float
    submitted: dict[TaskId, Wish]
    cancelled: dict[TaskId, Wish]
    _scripts: dict[tuple[TaskId, int], Script]

    def after(self, delay_s: float, what: Callable[..., None], *args: Any) -> None:
        """Let something happen after a while."""
        raise NotImplementedError

    def on_store(self, do: Callable[[], R], author: NodeId | None = None) -> R:
        """Do something to the store."""
        raise NotImplementedError

    def has_left(self, task: TaskId) -> bool:
        """Whether it has been archived and is in the store no more."""
        raise NotImplementedError

    def log(self, who: str, text: str) -> None:
        """A line of the trace."""
        raise NotImplementedError

    def _fate(self) -> tuple[bool, bool]:
        return self.rng.random() >= self.rates.lost, self.rng.random() >= self.rates.answer_lost

    def _submit(self, spec: TaskSpec) -> None:
        wish = self.submitted.setdefault(spec.id, Wish())
        if wish.acknowledged or self.has_left(spec.id):  # nobody tries again for so long
            return
        task = lifecycle.submitted(spec, now_ms=int(self.now * 1000), at_node="user")
        arrives, answers = self._fate()
        if self.now < self.stalled_until_s:
            arrives = False
        if arrives:
            hint = b"" if spec.id in self.plan.no_hint else codec.encode_hint(self._hint(spec))
            body = txn.submit(spec.id, codec.encode_task(task), hint)
            self.on_store(lambda: self.model.commit(body))  # a conflict means that it was there already
            wish.acknowledged = answers
        if not wish.acknowledged:
            self.after(0.5, self._submit, spec)

    def _hint(self, spec: TaskSpec) -> QueueHint:
        made = QueueHint.of(spec)
        return replace(made, needs=(), image="") if spec.id in self.plan.lying else made

    def _cancel(self, task_id: TaskId) -> None:
        """Read, then write a little later: what was read may have changed."""
        kv = self.model.get(keys.task(task_id))
        if self.has_left(task_id):
            return
        arrives, _ = self._fate()
        if kv is None or not arrives or self.now < self.stalled_until_s:
            self.after(0.5, self._cancel, task_id)
            return
        task = codec.decode_task(kv.value)
        body: txn.Txn | None = None
        if task.state is State.QUEUED:
            status = self.model.get(keys.queued(task_id))
            assert status is not None
            over = lifecycle.cancelled_waiting(task, "by its user", now_ms=int(self.now * 1000))
            body = txn.cancel_waiting(task_id, status.key, status.modified, codec.encode_task(over))
        elif task.state is State.RUNNING:
            node = task.attempts[-1].node
            status = self.model.get(keys.running(node, task_id))
            assert status is not None
            asked = replace(codec.decode_holding(status.value), cancel_requested=True)
            body = txn.cancel_running(node, task_id, status.modified, codec.encode_holding(asked))
        if body is not None:
            self.after(self.rng.uniform(0.0, self.rng.choice((0.02, 0.6))), self._cancel_now, task_id, body)

    def _cancel_now(self, task_id: TaskId, body: txn.Txn) -> None:
        arrives, answers = self._fate()
        arrives = arrives and self.now >= self.stalled_until_s
        done = self.on_store(lambda: self.model.commit(body)) if arrives else None
        if isinstance(done, txn.Committed) and answers:
            self.cancelled[task_id] = Wish(acknowledged=True)
            self.log("user", f"cancel of {task_id} acknowledged")
        else:
            self.after(0.3, self._cancel, task_id)

    def script(self, task: TaskId, attempt: int) -> Script:
        """What an attempt would do by itself: the same in every run of the seed, whoever runs it."""
        found = self._scripts.get((task, attempt))
        if found is None:
            rng = random.Random(f"{self.plan.seed} {task} {attempt}")
            code = 0 if rng.random() < 0.8 else rng.randint(1, 255)
            longest_s = rng.choice((5.0, 10.0, LONGEST_S) if self.plan.long else (0.0, 0.3, 2.0, 5.0, 12.0))
            duration_s = rng.uniform(longest_s / 2, longest_s)
            found = self._scripts[task, attempt] = Script(duration_s, code, deaf=rng.random() < 0.2)
        return found
