"""``docs/guards.md``: each guard, deadline and row of the table, what it keeps from happening, and what notices when it
is taken away. Written by ``python -m tests.sim --guards``; a guard of `spinetta.txn` without a line here is an error.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from spinetta import lifecycle, txn
from tests.sim.enumerated import Found, guards
from tests.sim.mutants import MUTANTS
from tests.sim.noticed import NOTICED, TOLD, UNNOTICED
from tests.unit.test_txn import CASES

REGISTRATION, OFFICE = "Registration.guards", "OfficeHeld.guards"
# What would happen without it. Guards that come with a registration or an office are told once, with these.
WHY: dict[str, str] = {
    f"{REGISTRATION}[0]": "a node whose lease ran out goes on claiming and renewing while the leader gives it up",
    f"{REGISTRATION}[1]": "a condemned life renews itself, and claims what will be put back under it; a dead daemon's "
    "requests commit after the next one has looked",
    f"{REGISTRATION}[2]": "a node goes on after the cluster was restored from a backup that knows nothing of it",
    f"{REGISTRATION}[3]": "a node that was thrown out, or lost a label, still claims",
    f"{OFFICE}[0]": "a leader that lost the office goes on judging, beside the next one",
    f"{OFFICE}[1]": "a leader that was thrown out goes on judging",
    "submit[0]": "a submit made again overwrites a task that is queued, runs or has ended",
    "claim[0]": "two nodes take one task, or one takes what was cancelled",
    "finish[0]": "a fenced attempt records an end over the one that runs now",
    "give_back[0]": "a request to cancel that came meanwhile is lost, and the task runs again",
    "cancel_waiting[0]": "a task that was just taken is called cancelled, and executes",
    "cancel_running[0]": "a request is written for an attempt that is over: a key that nobody holds",
    "finish_guards[0]": "what a dead daemon had under way is recorded once the next one has started it again",
    "finish_guards[1]": "a result of a node that was thrown out counts",
    "register[0]": "two machines live under one name",
    "register[1]": "a new life begins before the tasks of the one before were put back",
    "register[2]": "a node registers with a cluster that was restored meanwhile",
    "register[3]": "a node registers under rights that were taken away while it did",
    "reattach[0]": "a node takes the name of one that is alive",
    "reattach[1]": "a node goes on with a life that was condemned meanwhile",
    "reattach[2]": "a node goes on in a cluster that was restored meanwhile",
    "reattach[3]": "a node goes on under rights that were taken away while it did",
    "concede[0]": "a node reports another life dead than the one it has looked at",
    "concede[1]": "the word of a node that was thrown out shortens the wait for its tasks",
    "confirm_dead[0]": "an administrator's word ends a node that has come back",
    "confirm_dead[1]": "an administrator's word ends another life than the one that was looked at",
    "confirm_dead[2]": "somebody vouches whose rights were taken away meanwhile",
    "deregister[4]": "a node leaves, and what it holds waits for ever",
    "take_office[0]": "two leaders at once",
    "take_office[1]": "one that was thrown out on its way into office gets there",
    "resign[0]": "a former leader puts its successor out of office",
    "condemn[2]": "a node that is alive is given up",
    "condemn[3]": "a life is condemned other than the one whose absence was seen",
    "requeue_guards[2]": "tasks are taken from a life that is not the one condemned and waited for",
    "close[2]": "a life is closed other than the one that was emptied",
    "close[3]": "a life is closed while it holds tasks, which then nobody puts back",
    "collect each[0]": "a task is removed though its record has changed since it was archived",
    "collect each[1]": "a task is removed whose end was written again since it was archived",
    "collect each 2[0]": "it is written at each collection, and a full store, which refuses that, stays full",
}
CASE_OF = {  # where the test of each guard alone goes by another name
    "claim": "claim",
    "finish_guards": "ends in a batch",
    "requeue_guards": "requeue in a batch",
    REGISTRATION: "claims in a batch",
}
TIMES: dict[str, tuple[str, str]] = {
    "deaf-shim": ("the shim kills at renewal + grace - margin", "what a silent node holds runs on, and elsewhere too"),
    "no-kill-margin": ("the kill begins a margin before the grace is over", "a busy machine kills too late"),
    "late-start": ("nothing starts at or after its deadline", "a request to start that was held up starts a second"),
    "renewed-when-answered": ("a renewal counts from before it was sent", "a slow answer lengthens the grace"),
    "renew-unanswered": ("a renewal without an answer counts for nothing", "the grace grows without a renewal"),
    "no-wait": ("the leader waits before it puts back", "the task runs twice at once"),
    "short-wait": ("the leader waits the whole grace", "the task runs twice at once"),
    "wait-for-the-grace-only": ("grace x (1 + rho) + margin, not the grace alone", "the same, with clocks apart"),
    "wait-without-rho": ("the (1 + rho) of that wait", "the same: the margin stands behind it"),
    "wait-without-margin": ("the margin of that wait", "the same: the margin of the kill stands behind it"),
    "office-for-ever": ("a leader counts its own lease", "it judges without office: the guards stand behind it"),
    "no-reconcile": ("what is watched is listed again now and then", "an event that was not told is never known"),
}
REASONING: dict[str, tuple[str, str]] = {
    "claim-unknown-is-no": ("a claim without an answer is looked up", "a task is held that nobody starts"),
    "finish-unknown-is-yes": ("an end without an answer is looked up", "a result is lost"),
    "start-unknown-is-no": ("a start without an answer is looked up", "an attempt is started twice"),
    "start-on-old-listing": ("nothing starts on a listing older than the registration", "what was ended starts again"),
    "no-resume": ("a new daemon shuts out the one before", "its late claims commit, and nobody knows of them"),
    "no-fresh-listing": ("a registration asks for a listing", "a claim in between is not counted"),
    "forgetful-daemon": ("the incarnation is on disk before it is registered", "a restart kills what runs"),
    "no-must-stop": ("a condemned node stops all", "it runs what was put back"),
    "always-nothing-runs": ("only what has stopped is reported dead", "the wait is skipped while processes run"),
    "late-news": ("what is over stays over", "late news of a claim start it again"),
    "promises-forgotten": (
        "what a heartbeat says is not started begins once one without it is committed",
        "a task that took its node down is excused",
    ),
    "images-for-ever": ("losses while an image comes in are excused only so often", "it takes down node after node"),
    "lives-go-on": ("claims end with the life they were made under", "one commits for a life that is over"),
    "no-losses": ("losses of nodes are told from failures", "a dead node uses up the user's retries"),
    "blind-to-labels": ("labels are compared before a claim", "a task runs where it may not"),
    "blind-to-needs": ("what a task needs is compared with what a node allows", "a task has what nobody allowed it"),
    "needs-as-hinted": (
        "needs are looked at again in the record before the claim",
        "the same, by a falsified queue key",
    ),
    "claims-as-planned": ("rights are looked at again before the claim", "a round planned before counts after"),
    "doubts-as-planned": ("and before it is made again", "the same, after a lost answer"),
    "labels-stay": ("what is no longer covered is given back", "it runs on where it may not"),
    "revoked-goes-on": ("a node that was thrown out stops all", "it runs on"),
    "leads-on": ("and does not lead", "it writes though it may not"),
    "braked-by-the-revoked": ("those thrown out do not count as dead", "the brake holds up their tasks"),
}
HEAD = """# Guards

