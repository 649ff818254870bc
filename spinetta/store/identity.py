"""What a node remembers on disk about its place in the cluster, outside etcd's own directory.

The reason it exists: an etcd member restarted with an empty directory under its old identity has forgotten what it
voted for, and the cluster may then lose committed data without a word. So that "I was a member" is kept elsewhere, and
etcd is never started when the two do not agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from spinetta.errors import UserError
from spinetta.store.wal import wal_owner

FORMAT = 1  # of the file; a reader refuses what is newer than itself
_LISTS = ("endpoints", "gateways")
IDENTITY_BYTES_MAX = 64 << 10  # ours has less than 2 KB; anything larger is not ours


@dataclass(frozen=True, slots=True)
class Identity:
    """A node's memory of itself. Ids are hexadecimal, as etcd prints them; empty or 0: not known, or none.

    Attributes:
        node: its name.
        cluster_id: of etcd's cluster.
        member_id: of its own member; empty on a worker.
        has_joined: its member has been part of the cluster: its data must be there. To be set once the member has
            started and *before* it can be promoted, respectively before the new cluster is used.
        initial_cluster: what its member was first started with.
        address: HOST:PORT of the API.
        etcd_client_port, etcd_peer_port: as chosen at the first start.
        endpoints: client URLs of voters, as last seen: where a restarted node without a seat finds the cluster.
        gateways: API addresses of voters, as last seen: where a restarted worker of a secured cluster finds it.
        incarnation_id: of its latest life, which the next daemon goes on with.
        drain: an administrator has drained it, and it stays so until that is taken back: "drain", "release" (what may
            be started again is given back) or "force" (all is); empty: it takes tasks.
        shims: "later": what it holds is not in its first shim's directory alone. Else empty and not written, so that a
            version of before there were others, which would take their tasks for lost, refuses this file meanwhile.
    """

    node: str
    cluster_id: str = ""
    member_id: str = ""
    has_joined: bool = False
    initial_cluster: str = ""
    address: str = ""
    etcd_client_port: int = 0
    etcd_peer_port: int = 0
    endpoints: tuple[str, ...] = ()
    gateways: tuple[str, ...] = ()
    incarnation_id: str = ""
    drain: str = ""
    shims: str = ""


def load(path: Path) -> Identity | None:
    """What was saved; None when nothing was.

    Raises:
        UserError: there is a file, but not one that this version understands. It is left as it is.
    """
    try:
        with path.open("rb") as file:
            data = file.read(IDENTITY_BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", reason="identity") from error
    try:
        return _parse(data)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged: {error}",
            hint="put back a copy of it; or, if this node may be given up: spinetta node confirm-dead at another one, "
            "move its data directory away and join anew",
            reason="identity",
        ) from error


def _parse(data: bytes) -> Identity:
    if len(data) > IDENTITY_BYTES_MAX:
        raise ValueError("too large")
    document = json.loads(data)
    if not isinstance(document, dict):
        raise TypeError("not an object")
    version = document.pop("format", None)
    if version is None:
        raise ValueError("it has no format")
    if version != FORMAT:
        raise ValueError(f"format {version} is not known to this version of Spinetta")
    # Of what an administrator has edited, or an earlier version written, there is none.
    checksum = document.pop("sum", None)
    if checksum is not None and checksum != _checksum(document):
        raise ValueError('its checksum is wrong (if it was edited on purpose, remove the line with "sum")')
    known = {each.name: type(each.default) for each in fields(Identity)} | {"node": str}
    known |= dict.fromkeys(_LISTS, list)
    if unknown := sorted(set(document) - set(known)):
        raise ValueError(f"unknown fields: {', '.join(unknown)}")
    for name, value in document.items():
        if type(value) is not known[name]:
            raise TypeError(f"{name} is {value!r}")
    for name in _LISTS:
        document[name] = tuple(str(each) for each in document.get(name, ()))
    return Identity(**document)


def _checksum(document: Mapping[str, Any]) -> str:
    """A flipped bit must not make this node a member of another cluster, or one that has never joined."""
    return f"{zlib.crc32(json.dumps(document, sort_keys=True).encode()):08x}"


def save(path: Path, identity: Identity) -> None:
    """Replace what was saved: after a crash there is the old or the new one, whole.

    Raises:
        UserError: it cannot be written.
    """
    written = {name: value for name, value in asdict(identity).items() if name != "shims" or value}
    document: dict[str, Any] = {"format": FORMAT, "sum": _checksum(written), **written}
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                json.dump(document, file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)  # the rename itself must survive a power cut
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", reason="identity") from error


def check_data_dir(identity: Identity | None, data_dir: Path) -> None:
    """To be called before etcd is ever started on `data_dir`.

    Raises:
        UserError: what is there, or is not, does not agree with what the node remembers. Etcd must not be started.
    """
    owner = wal_owner(data_dir)
    if owner is None:
        if identity is not None and identity.has_joined:
            raise UserError(
                f"node {identity.node} is member {identity.member_id} of etcd cluster {identity.cluster_id}, but its "
                f"data is gone from {data_dir}: starting it empty could lose what the cluster has committed",
                hint="restore the directory; or remove the member at another node (spinetta etcdctl member remove "
                f"{identity.member_id}), move this node's data directory away and join anew",
                reason="data-wiped",
            )
        return
    member_id, cluster_id = owner
    if identity is None:
        raise UserError(
            f"{data_dir} holds the data of member {member_id} of etcd cluster {cluster_id}, but this node does not "
            "remember having been one",
            hint="restore the node's identity file, or move the directory away if its data is not needed",
            reason="foreign-data",
        )
    for kind, ours, theirs in (("cluster", identity.cluster_id, cluster_id), ("member", identity.member_id, member_id)):
        if ours and ours != theirs:
            raise UserError(
                f"{data_dir} holds the data of {kind} {theirs}, but node {identity.node} belongs to {kind} {ours}",
                hint="put back the right directory, or give the node another --data-dir",
                reason="foreign-data",
            )
