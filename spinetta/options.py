"""Every setting once: its name, how its text is read, what it means. `config` makes values of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from spinetta import container, devices, names, network, openfiles, units
from spinetta.errors import UserError

PEERS_MAX = 64  # one that answers is enough; more than this is a mistake
NODE_TAGS_MAX = 64  # they travel with every heartbeat of the node's record
UNPACKS_MAX = 64  # each takes a processor and the disk
COUNTABLES_MAX = 32  # the same
COUNT_MAX = 1_000_000
KEEP_MAX = 10_000_000  # finished tasks in the store: ten times what etcd holds well
COLLECT_MIN_S = 1.0  # less would be a slip; nothing leaves before those who wait for it have seen it anyway
PATH_MAX = 4096  # the kernel's own limit
DEVICES_MAX = 64  # of one countable; each is a mount at every start
TMP_BYTES_MIN = 1 << 20  # less would hold nothing that anybody puts there
CONTAINER_IDS = 65536  # how many a node's containers have
CONTAINER_IDS_LAST = (1 << 32) - 2 * CONTAINER_IDS  # the highest id of all is none
NEVER = "never"
NO_CREDENTIALS = "none"  # plain text, although the usual credentials file is there

Parse = Callable[[Any, str], Any]


@dataclass(frozen=True, slots=True)
class Option:
    """One setting: `key` as in the file and (with dashes) the flag, `attribute` as in the dataclass."""

    key: str
    attribute: str
    parse: Parse
    help: str
    metavar: str = "TEXT"
    secret: bool = False  # never shown

    @property
    def flag(self) -> str:
        """E.g. ``--data-dir``."""
        return "--" + self.key.replace("_", "-")


# --- how each kind of value is read ------------------------------------------------------------------------------


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"must be text, not {_kind(value)}", field=where)
    if "\0" in value:
        raise UserError("holds a NUL character", field=where)
    return value


def _kind(value: Any) -> str:
    kinds = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "a table", str: "text"}
    return kinds.get(type(value), type(value).__name__)


def _path(value: Any, where: str) -> str:
    path = _text(value, where)
    if not path.startswith("/") or len(path) > PATH_MAX:
        raise UserError(f"not an absolute path: {names.quoted(path)}", field=where, hint="begin it with /")
    return path.rstrip("/") or "/"


def _credentials(value: Any, where: str) -> str:
    return NO_CREDENTIALS if value == NO_CREDENTIALS else str(_path(value, where))


def _program(value: Any, where: str) -> str:
    program = _text(value, where)
    if not program.strip() or len(program) > PATH_MAX:
        raise UserError("names no program", field=where, hint="a path, or a name on PATH, e.g. etcd")
    return program


def _items(value: Any, where: str, limit: int) -> list[str]:
    """A list from a file, or text with commas from a flag or variable."""
    if isinstance(value, str):
        items = [item.strip() for item in value.split(",") if item.strip()]
    elif isinstance(value, (list, tuple)):
        items = [_text(item, where) for item in value]
    else:
        raise UserError(f"must be a list, not {_kind(value)}", field=where, hint="separate with commas")
    if len(items) > limit:
        raise UserError(f"{len(items)} items, at most {limit}", field=where, hint="give fewer", reason="too-large")
    return items


def _tags(value: Any, where: str) -> tuple[str, ...]:
    return tuple(sorted({names.check_tag(tag, where) for tag in _items(value, where, NODE_TAGS_MAX)}))


RUNTIMES = (container.PROCESS, container.CONTAINER)
_RUNTIMES_BEFORE = {"runc": container.CONTAINER}  # what settings have said before there were containers


def _runtimes(value: Any, where: str) -> tuple[str, ...]:
    found = [_RUNTIMES_BEFORE.get(r, r) for r in _items(value, where, len(RUNTIMES) + len(_RUNTIMES_BEFORE))]
    unknown = [r for r in found if r not in RUNTIMES]
    if unknown or not found:
        what = f"unknown runtime {names.quoted(unknown[0])}" if unknown else "names no runtime"
        raise UserError(what, field=where, hint=f"a list of {', '.join(RUNTIMES)}")
    return tuple(r for r in RUNTIMES if r in found)


def _allow(value: Any, where: str) -> tuple[str, ...]:
    words = sorted({container.check_allowance(word, where) for word in _items(value, where, container.ALLOWS_MAX)})
    size = sum(len(word.encode(errors="replace")) for word in words)
    if size > container.ALLOWS_BYTES_MAX:
        hint = f"at most {container.ALLOWS_BYTES_MAX}; allow a directory above"
        raise UserError(f"{size} bytes of allowances", field=where, hint=hint, reason="too-large")
    container.check_allowances(words, where)
    container.check_allowances(words, where)
    return tuple(words)


def _container_program(value: Any, where: str) -> str:
    program = _text(value, where)
    if program in ("auto", "runc", "crun"):
        return program
    if not program.startswith("/"):
        raise UserError(
            f"no program for containers: {names.quoted(program)}",
            field=where,
            hint="auto, runc, crun, or the absolute path of one of them",
        )
    return str(_path(program, where))


def _container_ids(value: Any, where: str) -> int:
    first: int = _whole(0, CONTAINER_IDS_LAST)(value, where)
    if 0 < first < CONTAINER_IDS:
        raise UserError(
            f"{first} is among the ids that the machine's own users have",
            field=where,
            hint=f"0: automatic; else {CONTAINER_IDS} to {CONTAINER_IDS_LAST}, the first of {CONTAINER_IDS} free ones",
        )
    return first


def parse_devices(value: Any, where: str = "") -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Devices of countables from ``gpu=0:/dev/nvidia0,/dev/nvidiactl,fpga=/dev/fpga0`` or a table, sorted by countable.

    Each is a path, or one with the label of the unit that it belongs to before it; see `devices`.

    Raises:
        UserError: a bad name or label, a path that is none of a device, or one that belongs to several units.
    """
    found: dict[str, list[str]] = {}
    if isinstance(value, Mapping):
        if len(value) > COUNTABLES_MAX:
            raise UserError(f"{len(value)} countables, at most {COUNTABLES_MAX}", field=where, reason="too-large")
        found = {str(name): _items(paths, where, DEVICES_MAX) for name, paths in value.items()}
    else:
        for item in _items(value, where, COUNTABLES_MAX * DEVICES_MAX):
            alone = item.startswith("/") or devices.is_labelled(item)
            name, equals, path = ("", "", item) if alone else item.partition("=")
            if equals:
                found.setdefault(name.strip(), [])
            elif not found or name:
                raise UserError(f"not NAME=PATH: {names.quoted(item)}", field=where, hint="e.g. gpu=/dev/nvidia0")
            found[name.strip() if equals else next(reversed(found))].append(path.strip())
    for name, paths in found.items():
        names.check_countable_name(name, where)
        for item in paths:
            devices.check_label(item, where)
            path = devices.split(item)[1]
            container.check_path(path, where)
            if not path.startswith("/dev/"):
                raise UserError(f"not a device: {names.quoted(path)}", field=where, hint="a path below /dev")
        if not 0 < len(paths) <= DEVICES_MAX:
            raise UserError(f"{len(paths)} devices of {name}", field=where, hint=f"1 to {DEVICES_MAX}")
    setting = tuple(sorted((name, tuple(dict.fromkeys(paths))) for name, paths in found.items()))
    devices.check(setting, where)
    return setting


