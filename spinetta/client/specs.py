"""Task specifications from what people write: the one reading of ``memory="2GiB"`` for Python, command line and task
files."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import uuid6

from spinetta import names, options, units, validate
from spinetta.client.containers import Mounts, container_spec, words
from spinetta.errors import UserError
from spinetta.model import LOSSES_ALLOWED, Resources, TaskId, TaskSpec


class TaskOptions(TypedDict, total=False):
    """The arguments of `make_spec` after the command, for those who pass them on."""

    id: str | None
    name: str
    labels: Mapping[str, str] | Iterable[tuple[str, str]]
    env: Mapping[str, str] | Iterable[tuple[str, str]]
    workdir: str
    cpus: float | str
    memory: int | str
    disk: int | str
    gpu: int
    countables: Mapping[str, int] | str
    time: float | str
    tags: str | Sequence[str]
    not_tags: str | Sequence[str]
    priority: int
    retries: int
    backoff: float | str
    restart: bool
    grace: float | str
    overlap: bool
    losses_allowed: int
    owner: str
    clearance: str | Sequence[str]
    secrets: str | Sequence[str] | Mapping[str, str]
    image: str
    network: str
    writable: bool
    user: str
    capabilities: str | Sequence[str]
    mounts: Mounts
    tmp: int | str
    keep_scratch: float | str
    open_files: int


def new_id() -> TaskId:
    """A fresh id. Ids made one after another in a process are in order."""
    return TaskId(str(uuid6.uuid7()))


def make_spec(
    command: str | Sequence[str],
    *,
    id: str | None = None,  # noqa: A002 - the name it has everywhere
    name: str = "",
    labels: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    env: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    workdir: str = "",
    cpus: float | str = 1,
    memory: int | str = 0,
    disk: int | str = 0,
    gpu: int = 0,
    countables: Mapping[str, int] | str = "",
    time: float | str = 0,
    tags: str | Sequence[str] = (),
    not_tags: str | Sequence[str] = (),
    priority: int = 0,
    retries: int = 0,
    backoff: float | str = 0,
    restart: bool = True,
    grace: float | str = 0,
    overlap: bool = False,
    losses_allowed: int = LOSSES_ALLOWED,
    owner: str = "",
    clearance: str | Sequence[str] = (),
    secrets: str | Sequence[str] | Mapping[str, str] = (),
    image: str = "",
    network: str = "",
    writable: bool = False,
    user: str = "",
    capabilities: str | Sequence[str] = (),
    mounts: Mounts = (),
    tmp: int | str = 0,
    keep_scratch: float | str = 0,
    open_files: int = 0,
) -> TaskSpec:
    """A checked task specification.

    Args:
        command: program and arguments; text is split as a shell would, but no shell is run.
        id: a UUID of version 7; made when not given.
        name: for people; need not be unique.
        labels: key and value pairs to filter by.
        env: environment variables of the process; nothing else is inherited.
        workdir: absolute path; empty: a fresh scratch directory.
        cpus: cores, e.g. ``0.5``, ``2``, ``"1500m"``; a task takes one unless it says otherwise.
        memory, disk: bytes or e.g. ``"2GiB"``.
        gpu: short for ``countables={"gpu": n}``.
        countables: whole things by name, or ``"gpu=1,fpga=2"``.
        time: the longest it may run, seconds or e.g. ``"1h30m"``; 0: no limit.
        tags, not_tags: that the node must, or must not, have; in text with commas between.
        priority: -1000 to 1000, higher first.
        retries: further attempts after a failure of the task itself.
        backoff: before the first retry; doubles with each.
        restart: whether it starts again when its node is lost.
        grace: how long it may run on without contact to the cluster; 0: the cluster's default.
        overlap: two attempts of it at once do no harm: it is started elsewhere as soon as its node is suspected, and
            never ended for want of contact. Its result is still recorded once.
        losses_allowed: how many nodes it may lose while it runs; one more, and it is not started again.
        owner: for people and filters.
        clearance: labels; only nodes cleared for all of them run it, and what it runs is sealed for them.
        secrets: of its owner, given to it as files in the directory that ``$SPINETTA_SECRETS`` names; ``"token"``,
            ``"token=file"``, several, or a mapping from name to file.
        image: of a container to run in: ``docker://HOST/NAME:TAG``, one that the nodes have, or an absolute path on
            the node; empty: a plain process. All up to `tmp` need an image.
        network: ``none`` (loopback only, as when nothing is said), ``host`` or ``bridge``.
        writable: the root file system may be written to; what is written is gone with the attempt.
        user: ``UID``, ``UID:GID`` or ``root``, as the container counts; empty: the image's, unless that is root.
        capabilities: names of Linux capabilities, e.g. ``"SYS_PTRACE"``; in text with commas between.
        mounts: files and directories of the node: `Mount`, or ``"SOURCE[:TARGET][:rw]"``, read-only without ``rw``.
        tmp: size of /tmp, e.g. ``"4GiB"``; 0: the node's default.
        keep_scratch: how long its scratch directory stays on its node after its end, seconds or e.g. ``"2h"``.
        open_files: how many files each of its processes may have open at once; 0: the node's default.

    Raises:
        UserError: names the argument.
    """
    given: dict[str, object] = {"name": name, "workdir": workdir, "owner": owner, "id": id, "restart": restart}
    given |= {"gpu": gpu, "priority": priority, "retries": retries}
    given |= {"overlap": overlap, "losses_allowed": losses_allowed, "open_files": open_files}
    given |= {"image": image, "network": network, "writable": writable, "user": user}
    for key, value in given.items():
        if value is not None or key != "id":
            _checked(key, value)
    counts = dict(options.parse_countables(countables, "countables")) if countables else {}
    if gpu:
        if "gpu" in counts:
            raise UserError("gpu is given twice", field="gpu", hint="give it once")
        counts["gpu"] = gpu
    spec = TaskSpec(
        id=TaskId(id) if id is not None else new_id(),
        command=_argv(command),
        name=name,
        labels=_pairs("labels", labels),
        env=_pairs("env", env),
        working_directory=workdir,
        resources=Resources.of(
            units.parse_cpus(cpus, "cpus"), units.parse_bytes(memory, "memory"), units.parse_bytes(disk, "disk"), counts
        ),
        walltime_s=units.parse_duration(time, "time"),
        tags_required=_tags("tags", tags),
        tags_forbidden=_tags("not_tags", not_tags),
        priority=priority,
        retries=retries,
        retry_backoff_s=units.parse_duration(backoff, "backoff"),
        restart_on_node_failure=restart,
        owner=owner,
        grace_s=units.parse_duration(grace, "grace"),
        clearance=_tags("clearance", clearance),
        secrets=_secrets(secrets),
        overlap=overlap,
        losses_allowed=losses_allowed,
        container=container_spec(
            image,
            network=network,
            writable=writable,
            user=user,
            capabilities=_checked("capabilities", words(capabilities)),
            mounts=mounts,
            tmp=tmp,
        ),
        keep_scratch_s=units.parse_duration(keep_scratch, "keep_scratch"),
        open_files_max=open_files,
    )
    try:
        validate.check_spec(spec, "", to_be_sealed=True)
    except UserError as e:
        raise UserError(e.message, field=_our_name(e.field), hint=e.hint, reason=e.reason) from e
    return spec


def _argv(command: str | Sequence[str]) -> tuple[str, ...]:
    if not isinstance(command, str):
        if not isinstance(command, Iterable):
            raise UserError(
                f"the command must be text or a list of text, not {_kind(command)}",
                field="command",
                hint="give a program and its arguments",
            )
        for i, word in enumerate(command):
            if not isinstance(word, str):
                raise UserError(f"argument {i} must be text, not {_kind(word)}", field="command", hint="use str()")
        return tuple(command)
    try:
        return tuple(shlex.split(command))
    except ValueError as e:
        raise UserError(
            f"the command cannot be split into words: {e}", field="command", hint="give a list of arguments"
        ) from e


def _pairs(key: str, given: Mapping[str, str] | Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    try:
        table = dict(given)
    except (TypeError, ValueError) as e:
        raise UserError(f"{key} must be a table of text, not {_kind(given)}", field=key, hint="see make_spec") from e
    return tuple(sorted(_text_table(key, table).items()))


def _tags(key: str, given: str | Sequence[str]) -> tuple[str, ...]:
    # Text is a sequence of text, too: "ssd" must not become s, s and d.
    found = _checked(key, words(given))
    return tuple(sorted(set(found)))


def _secrets(given: str | Sequence[str] | Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    if isinstance(given, Mapping):
        return tuple(sorted(_text_table("secrets", given).items()))
    refs = []
    for text in _checked("secrets", words(given)):
        name, _, file = text.partition("=")
        refs.append((name, file or name))
    return tuple(refs)


# What records call it → what people call it.
_NAMES = {
    "working_directory": "workdir",
    "resources.cpu_millis": "cpus",
    "resources.memory_bytes": "memory",
    "resources.disk_bytes": "disk",
    "resources.countables": "countables",
    "walltime_s": "time",
    "tags_required": "tags",
    "tags_forbidden": "not_tags",
    "retry_backoff_s": "backoff",
    "restart_on_node_failure": "restart",
    "grace_s": "grace",
    "keep_scratch_s": "keep_scratch",
    "open_files_max": "open_files",
    "container.tmp_bytes": "tmp",
    **{f"container.{part}": part for part in ("image", "network", "user", "capabilities", "mounts")},
}


def _our_name(field: str) -> str:
    for theirs, ours in _NAMES.items():
        if field == theirs or field.startswith((theirs + "[", theirs + ".")):
            return ours + field[len(theirs) :]
    return field


# --- tasks from a mapping (an entry of a task file) --------------------------------------------------------------

_TEXT, _LIST, _LIST_OR_TABLE, _MOUNTS, _WHOLE, _AMOUNT, _BOOL, _TABLE = (
    "text",
    "a list of text",
    "a list of text or a table",
    "a list of text or tables",
    "a whole number",
    "an amount",
    "yes or no",
    "a table",
)
ENTRY_KEYS: Mapping[str, str] = {
    "command": "text or a list of text",
    "id": _TEXT,
    "name": _TEXT,
    "labels": _TABLE,
    "env": _TABLE,
    "workdir": _TEXT,
    "cpus": _AMOUNT,
    "memory": _AMOUNT,
    "disk": _AMOUNT,
    "gpu": _WHOLE,
    "countables": _TABLE,
    "open_files": _WHOLE,
    "time": _AMOUNT,
    "tags": _LIST,
    "not_tags": _LIST,
    "priority": _WHOLE,
    "retries": _WHOLE,
    "backoff": _AMOUNT,
    "restart": _BOOL,
    "grace": _AMOUNT,
    "overlap": _BOOL,
    "losses_allowed": _WHOLE,
    "owner": _TEXT,
    "clearance": _LIST,
    "secrets": _LIST_OR_TABLE,
    "image": _TEXT,
    "network": _TEXT,
    "writable": _BOOL,
    "user": _TEXT,
    "capabilities": _LIST,
    "mounts": _MOUNTS,
    "tmp": _AMOUNT,
    "keep_scratch": _AMOUNT,
}


def spec_from_entry(entry: object, defaults: Mapping[str, Any]) -> TaskSpec:
    """A task from one entry of a task file; `defaults` (of the same keys) fill in what it does not say.

    Raises:
        UserError: names the key.
    """
    if not isinstance(entry, Mapping):
        raise UserError(
            f"an entry must be a table of settings, not {_kind(entry)}", hint='e.g. {"command": ["echo", "hello"]}'
        )
    for key in entry:
        if not isinstance(key, str) or key not in ENTRY_KEYS:
            raise UserError(
                f"unknown key {names.quoted(str(key))}",
                field=str(key)[:80],
                hint=names.did_you_mean(str(key), ENTRY_KEYS),
            )
    if "command" not in entry:
        raise UserError("there is no command", field="command", hint='e.g. command: ["echo", "hello"]')
    merged: dict[str, Any] = dict(defaults)
    for key, value in entry.items():
        checked = _checked(key, value)
        if ENTRY_KEYS[key] == _TABLE and isinstance(merged.get(key), Mapping):
            checked = {**merged[key], **checked}
        merged[key] = checked
    return make_spec(**merged)


def _checked(key: str, value: Any) -> Any:
    """The value if it has the type its key asks for; amounts are checked where they are parsed."""
    kind = ENTRY_KEYS[key]
    if key == "command":
        good = isinstance(value, str) or _is_list_of_text(value)
    elif kind == _TEXT:
        good = isinstance(value, str)
    elif kind in (_LIST, _LIST_OR_TABLE):
        if kind == _LIST_OR_TABLE and isinstance(value, Mapping):
            return _text_table(key, value)
        if isinstance(value, str):
            return [word.strip() for word in value.split(",") if word.strip()]
        good = _is_list_of_text(value)
    elif kind == _MOUNTS:
        good = isinstance(value, str | list)
    elif kind == _WHOLE:
        good = isinstance(value, int) and not isinstance(value, bool)
    elif kind == _BOOL:
        good = isinstance(value, bool)
    elif key == "countables":
        good = isinstance(value, Mapping)
    elif kind == _TABLE:
        return _text_table(key, value)
    else:
        good = True
    if not good:
        # 1000:50 is a number, too, in YAML, and another one.
        hint = 'write it in quotes, e.g. user: "1000:1000"' if key == "user" else _quote_hint(value)
        raise UserError(f"{key} must be {kind}, not {_kind(value)}", field=key, hint=hint)
    return value


def _text_table(key: str, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise UserError(f"{key} must be a table of text, not {_kind(value)}", field=key, hint=f"{key}: {{KEY: value}}")
    for k, v in value.items():
        if not isinstance(k, str) or not isinstance(v, str):
            wrong = k if not isinstance(k, str) else v
            raise UserError(
                f"{key}: {names.quoted(str(k))} must be text, not {_kind(wrong)}", field=key, hint=_quote_hint(wrong)
            )
    return dict(value)


def _quote_hint(value: Any) -> str:
    return f'write it in quotes: "{value}"' if isinstance(value, (int, float)) else "see docs/tasks.md"


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _kind(value: object) -> str:
    if isinstance(value, list):
        odd = next((item for item in value if not isinstance(item, str)), None)
        return "a list" if odd is None else f"a list with {_kind(odd)} in it"
    kinds: dict[type, str] = {
        bool: "yes/no",
        int: "a number",
        float: "a number",
        dict: "a table",
        str: "text",
        type(None): "nothing",
    }
    return kinds.get(type(value), type(value).__name__)
