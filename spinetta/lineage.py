"""What a cluster says of its past: the record of its generation, and of its latest backup.

A cluster that was made from a backup, or from what one voter still had, follows another one. Its generation is written
into it before anybody can reach it, and fences all that is older; the ids of the clusters before it tell the nodes of
those that they belong here now.
"""

from __future__ import annotations

from dataclasses import dataclass

from spinetta.codec import parse
from spinetta.errors import CorruptRecord
from spinetta.v1 import record_pb2 as pb

FORMER_MAX = 64  # clusters before this one that are remembered: whoever comes from an older one joins anew


@dataclass(frozen=True, slots=True)
class Generation:
    """The value of ``/generation``.

    Attributes:
        id: at random.
        former_cluster_ids: of etcd's clusters that this one follows, hexadecimal, the latest last.
        made_ms: when, by the clock of the machine where it was made.
        how: ``restore`` or ``recover``.
    """

    id: str
    former_cluster_ids: tuple[str, ...] = ()
    made_ms: int = 0
    how: str = ""

    def follows(self, cluster_id: str) -> bool:
        """Whether what this cluster holds began as that of the other."""
        return bool(cluster_id) and cluster_id in self.former_cluster_ids


@dataclass(frozen=True, slots=True)
class BackupRecord:
    """The value of ``/backup``: when the latest backup was begun, of which of etcd's clusters, by whom and where."""

    cluster_id: str
    taken_ms: int = 0
    taken_by: str = ""
    node: str = ""


def successor(old: Generation | None, cluster_id: str, *, generation_id: str, made_ms: int, how: str) -> Generation:
    """The generation of a cluster made from the data of another (`cluster_id`; empty: not known)."""
    former = old.former_cluster_ids if old is not None else ()
    if cluster_id and cluster_id not in former:
        former = (*former, cluster_id)
    return Generation(generation_id, former[-FORMER_MAX:], made_ms, how)


def encode_generation(g: Generation) -> bytes:
    """The value of ``/generation``."""
    return pb.Generation(
        id=g.id, former_cluster_ids=g.former_cluster_ids, made_ms=g.made_ms, how=g.how
    ).SerializeToString(deterministic=True)


def decode_generation(data: bytes) -> Generation | None:
    """The value of ``/generation``; None when nobody can read it, which is as good as none."""
    try:
        m = parse(pb.Generation(), data, "the generation")
    except CorruptRecord:
        return None
    return Generation(m.id, tuple(m.former_cluster_ids), m.made_ms, m.how)


def encode_backup(b: BackupRecord) -> bytes:
    """The value of ``/backup``."""
    return pb.Backup(cluster_id=b.cluster_id, taken_ms=b.taken_ms, taken_by=b.taken_by, node=b.node).SerializeToString(
        deterministic=True
    )


def decode_backup(data: bytes) -> BackupRecord | None:
    """The value of ``/backup``; None when nobody can read it."""
    try:
        m = parse(pb.Backup(), data, "the record of a backup")
    except CorruptRecord:
        return None
    return BackupRecord(m.cluster_id, m.taken_ms, m.taken_by, m.node)