def _addresses(value: Any, where: str) -> tuple[str, ...]:
    found = [names.check_address(a, where) for a in _items(value, where, PEERS_MAX)]
    return tuple(dict.fromkeys(found))


def _client_addresses(value: Any, where: str) -> tuple[str, ...]:
    found = _addresses(value, where)
    if not found:
        raise UserError("names no node", field=where, hint="HOST:PORT, or several with commas between")
    return found


def _address(value: Any, where: str) -> str:
    return names.check_own_address(_text(value, where), where)


def _name(value: Any, where: str) -> str:
    return names.check_node_name(_text(value, where), where)


def parse_countables(value: Any, where: str = "") -> tuple[tuple[str, int], ...]:
    """Countables from ``gpu=2,fpga=1`` or a table, sorted, without zeros.

    Raises:
        UserError: a bad name or number, or a name given twice.
    """
    pairs: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        pairs = [(str(k), v) for k, v in value.items()]
    else:
        for item in _items(value, where, COUNTABLES_MAX):
            name, equals, number = item.partition("=")
            if not equals:
                raise UserError(f"not NAME=NUMBER: {names.quoted(item)}", field=where, hint="e.g. gpu=2")
            pairs.append((name.strip(), number.strip()))
    if len(pairs) > COUNTABLES_MAX:
        raise UserError(f"{len(pairs)} countables, at most {COUNTABLES_MAX}", field=where, reason="too-large")
    counts: dict[str, int] = {}
    for name, number in pairs:
        names.check_countable_name(name, where)
        if name in counts:
            raise UserError(f"countable {name!r} is given twice", field=where, hint="give it once")
        counts[name] = _whole(0, COUNT_MAX)(number, where)
    return tuple(sorted((k, v) for k, v in counts.items() if v))


