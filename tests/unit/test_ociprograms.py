"""Versions of runc and crun, which to use, and whose ids are whose."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinetta import ociprograms
from spinetta.ociprograms import AUTO, HYBRID, ID_COUNT, NONE, V1, V2, HostIds, Program, parse_subids

RUNC = Program("/usr/sbin/runc", "runc", (1, 3, 4))
CRUN = Program("/usr/bin/crun", "crun", (1, 8, 1))

RUNC_SAYS = "runc version 1.1.5+ds1\ncommit: 1.1.5+ds1-1+deb12u1\nspec: 1.0.2-dev\ngo: go1.19.8\nlibseccomp: 2.5.4\n"
CRUN_SAYS = "crun version 1.8.1\ncommit: f8a096be\nrundir: /run/crun\nspec: 1.0.0\n+SYSTEMD +SELINUX\n"


@pytest.mark.parametrize(
    ("text", "kind", "version", "candidate"),
    [
        (RUNC_SAYS, "runc", (1, 1, 5), 0),
        (CRUN_SAYS, "crun", (1, 8, 1), 0),
        ("runc version 1.4.0-rc.2\nspec: 1.2.1", "runc", (1, 4, 0), 2),
        ("runc version 1.0.0-rc93", "runc", (1, 0, 0), 93),
        ("crun version 1.25", "crun", (1, 25, 0), 0),
        ("a warning first\nrunc version v1.3.3", "runc", (1, 3, 3), 0),
    ],
)
def test_what_programs_say_of_themselves(text: str, kind: str, version: tuple[int, int, int], candidate: int) -> None:
    found = ociprograms.parse_program("/x", text)
    assert found is not None
    assert (found.kind, found.version, found.candidate) == (kind, version, candidate)


@pytest.mark.parametrize("text", ["", "docker version 20.10", "runc: not found", "runc version", "xrunc version 1.2.3"])
def test_what_is_neither(text: str) -> None:
    assert ociprograms.parse_program("/x", text) is None


@pytest.mark.parametrize(
    ("version", "candidate", "lacks"),
    [
        ((1, 0, 0), 93, True), ((1, 1, 5), 0, True), ((1, 1, 15), 0, True), ((1, 2, 7), 0, True), ((1, 2, 8), 0, False),
        ((1, 2, 9), 0, False), ((1, 3, 0), 0, True), ((1, 3, 2), 0, True), ((1, 3, 3), 0, False), ((1, 4, 0), 1, True),
        ((1, 4, 0), 2, True), ((1, 4, 0), 3, False), ((1, 4, 0), 0, False), ((1, 5, 0), 1, False),
        ((2, 0, 0), 0, False),
    ],
)  # fmt: skip
def test_versions_without_the_fixes(version: tuple[int, int, int], candidate: int, lacks: bool) -> None:
    program = Program("/x", "runc", version, "", candidate)
    assert ociprograms.lacks_fixes(program) is lacks
    assert bool(ociprograms.program_warnings(program)) is lacks
    assert not ociprograms.lacks_fixes(Program("/x", "crun", version, "", candidate))


def test_which_to_try() -> None:
    both = (RUNC, CRUN)
    for mode in (V1, V2, NONE):
        assert ociprograms.candidates(AUTO, both, mode) == ([CRUN, RUNC], [])
    tried, reasons = ociprograms.candidates(AUTO, both, HYBRID)
    assert tried == [RUNC]
    assert reasons == ["crun 1.8.1 refuses a machine with both versions of cgroups at once (hybrid)"]
    assert ociprograms.candidates(AUTO, (CRUN,), HYBRID)[0] == []
    # Who names one wants that one: it is tried, and says itself what is wrong.
    assert ociprograms.candidates("crun", both, HYBRID) == ([CRUN], [])
    assert ociprograms.candidates("runc", both, V2) == ([RUNC], [])
    assert ociprograms.candidates("/opt/my-runtime", (CRUN,), HYBRID) == ([CRUN], [])


MOUNT = "32 31 0:29 / {} rw,relatime - {} {} rw,{}\n"


@pytest.mark.parametrize(
    ("kinds", "mode"),
    [
        ((), NONE),
        (("tmpfs",), NONE),
        (("cgroup",), V1),
        (("cgroup2",), V2),
        (("cgroup", "cgroup", "cgroup2"), HYBRID),
    ],
)
def test_versions_of_cgroups(kinds: tuple[str, ...], mode: str) -> None:
    text = "".join(MOUNT.format(f"/sys/fs/cgroup/{i}", kind, kind, "cpu") for i, kind in enumerate(kinds))
    assert ociprograms.cgroup_mode(f"a line that is none\n{text}") == mode


def test_limits_that_hold() -> None:
    assert ociprograms.limits_held(("memory", "cpu", "pids", "freezer"))[1] == ()
    held, missing = ociprograms.limits_held(("pids",))
    assert missing == ("cpu", "memory")
    assert held == ("pids", "open files", "log size", "scratch size", "walltime")
    assert ociprograms.limits_held(())[1] == ("cpu", "memory", "pids")


SUBUID = "alice:100000:65536\n# remark\nbob:165536:65536\nbob:x:1\n1007:300000:70000\nshort:1:10\n"


def test_lines_of_subuid() -> None:
    ranges = parse_subids(SUBUID)
    assert [(r.owner, r.first, r.count) for r in ranges] == [
        ("alice", 100000, 65536), ("bob", 165536, 65536), ("1007", 300000, 70000), ("short", 1, 10),
    ]  # fmt: skip
    assert ociprograms.own_range(ranges, "bob", 1) == HostIds(165536, ID_COUNT)
    assert ociprograms.own_range(ranges, "carol", 1007) == HostIds(300000, ID_COUNT)
    assert ociprograms.own_range(ranges, "short", 1) is None, "too few of them"
    assert ociprograms.own_range(ranges, "nobody", 65534) is None
    assert str(HostIds(100000, 65536)) == "100000-165535"


def test_ranges_of_others_within_ours() -> None:
    ranges = parse_subids(SUBUID)
    assert [r.owner for r in ociprograms.others_in(ranges, HostIds(160000, 10000), ["root"])] == ["alice", "bob"]
    assert [r.owner for r in ociprograms.others_in(ranges, HostIds(160000, 10000), ["alice"])] == ["bob"]
    assert ociprograms.others_in(ranges, HostIds(231072, 65536), ["root"]) == ()
    assert ociprograms.others_in(ranges, HostIds(1_000_000, 65536), ["root"]) == ()


def test_ids_in_a_user_namespace() -> None:
    everything = ociprograms.mapped("         0          0 4294967295\n")
    wanted = HostIds(1_000_000, ID_COUNT)
    assert ociprograms.range_within(everything, wanted) == wanted
    nested = ociprograms.mapped("         0      64123          1\n         1    2000000      65536\n")
    assert nested == (HostIds(0, 65537),)
    assert ociprograms.range_within(nested, wanted) == HostIds(1, ID_COUNT)
    assert ociprograms.range_within(ociprograms.mapped("0 100000 65536"), wanted) is None, "0 is taken by root"
    assert ociprograms.range_within(ociprograms.mapped("0 1000 1"), wanted) is None
    assert ociprograms.mapped("not a map\n") == ()
    apart = ociprograms.mapped("0 1000 1\n200000 300000 70000\n")
    assert ociprograms.range_within(apart, wanted) == HostIds(200_000, ID_COUNT)


RANGES = st.lists(st.builds(HostIds, st.integers(0, 3_000_000), st.integers(1, 200_000)), max_size=12)


@given(RANGES)
def test_a_free_range_is_nobodys(ranges: list[HostIds]) -> None:
    free = HostIds(ociprograms.free_range(ranges), ID_COUNT)
    assert free.first >= 1_000_000
    assert not any(r.overlaps(free) for r in ranges)
