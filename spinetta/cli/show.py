"""Tasks and nodes as rows for people and as documents for programs."""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict
from datetime import datetime
from typing import Any

from spinetta import openfiles, units
from spinetta.cli.contained import advice, container_document, container_lines
from spinetta.cli.used import now_document, now_words, units_words, usage_document, usage_words
from spinetta.client.views import NodeInfo, NodeList, TaskInfo
from spinetta.match import Obstacle, why_never, why_not_now
from spinetta.model import (
    LOSSES_ALLOWED,
    Attempt,
    Outcome,
    QueueHint,
    Reason,
    Resources,
    ShimInfo,
    State,
    Task,
    TaskSpec,
)

SEALED = "(sealed)"

# --- for programs ------------------------------------------------------------------------------------------------


def resources_document(r: Resources) -> dict[str, Any]:
    """An amount of resources."""
    return {
        "cpu_millis": r.cpu_millis,
        "memory_bytes": r.memory_bytes,
        "disk_bytes": r.disk_bytes,
        "countables": dict(r.countables),
    }


def spec_document(s: TaskSpec) -> dict[str, Any]:
    """A specification, in the units of the API."""
    return {
        "id": s.id,
        "name": s.name,
        "command": list(s.command),
        "labels": dict(s.labels),
        "env": dict(s.env),
        "working_directory": s.working_directory,
        "resources": resources_document(s.resources),
        "walltime_s": s.walltime_s,
        "tags_required": list(s.tags_required),
        "tags_forbidden": list(s.tags_forbidden),
        "priority": s.priority,
        "retries": s.retries,
        "retry_backoff_s": s.retry_backoff_s,
        "restart_on_node_failure": s.restart_on_node_failure,
        "owner": s.owner,
        "grace_s": s.grace_s,
        "overlap": s.overlap,
        "losses_allowed": s.losses_allowed,
        "clearance": list(s.clearance),
        "sealed": s.sealed is not None,
        "secrets": [{"name": name, "file": file} for name, file in s.secrets],
        "container": container_document(s.container) if s.container is not None else None,
        "keep_scratch_s": s.keep_scratch_s,
        "open_files_max": s.open_files_max,
    }


def attempt_document(a: Attempt) -> dict[str, Any]:
    """One attempt. Times in milliseconds since 1970."""
    return {
        "number": a.number,
        "node": a.node,
        "incarnation": a.incarnation,
        "token": a.token,
        "started_ms": a.started_ms,
        "ended_ms": a.ended_ms,
        "outcome": outcome_word(a.outcome),
        "exit_code": a.exit_code,
        "signal": a.signal,
        "reason": a.reason,
        "message": a.message,
        "usage": usage_document(a.usage),
    }


def task_document(info: TaskInfo) -> dict[str, Any]:
    """A task. `exit_code` and `signal` are those of the latest attempt once the task has ended."""
    t = info.task
    last = last_attempt(t)
    ended = t.state is State.COMPLETE and last is not None
    return {
        "id": t.spec.id,
        "name": t.spec.name,
        "state": t.state.name.lower(),
        "outcome": outcome_word(t.outcome),
        "reason": t.reason,
        "message": t.message,
        "node": info.node,
        "exit_code": last.exit_code if last and ended else None,
        "signal": last.signal if last and ended else 0,
        "cancel_requested": info.cancel_requested,
        "attempts_started": t.attempts_started,
        "failures": t.failures,
        "losses": t.losses,
        "losses_excused": t.losses_excused,
        "losses_preparing": t.losses_preparing,
        "submitted_ms": t.submitted_ms,
        "completed_ms": t.completed_ms,
        "submitted_at_node": t.submitted_at_node,
        "revision": info.revision,
        "spec_omitted": info.spec_omitted,
        "withheld": info.withheld,
        "now": now_document(info),
        "spec": spec_document(t.spec),
        "attempts": [attempt_document(a) for a in t.attempts],
    }


def shim_words(shim: ShimInfo) -> str:
    """One of a node's shims: how old it is, what code, and what keeps it."""
    parts = [f"version {shim.release}" if shim.release else "", f"code {shim.code}" if shim.code else "older code"]
    if shim.started_ms:
        parts.append(f"started {age(shim.started_ms)} ago")
    if not shim.retiring:
        return ", ".join(part for part in parts if part)
    left = [f"{shim.attempts} attempt{'' if shim.attempts == 1 else 's'}", *shim.services]
    return f"retiring with {' and '.join(left)}; " + ", ".join(part for part in parts if part)