def _whole(low: int, high: int) -> Callable[[Any, str], int]:
    def parse(value: Any, where: str) -> int:
        number = value
        if isinstance(value, str):
            digits = value.strip().removeprefix("-")
            if not (digits.isascii() and digits.isdecimal()) or len(digits) > 18:
                raise UserError(f"not a whole number: {names.quoted(value)}", field=where)
            number = int(value)
        if isinstance(number, bool) or not isinstance(number, int):
            raise UserError(f"must be a whole number, not {_kind(value)}", field=where)
        if not low <= number <= high:
            raise UserError(f"{number} is out of range", field=where, hint=f"{low} to {high}")
        return number

    return parse


def _size(low: int, high: int) -> Parse:
    def parse(value: Any, where: str) -> int:
        number = units.parse_bytes(value, where)
        if not low <= number <= high:
            hint = f"{units.format_bytes(low)} to {units.format_bytes(high)}"
            raise UserError(f"{units.format_bytes(number)} is out of range", field=where, hint=hint)
        return number

    return parse


def _fraction(low: float, high: float) -> Parse:
    def parse(value: Any, where: str) -> float:
        try:
            number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None
        except ValueError:
            number = None
        if number is None:
            raise UserError(f"not a number: {names.quoted(str(value))}", field=where)
        if not low <= number <= high:
            raise UserError(f"{number:g} is out of range", field=where, hint=f"{low:g} to {high:g}")
        return number

    return parse


def _duration(low_s: float, high_s: float) -> Parse:
    def parse(value: Any, where: str) -> float:
        seconds = units.parse_duration(value, where)
        if not low_s <= seconds <= high_s:
            low, high = units.format_duration(low_s), units.format_duration(high_s)
            raise UserError(f"{units.format_duration(seconds)} is out of range", field=where, hint=f"{low} to {high}")
        return seconds

    return parse


def _whole_seconds(low_s: int, high_s: int) -> Parse:
    def parse(value: Any, where: str) -> int:
        seconds = _duration(low_s, high_s)(value, where)
        if seconds != int(seconds):
            raise UserError("etcd's leases count whole seconds", field=where, hint="e.g. 10s")
        return int(seconds)

    return parse


def _subnet(value: Any, where: str) -> str:
    return network.parse_subnet(_text(value, where), where)


def _each(read: Callable[[str, str], str], limit: int) -> Parse:
    def parse(value: Any, where: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(read(item, where) for item in _items(value, where, limit)))

    return parse


def _flag(value: Any, where: str) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in _YES | _NO:
        return value.strip().lower() in _YES
    raise UserError(f"not yes or no: {names.quoted(str(value))}", field=where, hint="yes or no, true or false")


def _replace_after(value: Any, where: str) -> float:
    if value in (NEVER, "0", 0) and not isinstance(value, bool):
        return 0.0
    seconds: float = _duration(1.0, 7 * 86400.0)(value, where)
    return seconds


_YES = frozenset({"yes", "true", "1", "on"})
_NO = frozenset({"no", "false", "0", "off"})


