"""One attempt that a node holds, from its claim to the record of its end."""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass, replace

from spinetta.events import attempt_key
from spinetta.match import uncleared
from spinetta.model import Exit, Holding, Reason, Revision, Task, TaskId

SHORT_CHARS = 100  # of an end's message, when the whole does not fit into the record
CUT = " … (cut: the record was too large)"
REFUSED_AGAIN_S, REFUSED_AGAIN_MAX_S = 5.0, 300.0  # nothing is left to cut: somebody has to look at it


class Step(enum.Enum):
    """How far an attempt has come on this node."""

    UNREAD = "unread"  # the key is known, the record is not
    STARTING = "starting"
    RUNNING = "running"
    ENDED = "ended"  # its end is known and not yet recorded
    RECORDING = "recording"
    DOUBTFUL = "doubtful"  # the answer to the record of its end was lost: read back


class GiveBack(enum.Enum):
    """What a node gives back to the queue of all that it holds."""

    NOTHING = "nothing"
    UNSTARTED = "unstarted"  # claimed only: nothing of it has run
    RESTARTABLE = "restartable"  # and what runs and may be started again
    ALL = "all"


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
    refused: int = 0  # how often the store has refused the record of its end, alone, as it was
    not_before_s: float = 0.0  # … and when to try again

    def __post_init__(self) -> None:
        self.key = attempt_key(self.task_id, self.holding.attempt)

    def barred(self, clearances: Collection[str] | None) -> Reason | None:
        """Why it is to be given back when its node is cleared for no more than these labels; None: it may go on."""
        if clearances is None or self.task is None or not uncleared(self.task.spec.clearance, clearances):
            return None
        return Reason.RELEASED

    def goes_back(self, what: GiveBack) -> Reason | None:
        """Why it is to be given back when so much is; None: it may go on. Its record must have been read."""
        wanted = {
            GiveBack.NOTHING: False,
            GiveBack.UNSTARTED: self.step is Step.STARTING,
            GiveBack.RESTARTABLE: self.step is Step.STARTING or self.may_start_again,
            GiveBack.ALL: True,
        }
        return Reason.RELEASED if wanted[what] else None

    def shorten_end(self, now: float) -> None:
        """The store does not take the record of its end as it is: say less of it, and try again, ever more rarely."""
        self.refused += 1
        delay_s = 0.0 if self.refused < 3 else min(REFUSED_AGAIN_S * 2.0 ** (self.refused - 3), REFUSED_AGAIN_MAX_S)
        self.not_before_s = now + delay_s
        if self.exit is not None:
            cut = self.exit.message[:SHORT_CHARS] + CUT if self.refused == 1 else ""
            self.exit = replace(self.exit, message=min(cut, self.exit.message, key=len))

    @property
    def may_start_again(self) -> bool:
        """Whether its task may be started a second time."""
        return self.task is not None and self.task.spec.restart_on_node_failure
