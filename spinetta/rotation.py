"""The exchange of a certificate authority for a new one, step by step, as values.

1. `begin`: the new one is NEXT: everybody is told to believe it; nobody is signed by it yet.
2. Every live node believes it: it becomes ACTIVE and signs, the old one is RETIRING: believed, but signs no more.
3. Every live node has a certificate by the new one, and the overlap is over: the old one is dropped.

One at a time: `begin` refuses while another is under way. Each step is a new generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from spinetta.access import Authorities, AuthorityEntry, AuthorityState
from spinetta.errors import UserError

ENTRIES_MAX = 3  # in a rotation two; one more than that is a bug somewhere


@dataclass(frozen=True, slots=True)
class NodeTrust:
    """What a live node says of its certificates.

    Attributes:
        believes: the generation of the authorities it believes.
        signed: the latest generation whose signing authority has signed its certificate.
    """

    name: str
    believes: int
    signed: int


def under_way(authorities: Authorities) -> bool:
    """Whether a rotation has begun and not ended."""
    return any(e.state is not AuthorityState.ACTIVE for e in authorities.entries)


def check_may_begin(authorities: Authorities) -> None:
    """See that no rotation is under way.

    Raises:
        UserError: one is.
    """
    if under_way(authorities):
        raise UserError(
            f"a rotation of the {authorities.kind} authority is under way",
            field="kind",
            reason="rotation-under-way",
            hint="see: spinetta cluster authorities; spinetta cluster rotate-ca --retire-now ends an overlap early",
        )


def begin(authorities: Authorities, entry: AuthorityEntry, *, now_ms: int, overlap_s: float) -> Authorities:
    """A new authority is announced. The old one is believed for `overlap_s` more at least.

    Raises:
        UserError: a rotation is under way.
    """
    check_may_begin(authorities)
    old = replace(authorities.active, retire_at_ms=now_ms + int(overlap_s * 1000))
    new = replace(entry, state=AuthorityState.NEXT, created_ms=now_ms, retire_at_ms=0)
    return Authorities(authorities.kind, authorities.generation + 1, (old, new))


def retire_now(authorities: Authorities, *, now_ms: int) -> Authorities:
    """End the overlap: the old authority is dropped as soon as every live node has moved. Same generation: nobody
    has to believe anything else.

    Raises:
        UserError: none is about to retire.
    """
    if not under_way(authorities):
        raise UserError(
            f"no {authorities.kind} authority is retiring",
            field="retire_now",
            reason="no-rotation",
            hint="rotate first",
        )
    entries = tuple(
        replace(e, retire_at_ms=min(e.retire_at_ms, now_ms)) if e.state is not AuthorityState.NEXT else e
        for e in authorities.entries
    )
    return replace(authorities, entries=entries)


def advance_rotation(authorities: Authorities, nodes: Sequence[NodeTrust], now_ms: int) -> Authorities:
    """The next step, if it is due; else the same value.

    Args:
        authorities: of one kind.
        nodes: those alive that have certificates by it. None at all: not known, so nothing is done.
        now_ms: wall clock. A wrong one ends the overlap early or late, but no step is taken before its nodes are ready.
    """
    if not nodes or not under_way(authorities):
        return authorities
    generation = authorities.generation
    if any(e.state is AuthorityState.NEXT for e in authorities.entries):
        if any(n.believes < generation for n in nodes):
            return authorities
        return Authorities(authorities.kind, generation + 1, tuple(_moved_on(e) for e in authorities.entries))
    if any(n.signed < generation or n.believes < generation for n in nodes):
        return authorities
    kept = tuple(
        replace(e, cross_pem=b"") if e.state is AuthorityState.ACTIVE else e
        for e in authorities.entries
        if e.state is AuthorityState.ACTIVE or e.retire_at_ms > now_ms
    )
    if len(kept) == len(authorities.entries):
        return authorities
    return Authorities(authorities.kind, generation + 1, kept)


def _moved_on(entry: AuthorityEntry) -> AuthorityEntry:
    if entry.state is AuthorityState.ACTIVE:
        return replace(entry, state=AuthorityState.RETIRING, wraps=())  # it signs no more: nobody needs its key
    return replace(entry, state=AuthorityState.ACTIVE) if entry.state is AuthorityState.NEXT else entry


def without_node(authorities: Authorities, node: str) -> Authorities:
    """The same, but nothing sealed to this node any more. What it has read before it still knows."""
    entries = tuple(replace(e, wraps=tuple(w for w in e.wraps if w.node != node)) for e in authorities.entries)
    return replace(authorities, entries=entries)