def _one_of(*choices: str) -> Parse:
    def parse(value: Any, where: str) -> str:
        word = _text(value, where).strip().lower()
        if word not in choices:
            raise UserError(f"{names.quoted(word)} is none of the choices", field=where, hint=" or ".join(choices))
        return word

    return parse


def _voters(value: Any, where: str) -> int:
    number = _whole(1, 5)(value, where)
    if number % 2 == 0:
        raise UserError(
            f"{number} voters: an even number survives no more failures than one less", field=where, hint="1, 3 or 5"
        )
    return number


def _keep_time(value: Any, where: str) -> float:
    seconds = units.parse_duration(value, where)
    if 0 < seconds < COLLECT_MIN_S:
        hint = f"at least {units.format_duration(COLLECT_MIN_S)}; 0: never by age"
        raise UserError(f"{units.format_duration(seconds)} is too short", field=where, hint=hint)
    return seconds


_PORT = _whole(0, 65535)
_FILES = _whole(openfiles.OPEN_FILES_MIN, openfiles.OPEN_FILES_MAX)
_ENDS = ("keep", "drain", "release")

NODE_OPTIONS: tuple[Option, ...] = (
    Option("name", "name", _name, "Name of this node, unique in the cluster.", "NAME"),
    Option("address", "address", _address, "Where the API listens, an IP address of this machine.", "HOST:PORT"),
    Option("data_dir", "data_dir", _path, "Where this node keeps everything.", "PATH"),
    Option("peers", "peers", _addresses, "API addresses of nodes of the cluster to join.", "HOST:PORT,…"),
    Option("token", "token", _text, "Join token; better in --token-file: arguments show in ps.", "TOKEN", secret=True),
    Option("token_file", "token_file", _path, "File with the join token.", "PATH"),
    Option("tls", "tls", _one_of("auto", "on", "off"), "Mutual TLS; auto: unless on loopback.", "auto|on|off"),
    Option("tags", "tags", _tags, "What this node is; tasks may require or forbid it.", "TAG,…"),
    Option("cpus", "cpu_millis", units.parse_cpus, "Cores to offer (0: as detected).", "N"),
    Option("memory", "memory_bytes", units.parse_bytes, "Memory to offer (0: as detected).", "SIZE"),
    Option("disk", "disk_bytes", units.parse_bytes, "Scratch space to offer (0: as detected).", "SIZE"),
    Option("countables", "countables", parse_countables, "Further things to offer, e.g. gpu=2.", "NAME=N,…"),
    Option("runtimes", "runtimes", _runtimes, "How tasks may be run here: process, container.", "NAME,…"),
    Option("allow", "allow", _allow, "What containers may have here, e.g. network:host, mount:/data.", "WORD,…"),
    Option("devices", "devices", parse_devices, "What a countable is, e.g. gpu=0:/dev/nvidia0.", "NAME=PATH,…"),
    Option("network_subnet", "network_subnet", _subnet, "Addresses for containers on a bridge.", "SUBNET|auto"),
    Option(
        "network_nameservers",
        "network_nameservers",
        _each(network.parse_nameserver, network.NAMESERVERS_MAX),
        "Whom they ask for names (none: as the machine).",
        "ADDRESS,…",
    ),
    Option(
        "network_refuse",
        "network_refuse",
        _each(network.parse_refused, network.REFUSE_MAX),
        "Where they may not connect to.",
        "SUBNET,…",
    ),
    Option("container_program", "container_program", _container_program, "What runs them.", "auto|runc|crun|PATH"),
    Option("container_ids", "container_ids", _container_ids, "First of their 65536 user ids (0: automatic).", "ID"),
    Option(
        "tmp_size", "tmp_bytes", _size(TMP_BYTES_MIN, container.TMP_BYTES_MAX), "Size of /tmp in a container.", "SIZE"
    ),
    Option("image_keep", "image_keep_bytes", units.parse_bytes, "What images may take here (0: any).", "SIZE"),
    Option("image_keep_time", "image_keep_s", units.parse_duration, "How long unused images stay (0: ever).", "TIME"),
    Option("image_unpacks", "image_unpacks", _whole(1, UNPACKS_MAX), "Images unpacked at once.", "N"),
    Option("registries_conf", "registries_conf", _path, "The site's registries.conf, for bare names.", "PATH"),
    Option("etcd_client_port", "etcd_client_port", _PORT, "etcd's port for clients (0: any free one).", "PORT"),
    Option("etcd_peer_port", "etcd_peer_port", _PORT, "etcd's port for its peers (0: any free one).", "PORT"),
    Option("etcd_quota", "etcd_quota_bytes", _size(16 << 20, 64 << 30), "How large etcd's file may be.", "SIZE"),
    Option("etcd_program", "etcd_program", _program, "The etcd to run.", "PROGRAM"),
    Option("voters_wanted", "voters_wanted", _voters, "How many nodes run an etcd member: 1, 3 or 5.", "N"),
    Option(
        "voter_replace_after", "voter_replace_after_s", _replace_after, "When a voter that is away is replaced.", "TIME"
    ),
    Option("candidate", "candidate", _flag, "Whether this node may become a voter.", "yes|no"),
    Option("lease_ttl", "lease_ttl_s", _whole_seconds(2, 300), "Silence after which this node is suspected.", "TIME"),
    Option("grace", "grace_s", _duration(3, 86400), "How long tasks may run without a renewal.", "TIME"),
    Option("kill_margin", "kill_margin_s", _duration(0.5, 300), "How long killing may take.", "TIME"),
    Option("clock_rate_error", "clock_rate_error", _fraction(0, 0.2), "How much clock rates may differ.", "FRACTION"),
    Option(
        "drain_timeout",
        "drain_timeout_s",
        _duration(0, 366 * 86400),
        "How long a node that ends waits for tasks.",
        "TIME",
    ),
    Option("on_terminate", "on_terminate", _one_of(*_ENDS), "What SIGTERM does with the tasks.", "|".join(_ENDS)),
    Option("log_level", "log_level", _one_of("debug", "info", "warning", "error"), "How much to say.", "LEVEL"),
    Option("log_max", "log_max_bytes", units.parse_bytes, "Size of one log of an attempt (0: any).", "SIZE"),
    Option("log_keep", "log_keep_bytes", units.parse_bytes, "Bytes of task logs to keep (0: all).", "SIZE"),
    Option("log_keep_time", "log_keep_s", units.parse_duration, "How long to keep task logs (0: for ever).", "TIME"),
    Option("scratch_keep", "scratch_keep_bytes", units.parse_bytes, "Kept scratch directories (0: all).", "SIZE"),
    Option("collect_after", "collect_after_s", _keep_time, "When finished tasks leave the store (0: never).", "TIME"),
    Option("collect_keep", "collect_keep", _whole(0, KEEP_MAX), "Finished tasks to keep in it (0: any).", "N"),
    Option("archive_keep", "archive_keep_bytes", units.parse_bytes, "Archived tasks to keep here (0: all).", "SIZE"),
    Option("pids_max", "pids_max", _whole(0, 4_194_304), "Processes and threads of one task (0: any).", "N"),
    Option("open_files", "open_files", _FILES, "Files a process of a task has open, if it asks for none.", "N"),
    Option("open_files_max", "open_files_max", _FILES, "The most that a task may ask for.", "N"),
    Option("reconcile", "reconcile_s", _duration(1, 600), "Between full comparisons with the store.", "TIME"),
)
CLIENT_OPTIONS: tuple[Option, ...] = (
    Option("node", "nodes", _client_addresses, "Nodes to talk to, tried in order.", "HOST:PORT,…"),
    Option("timeout", "timeout_s", _duration(0.1, 3600), "How long one call may take.", "TIME"),
    Option("credentials", "credentials", _credentials, "What proves who you are to a secured cluster.", "FILE|none"),
    Option("bearer_file", "bearer_file", _path, "File with an OIDC bearer token, used instead.", "FILE"),
)
VARIABLE_PREFIX = "SPINETTA_"


def variable(option: Option) -> str:
    """The environment variable of a setting, e.g. ``SPINETTA_DATA_DIR``."""
    return VARIABLE_PREFIX + option.key.upper()
