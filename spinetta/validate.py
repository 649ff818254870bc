"""Is this something we can take? Every limit of the API with its reason, and the checks of what users send.

Pure, and used on both sides: the client refuses early and locally, the node refuses what other clients send.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from spinetta import confidential, container, names, ociconfig, openfiles
from spinetta.errors import UserError
from spinetta.model import Resources, TaskId, TaskSpec
from spinetta.options import COUNT_MAX, COUNTABLES_MAX, PATH_MAX
from spinetta.units import format_bytes

# --- limits of one task ------------------------------------------------------------------------------------------

COMMAND_ARGS_MAX = 4096  # more is a list of files, which belongs in a file
ARG_BYTES_MAX = (128 << 10) - 1  # the kernel's MAX_ARG_STRLEN, less the NUL it adds
ARGV_ENV_BYTES_MAX = 256 << 10  # all together: a record then stays far below etcd's 1.5 MiB a request
ENV_MAX = 1024
LABELS_MAX = 64  # they are compared one by one in every filtered list
NAME_MAX = 256  # characters
TAGS_MAX = 32  # required and forbidden each: every node matches them against every class of tasks
CPU_MILLIS_MAX = 1_000_000_000  # a million cores: a mistyped unit, not a wish
MEMORY_BYTES_MAX = 1 << 50  # 1 PiB, the same
DISK_BYTES_MAX = 1 << 60  # 1 EiB, the same
WALLTIME_MAX_S = 366 * 86400.0  # a year
PRIORITY_MAX = 1000  # and its negative
RETRIES_MAX = 100
LOSSES_ALLOWED_MAX = 1000  # as good as for ever: each takes at least a lease and a grace
RETRY_BACKOFF_MAX_S = 86400.0
GRACE_MIN_S = 3.0  # shorter than any renewal can be; the node's own settings may ask for more
GRACE_MAX_S = 86400.0  # a dead node's tasks wait this long before they run elsewhere

# --- limits of one request ---------------------------------------------------------------------------------------

MESSAGE_BYTES_MAX = 16 << 20  # of gRPC, both ways: what a node must be ready to hold for each call in flight
SUBMIT_TASKS_MAX = 1000  # a few dozen etcd transactions; a client splits more
SUBMIT_BYTES_TARGET = 4 << 20  # where a client splits: well below MESSAGE_BYTES_MAX
GET_IDS_MAX = 1000  # records of usual size then fit in one message
WAIT_IDS_MAX = 1000  # the node keeps them in memory for as long as the call lasts
LIST_PAGE_MAX = 1000
LIST_PAGE_DEFAULT = 100
WAIT_TIMEOUT_MAX_S = 366 * 86400.0
LOG_CHUNK_BYTES = 64 << 10
REASON_MAX = 1024  # characters of a cancel's reason

ID_CHARS = 36
FRAGMENT_PREFIX_MIN = 4  # characters of an id's beginning
FRAGMENT_SUFFIX_MIN = 6  # characters of an id's end: 24 random bits, so that a slip hardly finds another task

_UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", re.ASCII)
_FRAGMENT = re.compile(r"[0-9a-f-]+", re.ASCII)
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


# --- ids ---------------------------------------------------------------------------------------------------------


def is_task_id(text: str) -> bool:
    """True for a UUID of version 7 in canonical form: lower case, with dashes."""
    return _UUID7.fullmatch(text) is not None


def check_task_id(text: str, field: str) -> None:
    """Raise UserError unless `text` is a whole task id."""
    if not text:
        raise UserError("a task needs an id", field=field, hint="a UUID of version 7, made by the client")
    if not is_task_id(text):
        raise UserError(
            f"not a task id: {names.quoted(text)}",
            field=field,
            hint="a UUID of version 7 in lower case with dashes, e.g. 01890a5d-ac96-774b-bcce-b302099a8057",
        )


def id_fragment(text: str, field: str = "") -> str:
    """The normal form of what a user may write for an id: the whole id, its beginning, or its end.

    Ids of tasks submitted within the same minute begin alike (their first digits are a time), so the end, which is
    random, is the handier short form. Whether it is unique only the node that looks it up can tell; see `matches`.

    Raises:
        UserError: it cannot be a part of an id.
    """
    fragment = text.strip().lower()
    hint = f"a task id, its first {FRAGMENT_PREFIX_MIN} or more, or its last {FRAGMENT_SUFFIX_MIN} or more characters"
    if not _FRAGMENT.fullmatch(fragment) or len(fragment) > ID_CHARS:
        raise UserError(f"not a task id: {names.quoted(text)}", field=field, hint=hint)
    if len(fragment.replace("-", "")) < FRAGMENT_PREFIX_MIN:
        raise UserError(f"too short for a task id: {names.quoted(text)}", field=field, hint=hint)
    if len(fragment) == ID_CHARS and not is_task_id(fragment):
        raise UserError(f"not a task id: {names.quoted(text)}", field=field, hint=hint)
    return fragment


def may_be_suffix(fragment: str) -> bool:
    """True when a normal-form fragment is long enough to be looked for at the ends of ids."""
    return len(fragment.replace("-", "")) >= FRAGMENT_SUFFIX_MIN


def matches(fragment: str, task_id: str) -> bool:
    """True when a fragment in normal form names this id: by its beginning, or, if long enough, by its end.

    A node looks for beginnings first (a range of keys) and for ends (among the newest tasks) only
    when there is none; more than one match is an error with reason ``ambiguous``.
    """
    return task_id.startswith(fragment) or (may_be_suffix(fragment) and task_id.endswith(fragment))


def check_fragments(ids: Sequence[str], field: str, limit: int) -> list[str]:
    """The normal forms of the ids in a request, at least one and at most `limit`."""
    if not ids:
        raise UserError("no task is named", field=field, hint="give at least one id")
    if len(ids) > limit:
        raise UserError(
            f"{len(ids)} ids in one request", field=field, hint=f"at most {limit}; split them", reason="too-large"
        )
    return [id_fragment(text, f"{field}[{i}]") for i, text in enumerate(ids)]


# --- tasks -------------------------------------------------------------------------------------------------------


def check_submit(specs: Sequence[TaskSpec], *, grace_min_s: float = GRACE_MIN_S) -> None:
    """Raise UserError unless a submit request can be taken; fields are named ``tasks[3].command``."""
    if not specs:
        raise UserError("no task is given", field="tasks", hint="give at least one")
    if len(specs) > SUBMIT_TASKS_MAX:
        raise UserError(
            f"{len(specs)} tasks in one request",
            field="tasks",
            hint=f"at most {SUBMIT_TASKS_MAX}; split them",
            reason="too-large",
        )
    seen: dict[str, int] = {}
    for i, spec in enumerate(specs):
        check_spec(spec, f"tasks[{i}]", grace_min_s=grace_min_s)
        first = seen.setdefault(spec.id, i)
        if first != i:
            raise UserError(
                f"the id of tasks[{first}] is given again", field=f"tasks[{i}].id", hint="give each task its own id"
            )


def check_spec(spec: TaskSpec, field: str, *, grace_min_s: float = GRACE_MIN_S, to_be_sealed: bool = False) -> None:
    """Raise UserError, naming ``FIELD.part``, unless the task can be taken.

    A task with clearance labels must be sealed, unless it is `to_be_sealed` still; one without must not be.
    """
    dot = f"{field}." if field else ""
    check_task_id(spec.id, dot + "id")
    confidential.check_clearance(spec.clearance, dot + "clearance")
    if spec.sealed is not None:
        confidential.check_sealed(spec, dot)
    elif spec.clearance and not to_be_sealed:
        raise UserError(
            "a task with clearance labels must be sealed before it is sent",
            field=dot + "clearance",
            hint="submit it with this package's client, or through a node that is cleared for all of its labels",
            reason="unsealed",
        )
    else:
        check_payload(spec, field)
    names.check_owner(spec.owner, dot + "owner")
    confidential.check_secret_refs(spec.secrets, dot + "secrets")
    _check_resources(spec.resources, dot + "resources")
    _check_tags(spec, dot)
    _check_seconds(spec.walltime_s, 0, WALLTIME_MAX_S, dot + "walltime_s", "a walltime")
    _check_seconds(spec.retry_backoff_s, 0, RETRY_BACKOFF_MAX_S, dot + "retry_backoff_s", "a back-off")
    if spec.grace_s != 0:
        _check_seconds(spec.grace_s, grace_min_s, GRACE_MAX_S, dot + "grace_s", "a grace")
        if spec.overlap:
            raise UserError(
                "a task with overlap is never killed for silence, so a grace means nothing",
                field=dot + "grace_s",
                hint="leave one of the two away",
            )
    if spec.container is not None:
        container.check_container(spec.container, dot + "container")
        if 0 < spec.resources.memory_bytes < container.MEMORY_BYTES_MIN:
            raise UserError(
                f"{format_bytes(spec.resources.memory_bytes)} of memory are too few for a container",
                field=dot + "resources.memory_bytes",
                hint=f"{format_bytes(container.MEMORY_BYTES_MIN)} at least: so much takes its start",
            )
        for words in ociconfig.mount_refusals(spec.container.mounts):
            raise UserError(words, field=dot + "container.mounts", hint="choose other places, e.g. /data")
    _check_seconds(spec.keep_scratch_s, 0, container.KEEP_SCRATCH_MAX_S, dot + "keep_scratch_s", "a time to keep files")
    openfiles.check(spec.open_files_max, dot + "open_files_max")
    _check_range(spec.losses_allowed, 0, LOSSES_ALLOWED_MAX, dot + "losses_allowed", "a number of lost nodes")
    _check_range(spec.priority, -PRIORITY_MAX, PRIORITY_MAX, dot + "priority", "a priority")
    _check_range(spec.retries, 0, RETRIES_MAX, dot + "retries", "a number of retries")


def check_payload(spec: TaskSpec, field: str) -> None:
    """Raise UserError unless what is sealed of a labelled task could be run: also for a node that has opened it."""
    dot = f"{field}." if field else ""
    _check_command(spec, dot)
    _check_env(spec, dot)
    _check_words(spec, dot)


def _check_command(spec: TaskSpec, dot: str) -> None:
    field = dot + "command"
    if not spec.command:
        raise UserError("the command is empty", field=field, hint="give a program and its arguments")
    if not spec.command[0]:
        raise UserError("the program's name is empty", field=f"{field}[0]", hint="give a program on PATH, or a path")
    if len(spec.command) > COMMAND_ARGS_MAX:
        raise UserError(
            f"the command has {len(spec.command)} arguments",
            field=field,
            hint=f"at most {COMMAND_ARGS_MAX}; put long lists in a file",
            reason="too-large",
        )
    for i, argument in enumerate(spec.command):
        _check_for_exec(argument, f"argument {i}", f"{field}[{i}]")
    total = sum(_size(a) for a in spec.command) + sum(_size(k) + _size(v) for k, v in spec.env)
    if total > ARGV_ENV_BYTES_MAX:
        raise UserError(
            f"command and environment have {total} bytes together",
            field=field,
            hint=f"at most {ARGV_ENV_BYTES_MAX}; put data in files",
            reason="too-large",
        )


def _check_env(spec: TaskSpec, dot: str) -> None:
    field = dot + "env"
    if len(spec.env) > ENV_MAX:
        raise UserError(
            f"{len(spec.env)} environment variables", field=field, hint=f"at most {ENV_MAX}", reason="too-large"
        )
    for name, value in spec.env:
        if not _ENV_NAME.fullmatch(name):
            raise UserError(
                f"not a name for an environment variable: {names.quoted(name)}",
                field=field,
                hint="letters, digits and '_', not beginning with a digit",
            )
        # The kernel holds NAME=VALUE to the same limit as one argument.
        _check_for_exec(f"{name}={value}", f"environment variable {names.quoted(name)}", field)


def _check_for_exec(text: str, what: str, field: str) -> None:
    """Refuse what the kernel or the record could not hold: NUL, bytes that are no UTF-8, too long."""
    if "\0" in text:
        raise UserError(f"{what} holds a NUL character", field=field, hint="no program can be given one")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        # A shell passes any bytes; Python shows those that are no UTF-8 as lone surrogates.
        raise UserError(
            f"{what} is not UTF-8", field=field, hint="rename the file, or pass its name in a file"
        ) from None
    if size > ARG_BYTES_MAX:
        raise UserError(
            f"{what} has {size} bytes", field=field, hint=f"the kernel takes {ARG_BYTES_MAX}", reason="too-large"
        )


def _size(text: str) -> int:
    """Bytes, with the terminating NUL; called on checked text, or on text about to be refused."""
    return len(text.encode(errors="surrogatepass")) + 1


def _check_words(spec: TaskSpec, dot: str) -> None:
    """Name, labels, working directory."""
    if len(spec.name) > NAME_MAX:
        raise UserError(
            f"the name has {len(spec.name)} characters",
            field=dot + "name",
            hint=f"at most {NAME_MAX}",
            reason="too-large",
        )
    names.check_printable(spec.name, "the name", dot + "name")
    if len(spec.labels) > LABELS_MAX:
        raise UserError(
            f"{len(spec.labels)} labels", field=dot + "labels", hint=f"at most {LABELS_MAX}", reason="too-large"
        )
    for key, value in spec.labels:
        names.check_label(key, value, dot + "labels")
    directory = spec.working_directory
    if directory:
        field = dot + "working_directory"
        if not directory.startswith("/"):
            raise UserError(
                f"not an absolute path: {names.quoted(directory)}",
                field=field,
                hint="begin it with /, or leave it away for a fresh scratch directory",
            )
        if len(directory) > PATH_MAX:
            raise UserError(
                f"the working directory has {len(directory)} characters",
                field=field,
                hint=f"at most {PATH_MAX}",
                reason="too-large",
            )
        names.check_printable(directory, "the working directory", field)
        if spec.container is not None and (words := ociconfig.cwd_refusal(directory)):
            raise UserError(words, field=field, hint="leave it away for the scratch directory, /work")


def _check_resources(r: Resources, field: str) -> None:
    _check_range(r.cpu_millis, 0, CPU_MILLIS_MAX, field + ".cpu_millis", "a number of thousandths of a core")
    _check_range(r.memory_bytes, 0, MEMORY_BYTES_MAX, field + ".memory_bytes", "an amount of memory")
    _check_range(r.disk_bytes, 0, DISK_BYTES_MAX, field + ".disk_bytes", "an amount of disk")
    if len(r.countables) > COUNTABLES_MAX:
        raise UserError(
            f"{len(r.countables)} countables",
            field=field + ".countables",
            hint=f"at most {COUNTABLES_MAX}",
            reason="too-large",
        )
    for name, n in r.countables:
        names.check_countable_name(name, field + ".countables")
        _check_range(n, 0, COUNT_MAX, f"{field}.countables.{name}", f"a number of {name}")


def _check_tags(spec: TaskSpec, dot: str) -> None:
    for part, tags in (("tags_required", spec.tags_required), ("tags_forbidden", spec.tags_forbidden)):
        if len(tags) > TAGS_MAX:
            raise UserError(f"{len(tags)} tags", field=dot + part, hint=f"at most {TAGS_MAX}", reason="too-large")
        for i, tag in enumerate(tags):
            names.check_tag(tag, f"{dot}{part}[{i}]")
    both = sorted(set(spec.tags_required) & set(spec.tags_forbidden))
    if both:
        raise UserError(
            f"tag {both[0]!r} is both required and forbidden", field=dot + "tags_forbidden", hint="no node can have it"
        )


def _check_range(value: int, low: int, high: int, field: str, what: str) -> None:
    if not low <= value <= high:
        raise UserError(f"{value} is out of range for {what}", field=field, hint=f"{low} to {high}")


def _check_seconds(value: float, low: float, high: float, field: str, what: str) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        hint = f"{low:.10g} to {high:.10g} seconds"
        raise UserError(f"{value:.10g} s is out of range for {what}", field=field, hint=hint)


# --- other requests ----------------------------------------------------------------------------------------------


def check_page_size(size: int, field: str = "page_size") -> int:
    """The page size to use: the default for 0.

    Raises:
        UserError: negative or more than `LIST_PAGE_MAX`.
    """
    _check_range(size, 0, LIST_PAGE_MAX, field, "a page size")
    return size or LIST_PAGE_DEFAULT


def check_wait_timeout(timeout_s: float, field: str = "timeout_s") -> None:
    """Raise UserError unless it is 0 or a sane number of seconds."""
    _check_seconds(timeout_s, 0, WAIT_TIMEOUT_MAX_S, field, "a time to wait")


def check_reason(reason: str, field: str = "reason") -> None:
    """Raise UserError unless a cancel's reason is short and printable."""
    if len(reason) > REASON_MAX:
        raise UserError(
            f"the reason has {len(reason)} characters", field=field, hint=f"at most {REASON_MAX}", reason="too-large"
        )
    names.check_printable(reason, "the reason", field)


def check_exec(command: Sequence[str], env: Mapping[str, str], working_directory: str) -> None:
    """Raise UserError unless this can be run beside a task."""
    spec = TaskSpec(id=TaskId(""), command=tuple(command), env=tuple(env.items()))
    _check_command(spec, "")
    _check_env(spec, "")
    _check_for_exec(working_directory, "the working directory", "working_directory")


def check_filter(labels: Sequence[tuple[str, str]], owner: str, name: str, node: str, field: str = "filter") -> None:
    """Raise UserError unless the parts of a filter could match anything."""
    if len(labels) > LABELS_MAX:
        raise UserError(f"{len(labels)} labels", field=field + ".labels", hint=f"at most {LABELS_MAX}")
    for key, value in labels:
        names.check_label(key, value, field + ".labels")
    names.check_owner(owner, field + ".owner")
    if len(name) > NAME_MAX:
        raise UserError(f"the name has {len(name)} characters", field=field + ".name", hint=f"at most {NAME_MAX}")
    if node:
        names.check_node_name(node, field + ".node")
