"""Settings as frozen values, each with where it came from: flag > environment variable > file > default.

Pure: the caller reads the files and the environment and passes them in.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spinetta import devices, names, units
from spinetta.errors import UserError
from spinetta.options import CLIENT_OPTIONS, NODE_OPTIONS, VARIABLE_PREFIX, Option, variable

API_PORT = 7220
ETCD_CLIENT_PORT = 7221
ETCD_PEER_PORT = 7222
DEFAULT_ADDRESS = f"127.0.0.1:{API_PORT}"


@dataclass(frozen=True, slots=True)
class Settings:
    """All that ``spinetta node join`` can be told.

    Attributes:
        name: of the node, unique in the cluster.
        address: HOST:PORT of the API; the host is also where etcd listens.
        data_dir: absolute path; everything the node keeps is below it.
        peers: API addresses of nodes of the cluster to join; empty: start a new cluster (or the one in data_dir).
        token, token_file: the join token, or the file it is in, for the first time in a secured cluster.
        tls: ``on``, ``off`` (plain text, loopback only) or ``auto``: on unless the address is on loopback and no token
            is given. What a node that has been part of a cluster speaks never changes.
        tags: what this node is; tasks may require or forbid them.
        cpu_millis, memory_bytes, disk_bytes: what to offer; 0: what is detected.
        countables: further things to offer, sorted by name.
        runtimes: how tasks may be run here: ``process``, ``container``; each must be installed.
        allow: what containers may have here beyond the usual, in the words of `container.check_allowance`, sorted.
        devices: by countable, the device files of a container that has some of it; those of one unit with its label.
        network_subnet: addresses for containers on the network bridge; empty: a free part of `network.POOL`.
        network_nameservers: whom they ask for names; empty: whom the machine asks, as far as they can.
        network_refuse: addresses and subnets that they may not connect to, beside those that they never may.
        container_program: ``auto``, ``runc``, ``crun``, or the absolute path of one of them.
        container_ids: the first of 65536 user and group ids of this machine that containers have; 0: found out.
        tmp_bytes: size of /tmp in a container that asks for none; it is memory, and counted as the task's.
        image_keep_bytes: images beyond this are removed, those that were not used for longest first; 0: no limit.
        image_keep_s: images that nothing has used for so long are removed; 0: none are.
        image_unpacks: images unpacked at once.
        registries_conf: of the site's mirrors, for bare names of images; empty: there are none.
        etcd_client_port, etcd_peer_port: 0: choose free ones.
        etcd_quota_bytes: of etcd's database; past it etcd takes nothing. The same on all voters.
        etcd_program: path or name on PATH.
        voters_wanted: how many nodes run an etcd member: 1, 3 or 5.
        voter_replace_after_s: a voter that has been away for so long loses its seat to a spare node; 0: never.
        candidate: whether this node may become one of them.
        lease_ttl_s: after this long without a sign of life the node is suspected.
        grace_s: how long a task may go on without a renewal, unless it asks for something else.
        kill_margin_s: how long killing may take; taken off the grace.
        clock_rate_error: by what fraction the rates of two machines' clocks may differ.
        drain_timeout_s: how long a node that leaves, or is terminated with ``drain``, waits for its tasks before it
            gives them back.
        on_terminate: what a daemon that gets SIGTERM does with its tasks: ``keep`` them for the next daemon, ``drain``
            (wait for them, then give them back) or ``release`` (give them back).
        log_level: debug, info, warning or error.
        log_max_bytes: of what an attempt writes to one of its two outputs; what comes after is not kept. 0: any.
        log_keep_bytes, log_keep_s: task logs beyond this, oldest first, are removed; 0: no limit.
        scratch_keep_bytes: kept scratch directories beyond this are removed, oldest first; 0: no limit.
        collect_after_s: finished tasks leave the store for the archives after this time; 0: not by age.
        collect_keep: at most so many of them stay in it, whatever their age; 0: any number. Both count on the leader.
        archive_keep_bytes: what this node's archive may take, the oldest go first; 0: any amount.
        pids_max: processes and threads of one task; 0: no limit.
        open_files: that a process of a task which asks for no number may have open at once (its hard limit).
        open_files_max: the most that a task may ask for; less where the machine allows less.
        reconcile_s: between two full comparisons with the store.
    """

    name: str
    address: str
    data_dir: str
    peers: tuple[str, ...] = ()
    token: str = field(default="", repr=False)
    token_file: str = ""
    tls: str = "auto"
    tags: tuple[str, ...] = ()
    cpu_millis: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    countables: tuple[tuple[str, int], ...] = ()
    runtimes: tuple[str, ...] = ("process", "container")
    allow: tuple[str, ...] = ()
    devices: tuple[tuple[str, tuple[str, ...]], ...] = ()
    network_subnet: str = ""
    network_nameservers: tuple[str, ...] = ()
    network_refuse: tuple[str, ...] = ()
    container_program: str = "auto"
    container_ids: int = 0
    tmp_bytes: int = 1 << 30  # what sorting and unpacking in it take; it is memory, so no more unless one asks
    image_keep_bytes: int = 50 << 30
    image_keep_s: float = 30 * 86400.0
    image_unpacks: int = 2  # each takes a processor and the disk
    registries_conf: str = ""
    etcd_client_port: int = ETCD_CLIENT_PORT
    etcd_peer_port: int = ETCD_PEER_PORT
    etcd_quota_bytes: int = 2 << 30  # etcd's own default
    etcd_program: str = "etcd"
    voters_wanted: int = 3
    voter_replace_after_s: float = 300.0
    candidate: bool = True
    lease_ttl_s: int = 10
    grace_s: float = 60.0
    kill_margin_s: float = 5.0
    clock_rate_error: float = 0.01
    drain_timeout_s: float = 3600.0
    on_terminate: str = "keep"
    log_level: str = "info"
    log_max_bytes: int = 1 << 30  # a tenth of all that are kept: one that never ends leaves the others
    log_keep_bytes: int = 10 << 30
    log_keep_s: float = 30 * 86400.0
    scratch_keep_bytes: int = 10 << 30
    collect_after_s: float = 7 * 86400.0
    collect_keep: int = 100_000
    archive_keep_bytes: int = 1 << 30
    pids_max: int = 4096
    open_files: int = 65536  # what databases and sorting in many pieces take; it costs nothing until it is used
    open_files_max: int = 1 << 20  # the kernel's own bound, unless somebody has raised it
    reconcile_s: float = 45.0

    @property
    def host(self) -> str:
        """The host part of the address."""
        return self.address.rpartition(":")[0]

    @property
    def port(self) -> int:
        """The port of the API."""
        return int(self.address.rpartition(":")[2])


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """What a client needs: addresses of nodes, tried in this order, and the time one call may take.

    Attributes:
        credentials: file of a secured cluster's credentials; ``none``: plain text; empty: the command line takes the
            usual file, if it is there.
        bearer_file: file with a bearer token, which then says who is calling.
    """

    nodes: tuple[str, ...] = (DEFAULT_ADDRESS,)
    timeout_s: float = 20.0
    credentials: str = ""
    bearer_file: str = ""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from: `kind` is flag, environment, file or default, `where` names it."""

    kind: str
    where: str = ""

    def __str__(self) -> str:
        return self.where or self.kind