def node_document(n: NodeInfo) -> dict[str, Any]:
    """A node."""
    r = n.record
    return {
        "name": r.name,
        "address": r.address,
        "status": n.status,
        "voter": n.voter,
        "leader": n.leader,
        "etcd_leader": n.etcd_leader,
        "capacity": resources_document(r.capacity),
        "free": resources_document(r.free),
        "running": r.running,
        "tags": list(r.tags),
        "beat_age_ms": n.beat_age_ms,
        "started_ms": r.started_ms,
        "candidate": r.candidate,
        "incarnation": r.incarnation,
        "boot_id": r.boot_id,
        "etcd_client_url": r.etcd_client_url,
        "etcd_peer_url": r.etcd_peer_url,
        "etcd_member_id": f"{r.etcd_member_id:x}" if r.etcd_member_id else "",
        "runtimes": list(r.runtimes),
        "allows": [word for word in r.allows if openfiles.number_of(word) is None],
        "open_files_max": openfiles.most(r.allows),
        "units": {name: list(labels) for name, labels in r.units},
        "images": list(r.images),
        "images_coming": list(r.images_coming),
        "shims": [asdict(shim) for shim in r.shims],
        "clearances": list(r.clearances),
        "certificate_expires_ms": r.certificate_expires_ms or None,
        "warnings": list(r.warnings),
        "unfit": r.unfit,
        "version": r.version,
    }


def outcome_word(o: Outcome) -> str | None:
    """``succeeded`` and so on; None while there is none."""
    return None if o is Outcome.NONE else o.name.lower()


# --- for people --------------------------------------------------------------------------------------------------

STATE_COLOURS = {
    "pending": "",
    "blocked": "dim",
    "running": "blue",
    "cancelling": "yellow",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
    "lost": "red",
}


def last_attempt(t: Task) -> Attempt | None:
    """The latest attempt that the record keeps."""
    return t.attempts[-1] if t.attempts else None


def state_word(info: TaskInfo) -> str:
    """One word for where a task stands."""
    t = info.task
    if t.state is State.COMPLETE:
        return t.outcome.name.lower()
    if t.state is State.QUEUED:
        return "pending"
    if t.state is State.RUNNING and info.cancel_requested:
        return "cancelling"
    return t.state.name.lower()


def exit_word(info: TaskInfo) -> str:
    """How it ended, shortly: ``0``, ``signal 9``, ``out-of-memory``."""
    t, last = info.task, last_attempt(info.task)
    if t.state is not State.COMPLETE:
        return ""
    if last is None or t.reason not in ("", Reason.EXIT, Reason.SIGNAL):
        return t.reason
    return _exit_of(last) or t.reason


def _exit_of(a: Attempt) -> str:
    if a.signal and (a.exit_code is None or a.reason == Reason.SIGNAL):  # a container's init has a code for it as well
        return f"signal {a.signal}"
    return "" if a.exit_code is None else str(a.exit_code)


def age(ms: int, now_ms: int | None = None) -> str:
    """How long ago, by this machine's clock; empty for never."""
    if not ms:
        return ""
    now = int(time.time() * 1000) if now_ms is None else now_ms
    return units.format_duration(round(max(now - ms, 0) / 1000))


