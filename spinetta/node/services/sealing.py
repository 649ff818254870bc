"""What of a submit may be stored: a labelled task only sealed, and only to the present keys of its labels."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from spinetta import confidential, keys, labelkeys, names, payload, validate
from spinetta.access import Envelope, LabelKey
from spinetta.errors import UserError
from spinetta.match import uncleared
from spinetta.model import TaskSpec
from spinetta.node.labeldesk import LABELS_MAX
from spinetta.node.port import NodePort
from spinetta.node.services import lookup
from spinetta.store.protocol import Store
from spinetta.trust.envelope import LabelPublicKey, seal_envelope

_SEALED_PER_TURN = 40  # before other calls get a turn: about 5 ms
STALE = "stale-label-key"  # a client seals again to the present key and tries again


def open_cluster(what: str, field: str) -> UserError:
    """What needs identities, in a cluster that has none."""
    return UserError(
        f"this cluster is an open one: it has no {what}",
        field=field,
        hint="found a secured cluster: spinetta node join --tls on",
        reason="open-cluster",
    )


async def seal_or_refuse(specs: Sequence[TaskSpec], port: NodePort) -> list[TaskSpec]:
    """The specifications as they may be stored.

    Those that are sealed must be so to the present keys of their labels. A payload that came in clear is sealed here
    if this node is cleared for it, since it then may read it anyway (for clients that cannot seal); any other node
    refuses it.

    Raises:
        UserError: it cannot be taken; nothing of it is kept or logged. Reason ``unsealed`` or ``stale-label-key``.
        StoreUnavailable: the keys cannot be read now.
    """
    labels = sorted({label for spec in specs for label in spec.clearance[: confidential.CLEARANCE_LABELS_MAX]})
    if port.credentials is None:
        for i, spec in enumerate(specs):
            if spec.clearance or spec.sealed is not None:
                raise open_cluster("clearance labels", f"tasks[{i}].clearance")
            if spec.secrets:
                raise open_cluster("secrets", f"tasks[{i}].secrets")
        return list(specs)
    if not labels:
        return list(specs)
    if len(labels) > LABELS_MAX:
        raise UserError(
            f"{len(labels)} clearance labels in one request",
            field="tasks",
            hint=f"at most {LABELS_MAX}; split them",
            reason="too-large",
        )
    for label in labels:
        names.check_clearance(label, "clearance")
    known = await label_keys(port.store, labels)
    ready = []
    for i, spec in enumerate(specs):
        if spec.sealed is not None:
            check_fresh(spec.sealed, known, f"tasks[{i}].sealed")
        ready.append(_sealed(spec, known, port, i) if spec.clearance and spec.sealed is None else spec)
        if i % _SEALED_PER_TURN == _SEALED_PER_TURN - 1:
            await asyncio.sleep(0)
    return ready


def _sealed(spec: TaskSpec, known: dict[str, LabelKey], port: NodePort, index: int) -> TaskSpec:
    field = f"tasks[{index}]"
    lacking = uncleared(spec.clearance, port.clearances)
    if lacking:
        raise UserError(
            f"the task came in clear to a node that is not cleared for {', '.join(lacking)}",
            field=f"{field}.clearance",
            hint="submit it with this package's client, which seals it, or through a node that is cleared for it",
            reason="unsealed",
        )
    validate.check_spec(spec, field, grace_min_s=port.grace_min_s, to_be_sealed=True)
    for label in spec.clearance:
        if label not in known:
            raise no_key(label, f"{field}.clearance")
    to = [LabelPublicKey(label, known[label].latest.number, known[label].latest.public_key) for label in spec.clearance]
    purpose = payload.task_purpose(spec.id, spec.clearance)
    return payload.hollow(spec, seal_envelope(payload.encode_payload(spec), to, purpose))


async def label_keys(store: Store, labels: Iterable[str]) -> dict[str, LabelKey]:
    """The keys of those labels that have one."""
    found = await lookup.read_all(store, [keys.label(label) for label in labels])
    return {(label := k.removeprefix(keys.LABEL)): labelkeys.stored(label, entry.value) for k, entry in found.items()}


def check_fresh(envelope: Envelope, known: dict[str, LabelKey], field: str) -> None:
    """Raise UserError unless every share is sealed to the latest key of its label."""
    for share in envelope.shares:
        key = known.get(share.label)
        if key is None:
            raise no_key(share.label, field)
        if share.generation != key.latest.number:
            raise UserError(
                f"sealed to key {share.generation} of label {share.label}, which has been replaced",
                field=field,
                hint="get the keys of the labels again, seal to them, and try again",
                reason=STALE,
            )


def no_key(label: str, field: str) -> UserError:
    """Nobody is cleared for a label, or nobody has had the time to make its key."""
    return UserError(
        f"there is no key for label {names.quoted(label)}",
        field=field,
        hint="a node that is cleared for it makes it within seconds; is there one? spinetta node list",
        reason="no-label-key",
    )