@dataclass(frozen=True, slots=True)
class Resolved:
    """A node's settings, the origin of each by its field name, and what looked odd."""

    settings: Settings
    origins: Mapping[str, Origin]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ResolvedClient:
    """A client's settings, and the origin of each by its field name."""

    settings: ClientSettings
    origins: Mapping[str, Origin]


@dataclass(frozen=True, slots=True)
class FileTable:
    """The contents of a settings file."""

    path: str
    tables: Mapping[str, Any]


NODE_TABLE, CLIENT_TABLE = "node", "client"
# Variables that are not settings, some of them given to tasks. Only used to warn of mistyped names.
OTHER_VARIABLES = frozenset(
    {"SPINETTA_CONFIG", "SPINETTA_NODE", "SPINETTA_TIMEOUT", "SPINETTA_CREDENTIALS", "SPINETTA_BEARER_FILE"}
)


def resolve(
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    files: Sequence[FileTable],
    defaults: Mapping[str, Any],
) -> Resolved:
    """A node's settings from all places.

    Args:
        flags: by option key; None or absent: not given.
        environ: the process's environment.
        files: the earlier overrides the later.
        defaults: by option key, for what depends on the machine: name, data_dir. Others have theirs in `Settings`.

    Raises:
        UserError: names the field (``node.memory``), the origin and the mend.
    """
    for file in files:
        _check_tables(file)
    values, origins = _gather(NODE_OPTIONS, NODE_TABLE, flags, environ, files, defaults)
    settings = Settings(**{"address": DEFAULT_ADDRESS, **values})
    for option in NODE_OPTIONS:
        origins.setdefault(option.attribute, Origin("default"))
    _check_together(settings, origins)
    return Resolved(settings, origins, _odd_variables(environ))


def resolve_client(flags: Mapping[str, Any], environ: Mapping[str, str], files: Sequence[FileTable]) -> ResolvedClient:
    """A client's settings from all places; arguments and errors as for `resolve`."""
    for file in files:
        _check_tables(file)
    values, origins = _gather(CLIENT_OPTIONS, CLIENT_TABLE, flags, environ, files, {})
    for option in CLIENT_OPTIONS:
        origins.setdefault(option.attribute, Origin("default"))
    return ResolvedClient(ClientSettings(**values), origins)


def _gather(
    options: Sequence[Option],
    table: str,
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    files: Sequence[FileTable],
    defaults: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Origin]]:
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for option in options:
        for raw, origin in _candidates(option, table, flags, environ, files, defaults):
            values[option.attribute] = _parsed(option, raw, table, origin)
            origins[option.attribute] = origin
            break
    return values, origins


