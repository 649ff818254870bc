"""What containers can do on this machine: found out by trials, and told with what to do about what is missing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinetta import ociprograms
from spinetta.checkup import Finding
from spinetta.ociprograms import CRUN, ID_COUNT, RUNC, HostIds, Program
from spinetta.runtime.detectwords import Seen, findings_of
from spinetta.runtime.groups import Groups, look_at_groups

TRIAL_S = 60.0  # for all of them; a third of a second where nothing is wrong, ten times that on a busy machine
VERSION_S = 20.0
VERSION_BYTES_MAX = 4096
GROUPS_GONE_S = 2.0
DEFAULT_FIRST_ID = 1_000_000  # for root, when /etc/subuid says nothing; far above what people have
USUAL_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # of what the programs start in their turn
# Static: it is the only file of a container that may have no libraries.
INITS = ("tini-static", "docker-init", "/usr/libexec/docker/docker-init", "catatonit", "/usr/libexec/podman/catatonit")
_TRIAL = Path(__file__).parent / "trial.py"
SUBIDS_BYTES_MAX = 4 << 20


@dataclass(frozen=True, slots=True)
class ContainerSupport:
    """What was found out.

    Attributes:
        works: a container has run here, to its end, and was removed.
        program: absolute path of the one chosen; empty when none works.
        kind: ``runc`` or ``crun``; version, version_text: of it.
        lacks_fixes: its version is one that needs careful configurations, see `ociprograms.lacks_fixes`.
        init: absolute path of a static init that ran as PID 1 in a container; empty: none.
        rootless: we are not root.
        ids: whose ids containers have. ``range``: 65536 of their own, from `first_uid` and `first_gid` on, so that
            root inside is nobody outside; for a user without root the container is nested in a user namespace made by
            newuidmap, where they are the ids 1 to 65536. ``user``: root inside is our user, and there is no other.
            Empty: no container ran.
        first_uid, first_gid: 0 with ``user``.
        overlay: overlays of several read-only layers can be mounted; overlay_writable: and with an upper layer on the
            data directory's file system.
        user_namespaces, pid_namespaces: can be made.
        cgroup_mode: v1, v2, hybrid or none.
        controllers: of cgroups, in which we can make groups.
        joins_groups: the program has joined a group by its path (else give it none).
        limits: of tasks in containers that hold here, in words; limits_missing: that do not.
        idmapped: whether the data directory's file system can be mounted with other ids; None: not known.
        start_s: how long create, start and delete of the trial took.
        warnings: for the administrator, in words; all that is not as it should be.
        findings: the same in full, with what is well, for `spinetta doctor`.
    """

    works: bool
    program: str
    kind: str
    version: tuple[int, int, int]
    version_text: str
    lacks_fixes: bool
    init: str
    rootless: bool
    ids: str
    first_uid: int
    first_gid: int
    overlay: bool
    overlay_writable: bool
    user_namespaces: bool
    pid_namespaces: bool
    cgroup_mode: str
    controllers: tuple[str, ...]
    joins_groups: bool
    limits: tuple[str, ...]
    limits_missing: tuple[str, ...]
    idmapped: bool | None
    start_s: float
    warnings: tuple[str, ...]
    findings: tuple[Finding, ...]


async def container_support(data_dir: Path, *, program: str = "auto", first_id: int = 0) -> ContainerSupport:
    """Find out, by running a container and mounting overlays, in well under a second; nothing stays.

    Args:
        data_dir: the node's; made later is fine, then the nearest directory above it that exists is used.
        program: auto, runc, crun, or a path.
        first_id: the first of 65536 ids for containers; 0: from /etc/subuid, or for root `DEFAULT_FIRST_ID`.

    What cannot be found out is told as missing. Raises nothing of its own.
    """
    root = os.geteuid() == 0
    groups = look_at_groups()
    found, unusable = await _programs(program)
    tried_programs, refusals = ociprograms.candidates(program, found, groups.mode)
    if groups.crowded:
        spoiling = [p for p in tried_programs if p.kind == CRUN]
        refusals += [f"{p.name} would spoil our control group, which can pass nothing on" for p in spoiling]
        tried_programs = [p for p in tried_programs if p not in spoiling]
    inits = [path for name in INITS if (path := find_program(name))]
    uids, gids = _ids(first_id, root=root)
    if root and not (uids and gids):
        # Its root would be root of the container. That is refused when one is configured, so it is not tried either.
        tried_programs = []
    seen = Seen(
        wanted=program,
        data_dir=str(data_dir),
        user=user_name(),
        rootless=not root,
        groups=groups,
        found=tuple(found),
        unusable=(*unusable, *refusals),
        inits=tuple(inits),
        uids=uids,
        gids=gids,
        subuids=_subids("/etc/subuid"),
        newuidmap=bool(find_program("newuidmap") and find_program("newgidmap")),
        userns_settings=_userns_settings(),
        fuse_overlayfs=find_program("fuse-overlayfs"),
    )
    facts = await _trial(data_dir, seen, tried_programs)
    return support_of(seen, facts, tried_programs)


def support_of(seen: Seen, facts: Mapping[str, Any], programs: Sequence[Program]) -> ContainerSupport:
    """What follows from what was seen and what the trials of `programs` told."""
    tried: list[Mapping[str, Any]] = list(facts.get("tried", ()))
    best: Mapping[str, Any] = {}
    ran: Mapping[str, Any] = {}
    for each in tried:
        if not each.get("refused"):
            best = each
        if works := [p for p in each.get("programs", ()) if not p["problem"]]:
            # In the order they were given, which is that of preference.
            best, ran = each, works[0]
            break
    chosen = next((p for p in programs if p.path == ran.get("program")), None)
    overlay = best.get("overlay", {})
    findings = findings_of(seen, facts, best, ran, chosen)
    joins = bool(ran) and bool(seen.groups.trial_path) and not ran["groups"]
    held, missing = ociprograms.limits_held(seen.groups.controllers)
    ids = "" if not ran else "user" if best["mode"] == "user" else "range"
    return ContainerSupport(
        works=bool(ran),
        program=chosen.path if chosen else "",
        kind=chosen.kind if chosen else "",
        version=chosen.version if chosen else (0, 0, 0),
        version_text=chosen.text if chosen else "",
        lacks_fixes=ociprograms.lacks_fixes(chosen) if chosen else False,
        init=ran.get("init", ""),
        rootless=seen.rootless,
        ids=ids,
        first_uid=seen.uids.first if ids == "range" and seen.uids else 0,
        first_gid=seen.gids.first if ids == "range" and seen.gids else 0,
        overlay=overlay.get("read_only") == "",
        overlay_writable=overlay.get("writable") == "",
        user_namespaces=facts.get("user_namespace") == "",
        pid_namespaces=bool(best),
        cgroup_mode=seen.groups.mode,
        controllers=seen.groups.controllers,
        joins_groups=joins,
        limits=held,
        limits_missing=missing,
        idmapped=None if facts.get("idmapped") is None else facts["idmapped"] == "",
        start_s=float(ran.get("seconds", 0.0)),
        warnings=tuple(
            f"{f.seen}: {f.weakens}" if f.weakens else f.seen for f in findings if f.level >= f.level.WARNING
        ),
        findings=findings,
    )


# --- what is there -----------------------------------------------------------------------------------------------


def find_program(name: str) -> str:
    """The path of a program; empty when there is none.

    On PATH, and in the sbin beside each bin of it: Debian keeps runc there, where ordinary users do not look.
    """
    folders = os.environ.get("PATH", USUAL_PATH).split(os.pathsep)
    path = os.pathsep.join([*folders, *(str(Path(f).with_name("sbin")) for f in folders if Path(f).name == "bin")])
    return os.path.abspath(found) if (found := shutil.which(name, path=path)) else ""  # noqa: PTH100 - keeps links


async def _programs(wanted: str) -> tuple[list[Program], list[str]]:
    """The programs that may be tried, and what is wrong with others."""
    names = (RUNC, CRUN) if wanted == ociprograms.AUTO else (wanted,)
    found, problems = [], []
    for name in names:
        path = find_program(name)
        if not path:
            if wanted != ociprograms.AUTO:
                problems.append(f"there is no program {name}")
            continue
        said = await program_output([path, "--version"])
        if isinstance(said, OSError):
            problems.append(f"{path} cannot be run: {said.strerror}")
        elif (parsed := ociprograms.parse_program(path, said)) is None:
            problems.append(f"{path} is neither runc nor crun: --version printed {said.strip()[:80]!r}")
        else:
            found.append(parsed)
    return found, problems


async def program_output(argv: Sequence[str], *, timeout_s: float = VERSION_S) -> str | OSError:
    """What a program prints, both outputs together and cut, whatever its exit code; or why it does not run."""
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={"PATH": USUAL_PATH, "LANG": "C.UTF-8", "HOME": os.environ.get("HOME", "/")},
        )
    except OSError as error:
        return error
    assert process.stdout is not None  # noqa: S101 - asked for above
    try:
        async with asyncio.timeout(timeout_s):
            data = b""
            while chunk := await process.stdout.read(VERSION_BYTES_MAX - len(data)):  # it may come in pieces
                data += chunk
            await process.wait()
    except TimeoutError:
        return TimeoutError(0, f"did not end within {timeout_s:g} s")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return data.decode(errors="replace")


def _ids(first_id: int, *, root: bool) -> tuple[HostIds | None, HostIds | None]:
    """The ids for containers, of users and of groups; None: a user without root has none."""
    if first_id:
        both = HostIds(first_id, ID_COUNT)
        return both, both
    user = user_name()
    uid = os.geteuid()
    if root:
        maps = [ociprograms.mapped(read_text(f"/proc/self/{kind}_map")) for kind in ("uid", "gid")]
        wanted = HostIds(DEFAULT_FIRST_ID, ID_COUNT)
        if not all(ociprograms.range_within(m, wanted) == wanted for m in maps):
            # In a user namespace there are the ids only that it was given, whatever /etc/subuid says.
            uids, gids = (ociprograms.range_within(m, wanted) for m in maps)
            return (uids, gids) if uids and gids else (None, None)
    found = [ociprograms.own_range(_subids(path), user, uid) for path in ("/etc/subuid", "/etc/subgid")]
    if root and (found[0] is None or found[1] is None or found[0].first != found[1].first):
        service = [ociprograms.own_range(_subids(path), "spinetta", -1) for path in ("/etc/subuid", "/etc/subgid")]
        if service[0] and service[1] and service[0].first == service[1].first:
            return service[0], service[1]
        both = HostIds(DEFAULT_FIRST_ID, ID_COUNT)
        return both, both
    return found[0], found[1]


def user_name() -> str:
    """Of the user that we are; the number when it has no name."""
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _subids(path: str) -> tuple[HostIds, ...]:
    return ociprograms.parse_subids(read_text(path, SUBIDS_BYTES_MAX))


def read_text(path: str | Path, limit_bytes: int = 1 << 20) -> str:
    """A file's text; empty when it is not there or may not be read."""
    try:
        with Path(path).open("rb") as file:
            return file.read(limit_bytes).decode(errors="replace")
    except OSError:
        return ""


