"""Faults of the code itself, each made on purpose, to see that something notices: a check on the checks.

A mutant is a way to patch the code under test for the length of one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

from spinetta import agent, attempt, bids, claims, holdings, lifecycle, match, mirror, recover, session, txn
from spinetta.agent import Agent
from spinetta.events import List
from spinetta.model import Reason, Revision, State
from spinetta.standing import Rights
from tests.sim.enumerated import guards
from tests.sim.shim_model import Process, ShimModel

Mutant = Callable[[], Any]


def drop_guards(function: str, *indexes: int) -> Mutant:
    """The transaction, or the guards common to a batch, without these; ``Class.method`` for all that it guards."""
    cls, _, method = function.rpartition(".")
    where: Any = getattr(txn, cls) if cls else txn
    real = getattr(where, method)

    def weakened(*args: Any, **kwargs: Any) -> Any:
        made: Any = real(*args, **kwargs)
        when = made.when if isinstance(made, txn.Txn) else made
        kept = tuple(g for i, g in enumerate(when) if i not in indexes)
        return replace(made, when=kept) if isinstance(made, txn.Txn) else kept

    return lambda: mock.patch.object(where, method, weakened)


def drop_outer(size: int, *indexes: int) -> Mutant:
    """A batch without these of its common guards, told by how many there are: two before ends, four before claims."""
    real = txn.batch

    def weakened(nested: Any, when: Any = ()) -> txn.Txn:
        kept = tuple(g for i, g in enumerate(when) if i not in indexes) if len(when) == size else when
        return real(nested, kept)

    return lambda: mock.patch.object(txn, "batch", weakened)


def put(where: Any, name: str, what: Any) -> Mutant:
    """Something else in the place of a function."""
    return lambda: mock.patch.object(where, name, what, create=True)  # attributes of instances, too


@contextmanager
def _shim_with(flag: str) -> Iterator[None]:
    real = ShimModel.__init__

    def init(self: ShimModel, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        setattr(self, flag, False)

    with mock.patch.object(ShimModel, "__init__", init):
        yield


def _deadline_without_margin(self: ShimModel, process: Process) -> float:
    return float("-inf") if self.renewed_at_s is None else self.renewed_at_s + process.grace_s


@contextmanager
def _renewed_when_answered() -> Iterator[None]:
    """A renewal counts from when it was answered, not from when it was sent."""
    real = session.Session._renewed

    def renewed(self: session.Session, done: Any, now: float) -> Any:
        self._renewing_since_s = now
        return real(self, done, now)

    with mock.patch.object(session.Session, "_renewed", renewed):
        yield


@contextmanager
def _forgetful() -> Iterator[None]:
    """A daemon that believes to have had no life before."""
    real = Agent.__init__

    def init(self: Agent, settings: Any, incarnation: Any = None) -> None:
        real(self, settings, None)

    with mock.patch.object(Agent, "__init__", init):
        yield


@contextmanager
def _renew_unanswered() -> Iterator[None]:
    """No answer to a renewal is taken for a yes."""
    real = session.Session._renewed

    def renewed(self: session.Session, done: Any, now: float) -> Any:
        if done.result is None:
            done = replace(done, result=txn.Committed(Revision(1)))
        return real(self, done, now)

    with mock.patch.object(session.Session, "_renewed", renewed):
        yield


@contextmanager
def _unknown_is_no() -> Iterator[None]:
    """No answer to a claim is taken for a no."""
    real = claims.Claims.answered

    def answered(self: claims.Claims, done: Any, now: float, held: Any) -> bool:
        if done.result is None:
            self._abandon()
            return True
        return real(self, done, now, held)

    with mock.patch.object(claims.Claims, "answered", answered):
        yield


@contextmanager
def _finish_unknown_is_yes() -> Iterator[None]:
    """No answer to the record of an end is taken for a yes."""
    real = holdings.Holdings.finished

    def finished(self: holdings.Holdings, done: Any, now: float) -> Any:
        if done.result is None:
            done = replace(done, result=txn.Committed(Revision(1), (True,) * len(self._finishing)))
        return real(self, done, now)

    with mock.patch.object(holdings.Holdings, "finished", finished):
        yield


@contextmanager
def _not_answered_is_not_started() -> Iterator[None]:
    """No answer to a start is taken for a no."""
    real = holdings.Holdings.started

    def started(self: holdings.Holdings, done: Any, now: float) -> Any:
        effects = real(self, done, now)
        self._runtime._unsure.clear()
        return effects

    with mock.patch.object(holdings.Holdings, "started", started):
        yield


@contextmanager
def _no_resume() -> Iterator[None]:
    """A new daemon goes on without shutting out the one before."""
    real = session.Session.__init__

    def init(self: session.Session, *args: Any) -> None:
        real(self, *args)
        self._resumed = True

    with mock.patch.object(session.Session, "__init__", init):
        yield


@contextmanager
def _blind_to_labels() -> Iterator[None]:
    """Nobody looks at what a node is cleared for."""
    with ExitStack() as patches:
        for module in (match, bids, claims, attempt):
            patches.enter_context(mock.patch.object(module, "uncleared", return_value=[]))
        yield


@contextmanager
def _blind_to_needs() -> Iterator[None]:
    """Nobody looks at what a node allows."""
    with ExitStack() as patches:
        for module in (match, claims):
            patches.enter_context(mock.patch.object(module, "refusals", return_value=[]))
        yield


@contextmanager
def _no_row(state: State, event: lifecycle.Event) -> Iterator[None]:
    rows = {k: v for k, v in lifecycle.TRANSITIONS.items() if k != (state, event)}
    with mock.patch.object(lifecycle, "TRANSITIONS", rows):
        yield


def no_row(state: State, event: lifecycle.Event) -> Mutant:
    """The table of transitions without one row."""
    return lambda: _no_row(state, event)


_GIVEN_UP = (session.Phase.FENCED, session.Phase.WAITING)
_real_rights = Agent._rights


def _leads_on(self: Agent) -> Rights:
    """A leader that does not mind having been thrown out."""
    return replace(_real_rights(self), may_lead=True)


def _revoked_unknown(self: Agent) -> Rights:
    """A leader that takes those who were thrown out for dead like others."""
    return replace(_real_rights(self), revoked=frozenset())


def _reasons(*losses: Reason) -> frozenset[Reason]:
    return frozenset(losses)


MUTANTS: dict[str, Mutant] = {
    # guards: each by itself, and some that stand behind one another together
    **{g.name: drop_guards(g.owner, g.index) for g in guards() if " each" not in g.owner},
    "claims-outer[0]": drop_outer(4, 0),
    "claims-outer[0,1]": drop_outer(4, 0, 1),
    "claims-outer[3]": drop_outer(4, 3),
    "claims-outer[0,3]": drop_outer(4, 0, 3),
    "register[0,1]": drop_guards("register", 0, 1),
    "renew[0,1]": drop_guards("renew", 0, 1),
    "Registration.guards[0,1]": drop_guards("Registration.guards", 0, 1),
    "Registration.guards[0,3]": drop_guards("Registration.guards", 0, 3),
    # the dead-man's switch and the wait
    "deaf-shim": lambda: _shim_with("obeys_deadline"),
    "late-start": lambda: _shim_with("refuses_late"),
    "no-kill-margin": put(ShimModel, "deadline_s", _deadline_without_margin),
    "renewed-when-answered": _renewed_when_answered,
    "office-for-ever": put(recover.Leadership, "_office_until_s", property(lambda _: float("inf"), lambda *_: None)),
    "no-wait": put(recover, "wait_out_s", lambda *_: 0.0),
    "short-wait": put(recover, "wait_out_s", lambda grace_s, *_: grace_s / 2),
    "wait-without-rho": put(recover, "wait_out_s", lambda grace_s, margin_s, _: grace_s + margin_s),
    "wait-without-margin": put(recover, "wait_out_s", lambda grace_s, _, rho: grace_s * (1 + rho)),
    "wait-for-the-grace-only": put(recover, "wait_out_s", lambda grace_s, *_: grace_s),
    "renew-unanswered": _renew_unanswered,
    # rows of the table
    **{
        f"row {state.name} {event.value}": no_row(state, event)
        for state, event in lifecycle.TRANSITIONS
        if state is not State.BLOCKED
    },
    "no-losses": put(lifecycle, "_LOSSES", _reasons()),
    # unknown taken for an answer
    "claim-unknown-is-no": _unknown_is_no,
    "finish-unknown-is-yes": _finish_unknown_is_yes,
    "start-unknown-is-no": _not_answered_is_not_started,
    # pieces of reasoning
    "no-resume": _no_resume,
    "start-on-old-listing": put(Agent, "_may_start", property(lambda self: self.session.may_start)),
    "blind-to-labels": _blind_to_labels,
    "blind-to-needs": _blind_to_needs,
    "needs-as-hinted": put(claims, "refusals", lambda *_: []),
    "claims-as-planned": put(claims.Claims, "_claimable", lambda _self, task: task.state is State.QUEUED),
    "doubts-as-planned": put(bids.Bid, "is_covered_by", lambda *_: True),
    "labels-stay": put(attempt.Held, "barred", lambda *_: None),
    "revoked-goes-on": put(session.Session, "must_stop", property(lambda self: self.phase in _GIVEN_UP)),
    "leads-on": put(agent.Agent, "_rights", lambda self: _leads_on(self)),
    "braked-by-the-revoked": put(agent.Agent, "_rights", lambda self: _revoked_unknown(self)),
    "no-fresh-listing": put(txn.Registration, "since", Revision(0)),
    "forgetful-daemon": _forgetful,
    "no-must-stop": put(session.Session, "must_stop", False),
    "always-nothing-runs": put(holdings.Holdings, "nothing_runs", True),
    "late-news": put(holdings.Holdings, "_drop", lambda self, h: self.held.pop(h.task_id)),
    "no-reconcile": put(mirror.Mirror, "poll", lambda self, now: _poll_once(self, now)),
    "promises-forgotten": put(session.Session, "promised", property(lambda _: frozenset(), lambda *_: None)),
    "images-for-ever": put(lifecycle, "_is_excused", lambda _, reached: reached is not lifecycle.Reached.EXECUTING),
    "lives-go-on": put(claims.Claims, "life_ended", lambda _self: None),
}


def _poll_once(self: mirror.Mirror, now: float) -> list[Any]:
    """A mirror that lists after a loss only."""
    if self.next_s is None or self.next_s > now:
        return []
    if self._watching:
        self._list_at_s = now + 1000.0
        return []
    self._listing = True
    self._pausing = False
    self._recent.clear()
    return [List(self.tag, self.prefix)]