def _candidates(
    option: Option,
    table: str,
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    files: Sequence[FileTable],
    defaults: Mapping[str, Any],
) -> list[tuple[Any, Origin]]:
    """All values given for a setting, the strongest first. An empty variable counts as absent."""
    found: list[tuple[Any, Origin]] = []
    if flags.get(option.key) is not None:
        found.append((flags[option.key], Origin("flag", option.flag)))
    if environ.get(variable(option)):
        found.append((environ[variable(option)], Origin("environment", variable(option))))
    for file in files:
        entries = file.tables.get(table, {})
        if option.key in entries:
            found.append((entries[option.key], Origin("file", f"{file.path}, [{table}] {option.key}")))
    if option.key in defaults:
        found.append((defaults[option.key], Origin("default")))
    return found


def _parsed(option: Option, raw: Any, table: str, origin: Origin) -> Any:
    field_name = f"{table}.{option.key}"
    try:
        return option.parse(raw, field_name)
    except UserError as e:
        where = origin.where or f"the default of {option.key}"
        raise UserError(f"{where}: {e.message}", field=field_name, hint=e.hint, reason=e.reason) from e


def _check_tables(file: FileTable) -> None:
    """Refuse what no setting is called: a mistyped name must not pass for a default."""
    known = {NODE_TABLE: NODE_OPTIONS, CLIENT_TABLE: CLIENT_OPTIONS}
    for name, entries in file.tables.items():
        if name not in known:
            raise UserError(
                f"{file.path}: unknown table or setting {names.quoted(name)}",
                field=name,
                hint="settings stand under [node] or [client]",
            )
        if not isinstance(entries, Mapping):
            raise UserError(f"{file.path}: {name} must be a table", field=name, hint=f"write [{name}]")
        keys = {option.key for option in known[name]}
        for key in entries:
            if key not in keys:
                raise UserError(
                    f"{file.path}: unknown setting {names.quoted(key)} in [{name}]",
                    field=f"{name}.{key}",
                    hint=names.did_you_mean(key, keys),
                )


def _odd_variables(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Warnings of variables that look like mistyped settings. No error: programs of all kinds may set variables."""
    known = {variable(option) for option in NODE_OPTIONS} | OTHER_VARIABLES
    short = [name.removeprefix(VARIABLE_PREFIX) for name in sorted(known)]
    odd = []
    for name in sorted(environ):
        if name.startswith(VARIABLE_PREFIX) and name not in known:
            near = difflib.get_close_matches(name.removeprefix(VARIABLE_PREFIX), short, n=1, cutoff=0.75)
            if near:
                odd.append(f"environment variable {name} is no setting (did you mean {VARIABLE_PREFIX}{near[0]}?)")
    return tuple(odd)


def _check_together(s: Settings, origins: Mapping[str, Origin]) -> None:
    """Values that are lawful alone and contradict each other."""

    def where(attribute: str) -> str:
        return str(origins[attribute])

    if s.token and s.token_file:
        raise UserError(
            f"a token is given twice, by {where('token')} and {where('token_file')}",
            field="node.token",
            hint="give one",
        )
    if s.tls == "off" and (s.token or s.token_file):
        raise UserError("a token is of no use with tls off", field="node.tls", hint="leave one of them away")
    if s.tls == "off":
        for address in (s.address, *s.peers):
            names.require_loopback(address, "node.tls")
    # The shim kills at renewal + grace - margin. A node is suspected only after lease_ttl_s of silence: killing
    # earlier than that would end tasks of a node whose registration still stands.
    shortest_s = s.lease_ttl_s + s.kill_margin_s
    if s.grace_s <= shortest_s:
        raise UserError(
            f"grace of {units.format_duration(s.grace_s)} (from {where('grace_s')}) is not longer than lease_ttl "
            f"{units.format_duration(s.lease_ttl_s)} (from {where('lease_ttl_s')}) + kill_margin "
            f"{units.format_duration(s.kill_margin_s)} (from {where('kill_margin_s')})",
            field="node.grace",
            hint=f"set grace above {units.format_duration(shortest_s)}, or shorten the other two",
        )
    devices.check_counts(s.countables, s.devices, "node.countables")
    if s.open_files > s.open_files_max:
        raise UserError(
            f"open_files {s.open_files} (from {where('open_files')}) is more than open_files_max {s.open_files_max} "
            f"(from {where('open_files_max')})",
            field="node.open_files",
            hint="lower it, or raise the other",
        )
    if s.address in s.peers:
        raise UserError(
            f"peers (from {where('peers')}) name this node's own address {s.address}",
            field="node.peers",
            hint="name another node, or leave --peers away to start a new cluster",
        )
    ports: dict[int, str] = {s.port: "address"}
    for attribute, port in (("etcd_client_port", s.etcd_client_port), ("etcd_peer_port", s.etcd_peer_port)):
        if port and port in ports:
            raise UserError(
                f"{attribute} {port} (from {where(attribute)}) is also the port of {ports[port]}",
                field=f"node.{attribute}",
                hint="choose another, or 0 for any free one",
            )
        ports[port] = attribute
