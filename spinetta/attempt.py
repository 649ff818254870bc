"""One attempt that a node holds, from its claim to the record of its end."""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass

from spinetta.events import attempt_key
from spinetta.match import uncleared
from spinetta.model import Exit, Holding, Reason, Revision, Task, TaskId


class Step(enum.Enum):
    """How far an attempt has come on this node."""

    UNREAD = "unread"  # the key is known, the record is not
    STARTING = "starting"
    RUNNING = "running"
    ENDED = "ended"  # its end is known and not yet recorded
    RECORDING = "recording"
    DOUBTFUL = "doubtful"  # the answer to the record of its end was lost: read back


@dataclass(slots=True)
class Held:
    """One attempt that the store says is ours."""

    task_id: TaskId
    token: Revision
    holding: Holding
    step: Step
    seen: Revision  # of the running key, a request in it included
    task: Task | None = None
    exit: Exit | None = None
    key: str = ""  # its name on this node

    def __post_init__(self) -> None:
        self.key = attempt_key(self.task_id, self.holding.attempt)

    def barred(self, clearances: Collection[str] | None) -> Reason | None:
        """Why it is to be given back when its node is cleared for no more than these labels; None: it may go on."""
        if clearances is None or self.task is None or not uncleared(self.task.spec.clearance, clearances):
            return None
        return Reason.RELEASED
