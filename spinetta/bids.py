"""A round of claims under way: what is wanted, what was proposed, and how far it has come."""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass, field

from spinetta import codec, txn
from spinetta.events import Entry
from spinetta.match import uncleared
from spinetta.model import Holding, IncarnationId, Resources, Task, TaskId
from spinetta.queue import Waiting


class Stage(enum.Enum):
    """Where a round of claims stands."""

    READING = "reading"
    COMMITTING = "committing"
    DOUBTFUL = "doubtful"  # the answer was lost; to be read back at `act_at_s`
    READING_BACK = "reading-back"


@dataclass(slots=True)
class Bid:
    """One claim of a round."""

    waiting: Waiting
    demand: Resources
    task: Task | None = None
    holding: Holding | None = None
    txn: txn.Txn | None = None

    def is_won_by(self, running: Entry) -> bool:
        """Whether this running key is what the claim would have written."""
        holding = codec.readable(codec.decode_holding, running.value)
        return (
            holding is not None
            and self.holding is not None
            and self.task is not None
            and (holding.incarnation, holding.attempt) == (self.holding.incarnation, self.holding.attempt)
        )

    def is_covered_by(self, clearances: Collection[str]) -> bool:
        """Whether a node cleared for these labels may run what is claimed."""
        return self.task is not None and not uncleared(self.task.spec.clearance, clearances)


@dataclass(slots=True)
class Round:
    """The claims under way."""

    stage: Stage
    incarnation: IncarnationId
    bids: dict[TaskId, Bid] = field(default_factory=dict)
    act_at_s: float = 0.0
    doubted: bool = False  # an answer was lost: an earlier proposal may commit in the place of the latest