Each guard, deadline and row of the table was taken out of the code in turn, and something noticed: a seed of the
simulator, a story told step by step, or the test that holds each guard alone against the store in which only it fails.
This page is written by `python -m tests.sim --guards`; the tests check that it is up to date, that every guard of
`spinetta/txn.py` is in it, and that what it names still notices.

A seed is run with its fault in the code by `python -m tests.sim --seed SEED --faults KINDS --mutant NAME`, a sweep by
`python -m tests.sim --sweep SEED --strikes STRIKE --mutant NAME`: it notices at one of the points of the sort that is
named. A change of the code may change what a seed tells; then the next one that notices takes its place
(`python -m tests.sim --hunt NAME` looks for it). Many guards stand behind one another, so that it takes two faults and
much bad luck before a world goes wrong without one of them: beside those stands the seed that notices when both are
gone, where there is one.

N stands for the node that writes or is written of, U for the task. Guards of a registration (`Registration.guards`)
and of the office (`OfficeHeld.guards`) are part of all that a member, and the leader, writes.
"""


def document() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_guards(), *_rows(), *_table("Times", TIMES), *_table("Reasoning", REASONING)]) + "\n"


def why(found: Found) -> str:
    """What a guard keeps from happening. Raises `LookupError` for one that nobody has told of."""
    if found.name in WHY:
        return WHY[found.name]
    for common in (REGISTRATION, OFFICE):
        for g in guards():
            if g.owner == common and g.guard == found.guard and _uses(found.owner, common):
                return f"as `{g.name}`"
    raise LookupError(f"tests/sim/guards.py does not tell what {found.name} ({found.text()}) is for")


def _uses(owner: str, common: str) -> bool:
    parameters = inspect.signature(getattr(txn, owner.partition(" each")[0])).parameters.values()
    return any(str(p.annotation) == common.partition(".")[0] for p in parameters)


def _guards() -> Iterator[str]:
    yield "## Guards of transactions\n"
    yield "| guard | it asks | without it | what notices |\n|---|---|---|---|"
    for found in guards():
        yield f"| `{found.name}` | {found.text()} | {why(found)} | {'; '.join(noticed_by(found))} |"


def noticed_by(found: Found) -> Iterator[str]:
    """Seeds, stories and tests that go wrong without a guard, as the page names them."""
    if found.name in NOTICED:
        yield seed_text(found.name)
    else:
        for mutant in sorted(NOTICED, key=lambda m: (len(covered_by(m)), m)):
            if found.name in covered_by(mutant):
                yield f"{seed_text(mutant)} with `{mutant}`"
                break
    if found.name in TOLD:
        yield story_text(found.name)
    case, index = case_of(found)
    if case:
        yield f"`test_txn.py::test_each_guard_is_needed[{case}-{index}]`"


def covered_by(mutant: str) -> set[str]:
    """The guards that a fault takes away, by name."""
    several = re.fullmatch(r"(.+)\[([\d,]+)\]", mutant)
    if mutant.startswith("claims-outer") and several:
        return {f"{REGISTRATION}[{i}]" for i in several[2].split(",")}
    return {f"{several[1]}[{i}]" for i in several[2].split(",")} if several else set()


def case_of(found: Found) -> tuple[str, int]:
    """The case of ``tests/unit/test_txn.py`` for a guard, and which of its guards it is; empty when there is none."""
    name = CASE_OF.get(found.owner, found.owner)
    if found.owner == OFFICE:
        name = "condemn"
    names = {c.name for c in CASES}
    return (name, found.index) if name in names else ("", 0)


def seed_text(mutant: str) -> str:
    """How to see a seed notice."""
    faults, seed = NOTICED[mutant]
    if " at " in faults:
        return f"sweep {seed}, `{faults}`"
    return f"seed {seed}" + (f" (`{faults}`)" if faults else "")


def story_text(mutant: str) -> str:
    """The story that goes wrong."""
    story = TOLD[mutant]
    return f"`{story.__module__.rpartition('.')[2]}.py::{story.__name__}`"


def _rows() -> Iterator[str]:
    yield "\n## Rows of the table of transitions\n"
    yield "Without its row an event is refused, loudly: `lifecycle.after` raises.\n"
    yield "| state | event | leads to | what notices |\n|---|---|---|---|"
    for (state, event), after in lifecycle.TRANSITIONS.items():
        name = f"row {state.name} {event.value}"
        by = seed_text(name) if name in NOTICED else "`test_lifecycle.py` (nothing is blocked yet)"
        yield f"| {state.name} | {event.value} | {after.name} | {by} |"


def _table(title: str, rows: dict[str, tuple[str, str]]) -> Iterator[str]:
    yield f"\n## {title}\n"
    yield "| fault | the rule it breaks | without that | what notices |\n|---|---|---|---|"
    for name, (what, then) in rows.items():
        by = [seed_text(name)] if name in NOTICED else []
        by += [story_text(name)] if name in TOLD else []
        by = by or [f"nothing: {UNNOTICED.get(name, 'nobody knows why')}"]
        yield f"| `{name}` | {what} | {then} | {'; '.join(by)} |"


def missing() -> set[str]:
    """Faults of the code that the page does not tell of."""
    told = {g.name for g in guards()} | set(TIMES) | set(REASONING)
    told |= {f"row {state.name} {event.value}" for state, event in lifecycle.TRANSITIONS}
    return {m for m in MUTANTS if m not in told and not covered_by(m)}
