"""The exchange of a certificate authority for a new one, step by step, as values.

1. `begin`: the new one is NEXT: everybody is told to believe it; nobody is signed by it yet.
2. Every live node believes it: it becomes ACTIVE and signs, the old one is RETIRING: believed, but signs no more.
3. Every live node has a certificate by the new one, and the overlap is over: the old one is dropped.

One at a time: `begin` refuses while another is under way. Each step is a new generation.

Nodes say themselves how far they are, and one that is hostile or stuck could say so for ever. A worker is waited for
until the overlap is over (and a little longer, for the honest): then it is left behind, and has to join again. A voter
holds it up as long as it lives: it signs, and could shut the others out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from spinetta.access import Authorities, AuthorityEntry, AuthorityState, NodeRole
from spinetta.errors import UserError

ENTRIES_MAX = 3  # in a rotation two; one more than that is a bug somewhere
NAMED_MAX = 20  # nodes in one message or listing
PATIENCE_MS = 120_000  # with workers past the overlap: an honest one looks every 5 s, after failures every 30 s


@dataclass(frozen=True, slots=True)
class NodeTrust:
    """What a live node says of its certificates.

    Attributes:
        believes: the generation of the authorities it believes.
        signed: the latest generation whose signing authority has signed its certificate.
        role: one whose rights cannot be read counts as a voter: it may be one.
    """

    name: str
    believes: int
    signed: int
    role: NodeRole = NodeRole.VOTER


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


def retire_now(authorities: Authorities, nodes: Sequence[NodeTrust], *, now_ms: int) -> Authorities:
    """Do not wait any longer. While the new authority does not sign yet because of workers only: it signs from now on.
    Else the overlap ends: the old authority is dropped as soon as every live node has moved, or `PATIENCE_MS` later if
    workers have not. That is the same generation: nobody has to believe anything else.

    Raises:
        UserError: none is about to retire, or a live voter does not believe the new one yet.
    """
    if not under_way(authorities):
        raise UserError(
            f"no {authorities.kind} authority is retiring",
            field="retire_now",
            reason="no-rotation",
            hint="rotate first",
        )
    if is_announced(authorities):
        voters = [n for n in nodes if n.role is NodeRole.VOTER]
        late = [n.name for n in lagging(authorities, voters)]
        if late or not voters:
            raise UserError(
                f"the new {authorities.kind} authority does not sign yet: voters that do not believe it: "
                f"{', '.join(late[:NAMED_MAX]) or 'none is known'}",
                hint="see: spinetta cluster authorities; try again in a minute, or stop those that stay behind",
                reason="not-signing-yet",
            )
        return _signing(authorities, now_ms)
    entries = tuple(
        replace(e, retire_at_ms=min(e.retire_at_ms, now_ms)) if e.state is AuthorityState.RETIRING else e
        for e in authorities.entries
    )
    return replace(authorities, entries=entries)


def is_announced(authorities: Authorities) -> bool:
    """Whether there is a new authority that does not sign yet."""
    return any(e.state is AuthorityState.NEXT for e in authorities.entries)


def lagging(authorities: Authorities, nodes: Sequence[NodeTrust]) -> list[NodeTrust]:
    """Those that the next step waits for; none when no rotation is under way."""
    if not under_way(authorities):
        return []
    generation, announced = authorities.generation, is_announced(authorities)
    return [n for n in nodes if n.believes < generation or (not announced and n.signed < generation)]


def advance_rotation(authorities: Authorities, nodes: Sequence[NodeTrust], now_ms: int) -> Authorities:
    """The next step, if it is due; else the same value.

    Args:
        authorities: of one kind.
        nodes: those alive that have certificates by it. No voter among them: not known, so nothing is done.
        now_ms: wall clock. A wrong one ends the overlap early or late; no step is taken before the voters are ready.
    """
    if not under_way(authorities) or not any(n.role is NodeRole.VOTER for n in nodes):
        return authorities
    late = lagging(authorities, nodes)
    if any(n.role is NodeRole.VOTER for n in late):
        return authorities
    retire_at_ms = max(e.retire_at_ms for e in authorities.entries)
    if is_announced(authorities):
        # Who lags is still let in: the new one is certified by the old.
        return _signing(authorities, now_ms) if not late or now_ms >= retire_at_ms else authorities
    if late and now_ms < retire_at_ms + PATIENCE_MS:
        return authorities
    kept = tuple(
        replace(e, cross_pem=b"") if e.state is AuthorityState.ACTIVE else e
        for e in authorities.entries
        if e.state is AuthorityState.ACTIVE or e.retire_at_ms > now_ms
    )
    if len(kept) == len(authorities.entries):
        return authorities
    return Authorities(authorities.kind, authorities.generation + 1, kept)


def _signing(authorities: Authorities, now_ms: int) -> Authorities:
    """The new one signs. The old one is believed for a moment more, however late it is: all must get new ones first."""
    entries = tuple(_moved_on(e, now_ms) for e in authorities.entries)
    return Authorities(authorities.kind, authorities.generation + 1, entries)


def _moved_on(entry: AuthorityEntry, now_ms: int) -> AuthorityEntry:
    if entry.state is AuthorityState.ACTIVE:  # it signs no more: nobody needs its key
        until_ms = max(entry.retire_at_ms, now_ms)
        return replace(entry, state=AuthorityState.RETIRING, wraps=(), retire_at_ms=until_ms)
    return replace(entry, state=AuthorityState.ACTIVE) if entry.state is AuthorityState.NEXT else entry


def without_node(authorities: Authorities, node: str) -> Authorities:
    """The same, but nothing sealed to this node any more. What it has read before it still knows."""
    entries = tuple(replace(e, wraps=tuple(w for w in e.wraps if w.node != node)) for e in authorities.entries)
    return replace(authorities, entries=entries)
