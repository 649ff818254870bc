"""What must be done about the key of a clearance label: who makes it, who hands it on, when it is replaced.

The private key of each generation is wrapped to the sealing key of every node that was cleared when it was last looked
at. Granting a clearance asks for one more wrap, withdrawing one (or replacing a machine) for a new generation: what the
node has seen it has seen, but nothing sealed from then on opens for it. Nobody is in charge: every node that can do it
comes to the same plan and the one ranked first carries it out, guarded by the revision of the record, so that two at
once do no harm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from spinetta import trustcodec
from spinetta.access import MEMBERS, LabelGeneration, LabelKey, NodeAcl, NodeRole, Wrap
from spinetta.errors import CorruptRecord

KEY_ID_BYTES = 8
GENERATIONS_MAX = 32  # kept in one record; each is a wrap of about 100 bytes for each cleared node
RECORD_BYTES_MAX = 1_000_000  # of a label's record: a write takes 1.5 MiB at most
SEALED_BYTES_MAX = 256  # of one wrap; ours have 81
WRAP_BYTES = 180  # of one wrap in the record at most: 81 sealed, the id, a name of 63, and framing


@dataclass(frozen=True, slots=True)
class Cleared:
    """A node that is cleared for a label. `live`: it is up, as far as the store knows."""

    name: str
    sealing_key: bytes
    role: NodeRole
    live: bool


@dataclass(frozen=True, slots=True)
class Create:
    """There is no key yet: make generation 1 for all that are cleared."""

    label: str
    nodes: tuple[Cleared, ...]


@dataclass(frozen=True, slots=True)
class HandOn:
    """Nodes that are cleared have no wrap of a generation: make them one. What is not to be opened here is left out."""

    label: str
    missing: tuple[tuple[int, tuple[Cleared, ...]], ...]


@dataclass(frozen=True, slots=True)
class Replace:
    """Somebody may know the key who is no longer cleared: make generation `number`, for those that are."""

    label: str
    number: int
    nodes: tuple[Cleared, ...]
    withdrawn: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Drop:
    """Nothing is sealed to these generations any more: nobody will need them."""

    label: str
    numbers: tuple[int, ...]


Step = Create | HandOn | Replace | Drop


def key_id(sealing_key: bytes) -> bytes:
    """Tells one sealing key of a node from another."""
    return hashlib.sha256(sealing_key).digest()[:KEY_ID_BYTES]


def stored(label: str, value: bytes) -> LabelKey:
    """The key of a label, as it is stored.

    Raises:
        CorruptRecord: it cannot be read, or is another's.
    """
    key = trustcodec.decode(LabelKey, value)
    numbers = [g.number for g in key.generations]
    if key.label != label or not numbers or numbers != sorted(set(numbers)):
        raise CorruptRecord(f"the key of label {label} cannot be read: it is another's, or has no generations in order")
    return key


def cleared_for(label: str, nodes: Iterable[NodeAcl], live: Collection[str]) -> tuple[Cleared, ...]:
    """The nodes that may have the key of a label, by name. Every approved node may have that of `MEMBERS`."""
    return tuple(
        Cleared(n.name, n.sealing_key, n.role, n.name in live)
        for n in sorted(nodes, key=lambda n: n.name)
        if not n.revoked and n.sealing_key and (label == MEMBERS or label in n.effective)
    )


def has_wrap(generation: LabelGeneration, node: Cleared) -> bool:
    """The node can open this generation."""
    wanted = key_id(node.sealing_key)
    return any(w.node == node.name and w.key_id == wanted for w in generation.wraps)


def plan(label: str, key: LabelKey | None, cleared: Sequence[Cleared], unused: Collection[int] = ()) -> Step | None:
    """What is to be done about a label's key now; None: nothing.

    Args:
        label: which.
        key: its record; None: there is none.
        cleared: the nodes cleared for it, see `cleared_for`.
        unused: generations that nothing is sealed to, as far as that has been found out for certain.
    """
    if not cleared:
        return None  # whoever is cleared next finds it as it is
    nodes = tuple(cleared)
    if key is None:
        return Create(label, nodes)
    latest = key.latest
    withdrawn = _withdrawn(latest, cleared)
    # Without a holder among the cleared nobody could hand the key on, and the label would be dead for ever.
    if withdrawn or len(_lacking(latest, cleared)) == len(nodes):
        return Replace(label, latest.number + 1, nodes, withdrawn)
    missing = tuple(
        (g.number, lacking)
        for g in key.generations
        if len(lacking := _lacking(g, cleared)) not in (0, len(nodes))  # what nobody can open is nobody's to hand on
    )
    if missing:
        return HandOn(label, missing)
    old = tuple(g.number for g in key.generations[:-1] if g.number in unused)
    return Drop(label, old) if old else None


def _lacking(generation: LabelGeneration, cleared: Sequence[Cleared]) -> tuple[Cleared, ...]:
    have = {(w.node, w.key_id) for w in generation.wraps}
    return tuple(n for n in cleared if (n.name, key_id(n.sealing_key)) not in have)


def _withdrawn(generation: LabelGeneration, cleared: Sequence[Cleared]) -> tuple[str, ...]:
    """Nodes with a wrap that should have none: not cleared, revoked, or another machine has the name now."""
    may = {(n.name, key_id(n.sealing_key)) for n in cleared}
    return tuple(sorted({w.node for w in generation.wraps if (w.node, w.key_id) not in may}))


def doer(step: Step, key: LabelKey | None, cleared: Sequence[Cleared]) -> str:
    """Which node carries a step out; empty: none that is up can.

    One that can open the key, where that is needed; one of role voter before workers, since it needs no go-between.
    """
    able = [n for n in cleared if n.live]
    if isinstance(step, HandOn) and key is not None:
        by_number = {g.number: g for g in key.generations}
        able = [n for n in able if any(has_wrap(by_number[number], n) for number, _ in step.missing)]
    voters = [n for n in able if n.role is NodeRole.VOTER]
    return max((voters or able), key=lambda n: (_weight(n.name, step.label), n.name)).name if able else ""


def _weight(node: str, label: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{node}\0{label}".encode(), digest_size=8).digest(), "big")


# --- the records that steps lead to ------------------------------------------------------------------------------


def extended(key: LabelKey, wraps: Mapping[int, Sequence[Wrap]]) -> LabelKey:
    """With more wraps; one for a node that has one already replaces it."""
    generations = []
    for g in key.generations:
        new = {w.node: w for w in wraps.get(g.number, ())}
        kept = [w for w in g.wraps if w.node not in new]
        generations.append(replace(g, wraps=tuple(sorted([*kept, *new.values()], key=lambda w: w.node))))
    return replace(key, generations=tuple(generations))


def replaced(key: LabelKey, generation: LabelGeneration, cleared: Sequence[Cleared]) -> LabelKey:
    """With one more generation; older ones lose the wraps of those no longer cleared, the oldest go past the limit."""
    may = {(n.name, key_id(n.sealing_key)) for n in cleared}
    older = (replace(g, wraps=tuple(w for w in g.wraps if (w.node, w.key_id) in may)) for g in key.generations)
    return replace(key, generations=_fitting((*older, generation)[-GENERATIONS_MAX:]))


def _fitting(generations: tuple[LabelGeneration, ...]) -> tuple[LabelGeneration, ...]:
    """The latest ones, as many as the record can hold; always the very latest."""
    room = RECORD_BYTES_MAX
    kept = 0
    for g in reversed(generations):
        room -= WRAP_BYTES * (len(g.wraps) + 1)
        if room < 0 and kept:
            break
        kept += 1
    return generations[-kept:]


def without(key: LabelKey, numbers: Collection[int]) -> LabelKey:
    """Without generations that nobody needs; never without the latest."""
    kept = tuple(g for g in key.generations if g.number not in numbers or g.number == key.latest.number)
    return replace(key, generations=kept)


def why_not_update(
    old: LabelKey | None, new: LabelKey, caller: str, cleared: Sequence[Cleared], *, may_drop: bool = False
) -> str:
    """Why a node may not make this the record of a label's key; empty: it may.

    It must be cleared itself and may wrap for cleared nodes only. It may neither alter the public part of a generation
    that is there, nor what is wrapped for others who are cleared, nor make a new generation that the plan does not ask
    for, nor drop one (unless `may_drop`: only who sees all that is stored knows that nothing needs it).

    It could wrap nonsense in a new generation; then the others cannot open what they are cleared for, which they say.
    Nobody can be kept from that who makes keys at all.
    """
    may = {n.name: key_id(n.sealing_key) for n in cleared}
    if caller not in may:
        return f"node {caller} is not cleared for the label"
    known = {g.number: g for g in old.generations} if old is not None else {}
    newest = max(known, default=0)
    numbers = [g.number for g in new.generations]
    why = _why_not_numbers(old, new, cleared, may_drop=may_drop)
    if why:
        return why
    for g in new.generations:
        before = known.get(g.number)
        why = _why_malformed(g) or (_why_altered(before, g, may) if before is not None else "")
        if why:
            return why
        had = set(before.wraps) if before is not None else set()
        for w in g.wraps:
            if may.get(w.node) != w.key_id and w not in had:
                return f"node {w.node} is not cleared for the label"
    if numbers[-1] == newest + 1 and not any(w.node == caller for w in new.latest.wraps):
        return "who makes a key must be able to open it"
    return ""


def _why_not_numbers(old: LabelKey | None, new: LabelKey, cleared: Sequence[Cleared], *, may_drop: bool) -> str:
    """Whether the generations are those that may be there."""
    if not new.generations or len(new.generations) > GENERATIONS_MAX:
        return f"a label's key has 1 to {GENERATIONS_MAX} generations"
    before = [g.number for g in old.generations] if old is not None else []
    after = [g.number for g in new.generations]
    newest = max(before, default=0)
    if after != sorted(set(after)) or after[-1] not in (newest, newest + 1) or after[-1] < 1:
        return "generations are numbered upwards, one by one"
    if after[-1] == newest + 1:
        if not isinstance(plan(new.label, old, cleared), Create | Replace):
            return "the label needs no new key"
        expected = replaced(old, new.latest, cleared).generations if old is not None else new.generations[-1:]
        return "" if after == [g.number for g in expected] else "a new key is added to those that are there"
    if not set(after) <= set(before):
        return "generations are numbered upwards, one by one"
    return "" if may_drop or after == before else "a generation is missing"


def _why_malformed(g: LabelGeneration) -> str:
    lawful = (
        len(g.public_key) == 32
        and len({w.node for w in g.wraps}) == len(g.wraps)
        and all(len(w.sealed) <= SEALED_BYTES_MAX and len(w.key_id) == KEY_ID_BYTES for w in g.wraps)
    )
    return "" if lawful else f"generation {g.number} is malformed"


def _why_altered(before: LabelGeneration, after: LabelGeneration, may: Mapping[str, bytes]) -> str:
    if before.public_key != after.public_key:
        return f"generation {after.number} has another public key already"
    lost = [w.node for w in before.wraps if may.get(w.node) == w.key_id and w not in after.wraps]
    return f"generation {after.number} is taken from {', '.join(sorted(lost))}" if lost else ""
