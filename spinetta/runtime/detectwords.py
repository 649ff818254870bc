"""What was seen of a machine's ways to run containers, as findings: what is missing, what it weakens, how to mend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spinetta import ociprograms
from spinetta.checkup import Finding, Level, ok
from spinetta.ociprograms import ID_COUNT, HostIds, Program
from spinetta.runtime.groups import Groups

NO_CONTAINERS = "tasks that name an image are not taken here"
Facts = Mapping[str, Any]
_NO_IDS = f"this user namespace has no {ID_COUNT} ids for containers behind that of its root"
_NO_IDS_MEND = "start it with more: unshare --map-users=FIRST,1,65536, with FIRST from /etc/subuid; see docs/doctor.md"


@dataclass(frozen=True, slots=True)
class Seen:
    """What was looked at before anything was tried.

    Attributes:
        wanted: the setting: auto, runc, crun or a path.
        found: programs that say what they are; unusable: in words, why others are not used.
        inits: paths of inits that may serve.
        uids, gids: the ids meant for containers; None: a user without root has none of its own.
        subuids: all of /etc/subuid.
        newuidmap: it and newgidmap are there.
        userns_settings: of the kernel, by name.
        fuse_overlayfs: its path.
    """

    wanted: str
    data_dir: str
    user: str
    rootless: bool
    groups: Groups
    found: tuple[Program, ...]
    unusable: tuple[str, ...]
    inits: tuple[str, ...]
    uids: HostIds | None
    gids: HostIds | None
    subuids: tuple[HostIds, ...]
    newuidmap: bool
    userns_settings: Mapping[str, str]
    fuse_overlayfs: str


def findings_of(seen: Seen, facts: Facts, best: Facts, ran: Facts, chosen: Program | None) -> tuple[Finding, ...]:
    """All of it. `best`: of the namespaces that came furthest; `ran`: of the program that ran a container; or empty."""
    return (
        *_runtime(seen, facts, best, ran, chosen),
        _init(seen, ran),
        *_namespaces(seen, facts, best),
        *_ids(seen, facts, best, ran),
        *_overlay(seen, best),
        *_cgroups(seen, ran),
    )


def _runtime(seen: Seen, facts: Facts, best: Facts, ran: Facts, chosen: Program | None) -> list[Finding]:
    if chosen is not None:
        how = "without root, " if seen.rootless else ""
        text = f"{chosen.name} ({chosen.path}) ran a container {how}in {ran['seconds'] * 1000:.0f} ms"
        found = [ok("runtime", text)]
        found += [
            Finding(
                "runtime", Level.WARNING, why, "what a malicious image or task may try is one layer from the machine",
                "install runc 1.2.8, 1.3.3 or newer, or crun; --container-program PATH names one that is not on PATH",
            )
            for why in ociprograms.program_warnings(chosen)
        ]  # fmt: skip
        notes = [*seen.unusable, *problems_of({"tried": [best]})]
        found += [Finding("runtime", Level.NOTE, why) for why in notes]
        return [*found, *_node_without_root(seen)]
    if not seen.found:
        why = "; ".join(seen.unusable) or "there is neither runc nor crun"
        return [Finding("runtime", Level.WARNING, why, NO_CONTAINERS, "apt install runc (or crun)")]
    if not seen.rootless and seen.uids is None:
        return [Finding("runtime", Level.WARNING, f"not tried: {_NO_IDS}", NO_CONTAINERS, _NO_IDS_MEND)]
    reasons = [*seen.unusable, *problems_of(facts)]
    mend = "apt install runc" if not any(p.kind == ociprograms.RUNC for p in seen.found) else _mend_of(reasons, seen)
    text = "no container could be run: " + ("; ".join(reasons) or "it is not known why")
    return [Finding("runtime", Level.WARNING, text, NO_CONTAINERS, mend)]


def _node_without_root(seen: Seen) -> list[Finding]:
    """What a node needs beyond what a trial does: the shim finds and ends containers by their groups, as root."""
    if not seen.groups.trial_path:
        return [
            Finding(
                "runtime", Level.WARNING, "a node can make no control groups here, by which it would find containers",
                NO_CONTAINERS, _cgroup_mend(seen),
            )
        ]  # fmt: skip
    if not seen.rootless:
        return []
    if seen.uids is None or seen.gids is None:
        mend = "get ids for containers first, see ids below; then the doctor tells how to start it"
    else:
        mend = f"start it as root of one: {namespace_command(seen.uids, seen.gids)} spinetta node join"
    words = "a node runs containers as root only, if only of a user namespace with ids of its own"
    return [Finding("runtime", Level.WARNING, words, NO_CONTAINERS, mend)]


def namespace_command(uids: HostIds, gids: HostIds) -> str:
    """What makes a user root of a namespace, with its range of ids behind it."""
    ids = f"--map-users={uids.first},1,{uids.count} --map-groups={gids.first},1,{gids.count}"
    return f"unshare --user --mount --map-root-user {ids}"


def problems_of(facts: Facts) -> list[str]:
    """What went wrong in the trials, each thing once."""
    found = [facts["problem"]] if facts.get("problem") else []
    for tried in facts.get("tried", ()):
        if tried.get("refused"):
            found.append(tried["refused"])
        found += [f"{p['program']}: {p['problem']}" for p in tried.get("programs", ()) if p["problem"]]
    return list(dict.fromkeys(found))


def _mend_of(reasons: Sequence[str], seen: Seen) -> str:
    text = " ".join(reasons)
    if not seen.inits:
        return "apt install tini"
    if "hybrid" in text and "runc" not in text:
        return "apt install runc"
    if "namespace" in text or "map of ids" in text or "unshare" in text:
        return _userns_mend(seen)
    return "run the same by hand and see: runc --debug run"


def _init(seen: Seen, ran: Facts) -> Finding:
    if ran:
        return ok("init", f"{ran['init']} ran as process 1 of a container")
    mend = "apt install tini (or Docker's docker-init, or catatonit)"
    if not seen.inits:
        return Finding("init", Level.WARNING, "there is no static init for containers", NO_CONTAINERS, mend)
    return Finding("init", Level.NOTE, f"{', '.join(seen.inits)}: not tried to the end, as no container could be run")


def _namespaces(seen: Seen, facts: Facts, best: Facts) -> list[Finding]:
    if facts.get("problem"):
        return [Finding("namespaces", Level.WARNING, facts["problem"], NO_CONTAINERS, "see what it says")]
    found = []
    if facts.get("user_namespace"):
        text = f"user namespaces cannot be made: {facts['user_namespace']}{_settings(seen)}"
        found.append(Finding("namespaces", Level.WARNING, text, NO_CONTAINERS, _userns_mend(seen)))
    if not best:
        refused = "; ".join(dict.fromkeys(t["refused"] for t in facts.get("tried", ()) if t.get("refused")))
        if not seen.rootless:
            found.append(
                Finding(
                    "namespaces", Level.WARNING, f"pid and mount namespaces cannot be made: {refused}",
                    "processes that a task detaches may outlive a shim that is killed; no containers",
                    "give the node CAP_SYS_ADMIN: run it as root, in a container with --privileged",
                )
            )  # fmt: skip
        elif not found:
            text = f"user, pid and mount namespaces cannot be used: {refused}{_settings(seen)}"
            found.append(Finding("namespaces", Level.WARNING, text, NO_CONTAINERS, _userns_mend(seen)))
        return found
    if not found:
        found.append(ok("namespaces", "user, pid and mount namespaces can be made"))
    if seen.rootless:
        found.append(
            Finding(
                "namespaces", Level.NOTE, "this user is not root: the pid namespace is one inside a user namespace",
                "plain processes get none: those that a task detaches may outlive a shim that is killed",
                "run the node as root",
            )
        )  # fmt: skip
    return found


def _settings(seen: Seen) -> str:
    """What the kernel is set to that matters here."""
    told = []
    for name, value in seen.userns_settings.items():
        off = "1" if "apparmor" in name else "0"
        if value == off:
            told.append(f"{name} = {value}")
    return f" ({', '.join(told)})" if told else ""


def _userns_mend(seen: Seen) -> str:
    values = seen.userns_settings
    if values.get("user.max_user_namespaces") == "0":
        return "sysctl -w user.max_user_namespaces=15000 (and in /etc/sysctl.d)"
    if values.get("kernel.unprivileged_userns_clone") == "0":
        return "sysctl -w kernel.unprivileged_userns_clone=1 (and in /etc/sysctl.d)"
    if values.get("kernel.apparmor_restrict_unprivileged_userns") == "1":
        return "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 (and in /etc/sysctl.d)"
    return "in a container: run it with --privileged, or with a seccomp profile that allows unshare and mount"


def _ids(seen: Seen, facts: Facts, best: Facts, ran: Facts) -> list[Finding]:
    if not seen.rootless and seen.uids is not None:
        return [_roots_ids(seen, seen.uids)]
    if ran and best.get("mode") == "range":
        first = f"{_first(seen.uids)} and {_first(seen.gids)}"
        return [ok("ids", f"containers have {ID_COUNT} users and groups of their own, from {first} on (newuidmap)")]
    if not seen.rootless:
        return [Finding("ids", Level.WARNING, _NO_IDS, NO_CONTAINERS, _NO_IDS_MEND)]
    own = seen.uids is not None and seen.gids is not None
    refused = [t["refused"] for t in facts.get("tried", ()) if t.get("mode") == "range" and t.get("refused")]
    if refused:
        why, mend = f"the range of ids cannot be used: {refused[0]}", "apt install --reinstall uidmap"
    elif not own:
        why = f"/etc/subuid and /etc/subgid give {seen.user} no {ID_COUNT} ids"
        at = ociprograms.free_range(seen.subuids)
        ids = f"{at}-{at + ID_COUNT - 1}"
        mend = f"usermod --add-subuids {ids} --add-subgids {ids} {seen.user}"
        mend += "" if seen.newuidmap else " && apt install uidmap"
    elif not seen.newuidmap:
        why, mend = "newuidmap and newgidmap are not installed", "apt install uidmap"
    else:
        return [Finding("ids", Level.NOTE, f"{seen.uids} from /etc/subuid: not tried, as no container could be run")]
    return [
        Finding(
            "ids", Level.WARNING, why,
            f"root in a container is {seen.user}, and there is no other user: images with files of several users, and "
            "programs that change their user, do not work",
            mend,
        )
    ]  # fmt: skip


def _first(ids: HostIds | None) -> int:
    return ids.first if ids else 0


def _roots_ids(seen: Seen, ids: HostIds) -> Finding:
    owners = {"root", "spinetta", "0", seen.user}
    others = ociprograms.others_in(seen.subuids, ids, owners)
    text = f"containers have {ID_COUNT} users and groups of their own, from {ids.first} on"
    if not others:
        return ok("ids", text)
    at = ociprograms.free_range(seen.subuids)
    return Finding(
        "ids", Level.WARNING, f"{text}; {', '.join(f'{r.owner} has {r} of them' for r in others[:3])} (/etc/subuid)",
        "what runs in that user's containers and in ours is the same user for the kernel, and may signal and read one "
        "another's",
        f"spinetta node join --container-ids {at}",
    )  # fmt: skip


def _overlay(seen: Seen, best: Facts) -> list[Finding]:
    overlay = best.get("overlay")
    if overlay is None:
        return [Finding("overlay", Level.NOTE, "not tried: no mount namespace could be made")]
    mend = "modprobe overlay" if not seen.rootless else "use Linux 5.11 or newer, where users may mount overlays"
    fuse = f"; {seen.fuse_overlayfs} is there" if seen.fuse_overlayfs else ""
    if overlay["read_only"]:
        return [
            Finding(
                "overlay", Level.WARNING, f"overlays cannot be mounted: {overlay['read_only']}{fuse}",
                "no writable containers, no mounts at places that an image lacks", mend,
            )
        ]  # fmt: skip
    if overlay["writable"]:
        return [
            Finding(
                "overlay", Level.WARNING,
                f"overlays cannot be written to on the file system of {seen.data_dir}: {overlay['writable']}{fuse}",
                "no writable containers here",
                "put the data directory on ext4 or xfs; in a container: on a volume",
            )
        ]  # fmt: skip
    return [ok("overlay", f"read-only and writable overlays can be mounted on the file system of {seen.data_dir}")]


def _cgroups(seen: Seen, ran: Facts) -> list[Finding]:
    groups = seen.groups
    held, missing = ociprograms.limits_held(groups.controllers)
    text = f"{groups.mode}, {', '.join(groups.controllers) or 'no controllers for us'}"
    found = []
    if missing:
        unmounted = "no cgroups are mounted" if groups.mode == ociprograms.NONE else "there are no others to be had"
        why = "; ".join(groups.problems[:3]) or unmounted
        found.append(
            Finding(
                "cgroups", Level.WARNING, f"{text}: {why}",
                f"limits of {', '.join(missing)} are not enforced, and what tasks used is told less exactly; "
                f"{', '.join(held)} are limited all the same",
                _cgroup_mend(seen),
            )
        )  # fmt: skip
    else:
        found.append(ok("cgroups", text))
    if ran and ran["groups"]:
        found.append(
            Finding(
                "cgroups", Level.WARNING, f"a container does not join a group that we name: {ran['groups']}",
                "limits of containers are those of their first process's group", "use another --container-program",
            )
        )  # fmt: skip
    return found


def _cgroup_mend(seen: Seen) -> str:
    if seen.groups.mode == ociprograms.NONE:
        return "mount -t cgroup2 none /sys/fs/cgroup"
    if seen.groups.mode != ociprograms.V2:
        return (
            "run the node as root; or boot with systemd.unified_cgroup_hierarchy=1 and put Delegate=yes into its unit"
        )
    if seen.rootless:
        return (
            "systemd-run --user --scope -p Delegate=yes spinetta node join …, or Delegate=yes in the unit of the node"
        )
    return "Delegate=yes in the systemd unit of the node; in a container of Docker: --privileged --cgroupns=private"