def _userns_settings() -> dict[str, str]:
    """Settings of the kernel and of distributions that keep user namespaces away."""
    names = (
        "user/max_user_namespaces",
        "kernel/unprivileged_userns_clone",
        "kernel/apparmor_restrict_unprivileged_userns",
    )
    values = {name.replace("/", "."): read_text(f"/proc/sys/{name}").strip() for name in names}
    return {name: value for name, value in values.items() if value}


# --- the trial ---------------------------------------------------------------------------------------------------


async def _trial(data_dir: Path, seen: Seen, programs: Sequence[Program]) -> dict[str, Any]:
    """What came of the trials; of what could not be tried, ``problem`` says why."""
    groups = seen.groups
    try:
        with _places(data_dir) as (work, bundle):
            want = {
                "work": str(work),
                "bundle": str(bundle),
                "programs": [p.path for p in programs],
                "inits": seen.inits,
                "group_path": groups.trial_path,
                "controllers": groups.controllers,
                "name": groups.trial_name,
                "uids": seen.uids.first if seen.uids else 0,
                "gids": seen.gids.first if seen.gids else 0,
                "count": ID_COUNT,
                "newuidmap": find_program("newuidmap"),
                "newgidmap": find_program("newgidmap"),
                "modes": _modes(seen),
            }
            try:
                return await _run_trial(want)
            finally:
                await asyncio.shield(_remove_groups(groups))
    except OSError as error:
        return {"problem": f"{error.filename or data_dir}: {error.strerror}"}