def moment(ms: int) -> str:
    """A time in this machine's zone; empty for never."""
    return datetime.fromtimestamp(ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z") if ms else ""


def run_time(info: TaskInfo, now_ms: int | None = None) -> str:
    """How long the latest attempt has run, or ran."""
    last = last_attempt(info.task)
    if last is None or not last.started_ms:
        return ""
    if last.ended_ms:
        return units.format_duration(max(last.ended_ms - last.started_ms, 0) / 1000)
    return age(last.started_ms, now_ms) if info.task.state is State.RUNNING else ""


def command_line(spec: TaskSpec) -> str:
    """The command as one would type it."""
    return SEALED if is_sealed(spec) else shlex.join(spec.command)


def _command(info: TaskInfo) -> str:
    if info.task.spec.command or is_sealed(info.task.spec):
        return command_line(info.task.spec)
    return "(not yours to see)" if info.withheld else "(too large to be sent)"


def task_name(spec: TaskSpec) -> str:
    """The name given to it, if it can be read."""
    return SEALED if is_sealed(spec) else spec.name


def is_sealed(spec: TaskSpec) -> bool:
    """What it runs can be read on nodes cleared for it only; of others' tasks not even the sealed bytes are sent."""
    return spec.sealed is not None or (bool(spec.clearance) and not spec.command)


def resources_words(r: Resources) -> str:
    """E.g. ``2 cores, 4GiB memory, 1 gpu``; empty for nothing."""
    parts = []
    if r.cpu_millis:
        parts.append(f"{units.format_cpus(r.cpu_millis)} core{'' if r.cpu_millis == 1000 else 's'}")
    if r.memory_bytes:
        parts.append(f"{units.format_bytes(r.memory_bytes)} memory")
    if r.disk_bytes:
        parts.append(f"{units.format_bytes(r.disk_bytes)} disk")
    parts += [f"{n} {name}" for name, n in r.countables]
    return ", ".join(parts)


def task_lines(info: TaskInfo) -> list[tuple[str, str]]:
    """A task in full, as pairs of a heading and text; what says nothing is left out."""
    t, s = info.task, info.task.spec
    pairs = [
        ("Task", s.id),
        ("Name", task_name(s)),
        ("State", state_word(info) + (f" on {info.node}" if t.state is State.RUNNING else "")),
        ("Exit", exit_word(info) + (f" on {info.node}" if info.node and t.state is State.COMPLETE else "")),
        ("Message", t.message),
        ("Command", _command(info)),
        ("Clearance", ", ".join(s.clearance)),
        ("Secrets", ", ".join(name if name == file else f"{name} as {file}" for name, file in s.secrets)),
        ("Labels", ", ".join(f"{k}={v}" for k, v in s.labels)),
        ("Environment", ", ".join(f"{k}={shlex.quote(v)}" for k, v in s.env)),
        ("Directory", s.working_directory),
        *container_lines(s),
        ("Resources", resources_words(s.resources)),
        ("Time limit", units.format_duration(s.walltime_s) if s.walltime_s else ""),
        ("Needs tags", ", ".join(s.tags_required)),
        ("Avoids tags", ", ".join(s.tags_forbidden)),
        ("Priority", str(s.priority) if s.priority else ""),
        ("Retries", _retries(t)),
        ("On node loss", _on_loss(s)),
        ("Grace", units.format_duration(s.grace_s) if s.grace_s else ""),
        ("Owner", s.owner),
        ("Submitted", moment(t.submitted_ms) + (f" at {t.submitted_at_node}" if t.submitted_at_node else "")),
        ("Ended", moment(t.completed_ms)),
        ("Run time", run_time(info)),
    ]
    last = last_attempt(t)
    if last is not None:
        pairs.append(("Used", usage_words(last.usage)))
    pairs.append(("Now", now_words(info)))
    pairs.append(("Given", units_words(info.now.units) if info.now is not None else ""))
    return [(k, v) for k, v in pairs if v.strip()]


def _on_loss(s: TaskSpec) -> str:
    if not s.restart_on_node_failure:
        return "is not started again"
    words = ["is started elsewhere at once, though it may still run"] if s.overlap else []
    if s.losses_allowed != LOSSES_ALLOWED:
        words.append(f"{s.losses_allowed} losses are allowed")
    return ", ".join(words)


def _retries(t: Task) -> str:
    parts = []
    if t.spec.retries:
        parts.append(f"{t.failures} of {t.spec.retries} used" if t.failures <= t.spec.retries else "all used")
    if t.losses:
        parts.append(f"lost {t.losses} time{'s' if t.losses > 1 else ''} with its node")
    return ", ".join(parts)


def why_waiting(info: TaskInfo, nodes: NodeList) -> list[str]:
    """Why a pending task has not started, one reason a line with the nodes it holds for; empty when it does not wait.

    A task that could start somewhere says so: it waits for its back-off, or for a node to get to it. What a lost node
    offers is not known, so it never counts as one that could not run it.
    """
    lines, hopeless = _reasons(info, nodes)
    return ["no node of the cluster can ever run it:", *lines] if hopeless else lines


def why_never_runs(info: TaskInfo, nodes: NodeList) -> list[str]:
    """The same where no node of the cluster can ever run it; else empty."""
    lines, hopeless = _reasons(info, nodes)
    return lines if hopeless else []


def _reasons(info: TaskInfo, nodes: NodeList) -> tuple[list[str], bool]:
    t = info.task
    if t.state is not State.QUEUED:
        return [], False
    hint = QueueHint.of(t.spec)
    found: dict[str, list[str]] = {}
    hopeless = True
    for n in nodes.nodes:
        r = n.record
        if not n.known:
            found.setdefault(f"the node is {n.status}", []).append(r.name)
            hopeless = False
            continue
        never = why_never(hint, r.capacity, frozenset(r.tags), r.clearances, r.allows)
        now = why_not_now(hint, r.free)
        hopeless = hopeless and never is not None
        if never is not None:
            reason = never.detail
            if never.obstacle is Obstacle.NOT_ALLOWED:
                reason += advice(hint, r)
        elif n.status != "ready":
            reason = f"the node is {n.status}"
        elif now is not None:
            reason = f"busy: {now.detail}"
        else:
            reason = _could_start(t)
        found.setdefault(reason, []).append(r.name)
    lines = [f"{', '.join(names)}: {reason}" for reason, names in found.items()]
    return lines, hopeless and bool(lines)


def _could_start(t: Task) -> str:
    if t.failures and t.spec.retry_backoff_s:
        return "free; it has failed and waits for its back-off"
    return "free; the node will take it when its turn comes"


def attempt_rows(t: Task) -> list[tuple[str, ...]]:
    """Rows of the table of attempts: number, node, outcome, exit, run time, used, message."""
    rows: list[tuple[str, ...]] = []
    for a in t.attempts:
        exit_text = _exit_of(a) if a.reason in ("", Reason.EXIT, Reason.SIGNAL) else f"{a.reason}"
        took = units.format_duration(max(a.ended_ms - a.started_ms, 0) / 1000) if a.ended_ms and a.started_ms else ""
        outcome = outcome_word(a.outcome) or ("running" if t.state is State.RUNNING else "")
        rows.append((str(a.number), a.node, outcome, exit_text, took, usage_words(a.usage), a.message))
    return rows
