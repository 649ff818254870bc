"""Tests that there are anyway, run inside a machine of another kind, and what is to be said of how they went."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from tests.contract.containers import CRUN, RUNC
from tests.machines.machine import Done, Machine, ran

REPORT = "/tmp/junit.xml"
TEST_S = 170  # each one inside; several times what it takes elsewhere: a system call costs fifty times as much there
SHOWN_CHARS = 12_000
PROGRAM = "SPINETTA_TEST_CONTAINER_PROGRAM"


@dataclass(frozen=True)
class Chosen:
    """Which tests in which machine.

    Attributes:
        name: of this run.
        machine: its kind.
        tests: their names as pytest takes them, or more arguments of it.
        passing: so many must pass, or something is not as it was when this was written.
        limit_s: for the machine.
        program: what runs containers; empty: what the node chooses.
        skipped: reasons that are as they should be, as regular expressions.
        usual: one of those that are run always; the others with SPINETTA_MACHINES=all.
    """

    name: str
    machine: Machine
    tests: tuple[str, ...]
    passing: int
    limit_s: float = 420.0
    program: str = ""
    skipped: tuple[str, ...] = ()
    usual: bool = True
    env: Mapping[str, str] = field(default_factory=dict)


def argv(chosen: Sequence[str]) -> list[str]:
    """A command that runs them, one after the other: the machine has one processor."""
    return [
        sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", "--tb=short", f"--timeout={TEST_S}",
        "--durations=8", f"--junitxml={REPORT}", *chosen,
    ]  # fmt: skip


def problems_of(chosen: Chosen, done: Done) -> list[str]:
    """What is wrong with a run; nothing when all is well."""
    report = done.files / Path(REPORT).name
    if done.status is None:
        return [f"the machine did not come to its end within {chosen.limit_s:g} s"]
    if not report.exists():
        return [f"pytest ended with {done.status} and left no report"]
    found, passed = [], 0
    for case in ElementTree.parse(report).getroot().iter("testcase"):  # noqa: S314 - our own
        name = f"{case.get('classname')}::{case.get('name')}"
        bad = [child.get("message") or child.tag for child in case if child.tag in ("failure", "error")]
        skips = [child.get("message") or "" for child in case if child.tag == "skipped"]
        found += [f"{name}: {words.splitlines()[0] if words else ''}" for words in bad]
        unknown = [why for why in skips if not any(re.search(known, why) for known in chosen.skipped)]
        found += [f"{name} is skipped there: {why}" for why in unknown]
        passed += not bad and not skips
    if passed < chosen.passing:
        found.append(f"only {passed} tests passed; there should be {chosen.passing}")
    if done.status != 0 and not found:
        found.append(f"pytest ended with {done.status}")
    return found


def run(chosen: Chosen) -> None:
    """Run them. AssertionError: with what pytest said inside."""
    env = {**chosen.env, **({PROGRAM: chosen.program} if chosen.program else {})}
    with ran(chosen.machine, argv(chosen.tests), limit_s=chosen.limit_s, env=env, fetched=[REPORT]) as done:
        problems = problems_of(chosen, done)
        said = done.output[-SHOWN_CHARS:] if done.output else done.console[-SHOWN_CHARS:]
        assert not problems, "\n".join([f"{chosen.name}, after {done.seconds:.0f} s:", *problems, said])


_CONTRACT = "tests/contract/test_"
LIMITS = (
    f"{_CONTRACT}runtime_limits.py::test_this_machine_has_all_that_the_tests_below_need",
    f"{_CONTRACT}runtime_limits.py::test_memory[namespace]",
    f"{_CONTRACT}runtime_limits.py::test_cpu",
    f"{_CONTRACT}runtime_limits.py::test_less_memory_than_a_start_takes",
)
CONTAINERS = (
    f"{_CONTRACT}limits_containers.py::test_memory_and_processes[namespace]",
    f"{_CONTRACT}limits_containers.py::test_a_cpu_quota_and_what_is_used_now",
    f"{_CONTRACT}containers.py::test_a_shim_that_dies_takes_its_containers_along[namespace]",
    f"{_CONTRACT}limits_containers.py::test_less_memory_than_a_start_takes",
)
TERMINAL = f"{_CONTRACT}exec_containers.py::test_with_a_terminal"  # of a crun that does not pass its size on
# Where the runtime is in no group of the attempt's.
LINGERING = f"{_CONTRACT}containers_made.py::test_a_command_whose_runtime_does_not_end_is_stopped[namespace]"
INNER = "tests/machines/inner.py::test_"
GONE = f"{INNER}a_process_that_has_gone_while_its_session_goes_on"
V1, V2, HYBRID = Machine("v1"), Machine("v2"), Machine("hybrid")
DELEGATED = Machine("v2", delegated=True)
USER = Machine("v2", delegated=True, user=True)
_ALL = tuple(
    f"{_CONTRACT}{name}.py"
    for name in (
        *("runtime", "runtime_limits", "limits", "limits_containers"),
        *("containers", "containers_made", "exec_containers", "exec"),
    )
)
_WITH_CONTAINERS = tuple(f"{_CONTRACT}{name}.py" for name in ("limits_containers", "containers", "exec_containers"))
# Of these the limits of time are for quicker machines.
_TIMED = "not test_a_container_does_not_outlive_its_deadline and not test_looking_costs_a_small_share"
ESCAPES = ("tests/attacks/test_escapes.py", "tests/attacks/test_cells_hold.py")  # by runc, and by crun
_NOT_THERE = ("no /dev/fuse to grant", "this machine has no network", "this kernel takes all ways for one")
_OTHER_KIND = ("this machine has one version only", "the command waits for its runtime here")
RUNS = (
    Chosen("version 1", V1, (f"{INNER}version_1", *LIMITS, *CONTAINERS, LINGERING), passing=10),
    Chosen("version 2, crun", V2, (f"{INNER}version_2", *LIMITS, *CONTAINERS, TERMINAL), passing=10, program=CRUN),
    Chosen("version 2, runc", V2, (*CONTAINERS[:1], GONE), passing=2, program=RUNC),
    Chosen("version 2, delegated to a user", USER, (f"{INNER}a_user_with_a_delegated_group", *LIMITS[1:]), passing=4),
    Chosen("version 2, a node without root", V2, ("tests/cluster/test_rootless.py",), passing=1),
    Chosen("version 1, a user", Machine("v1", user=True), (f"{INNER}a_user_with_nothing_delegated",), 1, usual=False),
    Chosen("version 2, a user", Machine("v2", user=True), (f"{INNER}a_user_with_nothing_delegated",), 1, usual=False),
    Chosen("both versions", HYBRID, (f"{INNER}both_versions", CONTAINERS[0]), passing=2, usual=False),
    Chosen("version 2, delegated to root", DELEGATED, CONTAINERS, passing=4, program=CRUN, usual=False),
    Chosen("the runtimes on version 1", V1, (f"{_CONTRACT}runtimes.py",), passing=40, limit_s=1200, usual=False),
    Chosen("the runtimes on version 2", V2, (f"{_CONTRACT}runtimes.py",), passing=40, limit_s=1200, usual=False),
    Chosen("ways out, on version 1", V1, ESCAPES, passing=88, limit_s=1200, skipped=_NOT_THERE, usual=False),
    Chosen("ways out, on version 2", V2, ESCAPES, passing=88, limit_s=1200, skipped=_NOT_THERE, usual=False),
    Chosen(
        "all on version 1", V1, (*_ALL, "-k", _TIMED), passing=100, limit_s=1800, skipped=_OTHER_KIND, usual=False
    ),
    Chosen(
        "all on version 2 with crun", V2, (*_ALL, "-k", _TIMED), passing=100, limit_s=1800,
        program=CRUN, skipped=_OTHER_KIND, usual=False,
    ),
    Chosen(
        "containers on version 2 with runc", V2, (*_WITH_CONTAINERS, "-k", _TIMED), passing=30, limit_s=1200,
        program=RUNC, skipped=_OTHER_KIND, usual=False,
    ),
)  # fmt: skip