def _modes(seen: Seen) -> list[str]:
    if not seen.rootless:
        return ["root"] if seen.uids and seen.gids else ["user"]
    return ["range", "user"] if seen.uids and seen.gids and seen.newuidmap else ["user"]


async def _run_trial(want: Mapping[str, Any]) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        "-S",
        "-X",
        "utf8",
        str(_TRIAL),
        json.dumps(want),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": USUAL_PATH, "LANG": "C.UTF-8"},
    )
    try:
        async with asyncio.timeout(TRIAL_S):
            said, errors = await process.communicate()
    except TimeoutError:
        return {"problem": f"the trial of a container did not end within {TRIAL_S:g} s"}
    finally:
        if process.returncode is None:
            process.kill()  # and with it all that it started
            await process.wait()
    try:
        found: dict[str, Any] = json.loads(said)
    except ValueError:
        last = errors.decode(errors="replace").strip().rpartition("\n")[2]
        return {"problem": f"the trial of a container failed: {last[:200] or process.returncode}"}
    return found


@contextlib.contextmanager
def _places(data_dir: Path) -> Iterator[tuple[Path, Path]]:
    """A directory on the data directory's file system, and one to mount on that all may look into; both go again."""
    above = data_dir
    while not above.is_dir() and above != above.parent:
        above = above.parent
    with contextlib.ExitStack() as stack:
        work = Path(tempfile.mkdtemp(prefix=".spinetta-trial-", dir=above))
        stack.callback(_remove_tree, work)
        bundle = Path(tempfile.mkdtemp(prefix="spinetta-trial-"))
        stack.callback(_remove_tree, bundle)
        yield work, bundle


def _remove_tree(folder: Path) -> None:
    # The kernel leaves a directory without any rights in an overlay's work directory.
    for path, folders, _ in os.walk(folder):
        for name in folders:
            with contextlib.suppress(OSError):
                Path(path, name).chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


async def _remove_groups(groups: Groups) -> None:
    """The runtime has removed them, unless it died. A group can go as soon as its processes have."""
    deadline_s = asyncio.get_running_loop().time() + GROUPS_GONE_S
    while groups.remove_trials():
        if asyncio.get_running_loop().time() > deadline_s:
            return
        await asyncio.sleep(0.02)
