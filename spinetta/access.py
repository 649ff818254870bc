"""The nouns of trust: who may be here, and with which rights. Plain frozen values; what follows from them is in
`rights`, how they are stored in `trustcodec`."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

FINGERPRINT_DIGITS = 16  # hexadecimal, 64 bits: nobody makes a key to fit
MEMBERS = "members"
"""The label that every approved node is cleared for: what carries no other label is sealed to it."""


class NodeRole(enum.IntEnum):
    """What a node may become. The numbers are those of the stored records."""

    VOTER = 1  # may hold a seat; trusted with all that the store holds
    WORKER = 2  # reaches the store through a voter, and sees of it what concerns it


class UserRole(enum.IntEnum):
    """What a person may do; each role includes those before it."""

    VIEWER = 1  # see tasks and nodes
    USER = 2  # submit, cancel and read logs, for oneself and one's projects
    OPERATOR = 3  # the same for everybody; drain nodes
    ADMIN = 4  # users, tokens, nodes, policy, certificates


class TokenRole(enum.IntEnum):
    """What a join token may be redeemed for."""

    VOTER = 1
    WORKER = 2
    CLIENT = 3  # a person's certificate


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one identity may ask for; 0: the cluster's default.

    Attributes:
        calls_per_s: sustained; bursts of ten times as many are let through.
        tasks_per_s: tasks submitted a second, sustained.
    """

    calls_per_s: float = 0.0
    tasks_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class NodeAcl:
    """The value of ``/acl/node/NAME``: a node that has been approved.

    Attributes:
        clearances: labels granted to it, sorted.
        groups: those it is a member of, sorted.
        effective: clearances that its groups have as well, sorted: what counts.
        key_hash: SHA-256 of the public key in its certificate; a certificate for another key is not this node.
        sealing_key: X25519 public key, 32 bytes.
        next_key_hash: a second key that is good as well while a renewal is under way.
        revoked: it may do nothing any more.
        issued_after_ms: certificates issued before this moment do not count.
    """

    name: str
    role: NodeRole
    clearances: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    effective: tuple[str, ...] = ()
    key_hash: bytes = b""
    sealing_key: bytes = b""
    next_key_hash: bytes = b""
    revoked: bool = False
    reason: str = ""
    created_ms: int = 0
    created_by: str = ""
    issued_after_ms: int = 0


@dataclass(frozen=True, slots=True)
class UserAcl:
    """The value of ``/acl/user/NAME``: a person or program.

    Attributes:
        projects: owners, beside the own name, that tasks may be submitted for and are treated as one's own.
        clearances: labels whose tasks, logs and outputs the user may handle, sorted.
        issued_after_ms: certificates issued before this moment do not count (a lost key: log in anew).
    """

    name: str
    role: UserRole
    projects: tuple[str, ...] = ()
    clearances: tuple[str, ...] = ()
    revoked: bool = False
    reason: str = ""
    created_ms: int = 0
    created_by: str = ""
    issued_after_ms: int = 0
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """The value of ``/acl/token/ID``. The secret itself is known to nobody but its holder.

    Attributes:
        clearances, groups: what a node that redeems it may be granted.
        user: for `TokenRole.CLIENT`: whose certificate it gives.
        uses_left: 0: spent.
        approval: an administrator must approve each node that comes with it.
        last_key_hash: of the key that redeemed it last: the same one again gets the same answer.
    """

    id: str
    role: TokenRole
    salt: bytes
    secret_hash: bytes
    expires_ms: int
    uses_left: int
    clearances: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    user: str = ""
    approval: bool = False
    revoked: bool = False
    created_ms: int = 0
    created_by: str = ""
    last_key_hash: bytes = b""


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """The value of ``/acl/request/NAME``: a node that waits for approval. Its token has been spent already."""

    name: str
    role: NodeRole
    token_id: str
    csr: bytes
    etcd_csr: bytes
    sealing_key: bytes
    address: str
    key_hash: bytes
    clearances: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    rejected: bool = False
    created_ms: int = 0


def fingerprint(key_hash: bytes) -> str:
    """The beginning of a key's hash, which people compare."""
    return key_hash.hex()[:FINGERPRINT_DIGITS]


@dataclass(frozen=True, slots=True)
class GroupMapping:
    """What members of an issuer's group may do here."""

    group: str
    role: UserRole
    projects: tuple[str, ...] = ()
    clearances: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Issuer:
    """An OIDC issuer whose tokens are believed.

    Attributes:
        url: as in the ``iss`` claim; its configuration is at ``URL/.well-known/openid-configuration``.
        audience: must be among the ``aud`` claim.
        prefix: set before the names of its users, so that two issuers cannot name one person.
        name_claim, groups_claim: where the name and the groups are.
        groups: the first mapping whose group the token has decides, highest role first; without one: refused.
        ca_pem: to verify the issuer's certificate with; empty: the system's.
    """

    url: str
    audience: str
    prefix: str = ""
    name_claim: str = "sub"
    groups_claim: str = "groups"
    groups: tuple[GroupMapping, ...] = ()
    ca_pem: bytes = b""


@dataclass(frozen=True, slots=True)
class Policy:
    """The value of ``/acl/policy``. Times in seconds.

    Attributes:
        approval: each joining node must be approved by an administrator.
        node_certificate_s, user_certificate_s: lifetimes; renewed at two thirds.
        overlap_s: how long an old authority is still believed after a rotation.
    """

    approval: bool = False
    node_certificate_s: float = 60 * 86400.0
    user_certificate_s: float = 90 * 86400.0
    overlap_s: float = 90 * 86400.0
    limits: Limits = field(default_factory=Limits)
    issuers: tuple[Issuer, ...] = ()


class AuthorityState(enum.IntEnum):
    """Where a certificate authority stands in a rotation."""

    NEXT = 1  # believed everywhere soon, does not sign yet
    ACTIVE = 2  # signs
    RETIRING = 3  # believed still, signs no more


@dataclass(frozen=True, slots=True)
class Wrap:
    """A secret sealed to one node's sealing key. `key_id` tells which, for a name may come to another machine."""

    node: str
    sealed: bytes
    key_id: bytes = b""


@dataclass(frozen=True, slots=True)
class AuthorityEntry:
    """One certificate authority; its private key is sealed to every node of role voter."""

    certificate_pem: bytes
    state: AuthorityState
    wraps: tuple[Wrap, ...] = ()
    created_ms: int = 0
    retire_at_ms: int = 0  # believed until then at least; 0: no successor has been announced
    cross_pem: bytes = b""  # its key certified by its predecessor, for those who have been away and know only that one


@dataclass(frozen=True, slots=True)
class Authorities:
    """The value of ``/trust/authority/KIND`` (``cluster`` or ``etcd``). Exactly one entry is ACTIVE.

    `generation` grows with every change; a node tells in its record which one it believes.
    """

    kind: str
    generation: int
    entries: tuple[AuthorityEntry, ...]

    @property
    def active(self) -> AuthorityEntry:
        """The one that signs."""
        return next(e for e in self.entries if e.state is AuthorityState.ACTIVE)

    @property
    def bundle(self) -> bytes:
        """All that are believed, the signing one first."""
        order = sorted(self.entries, key=lambda e: (e.state is not AuthorityState.ACTIVE, e.created_ms))
        return b"".join(e.certificate_pem.rstrip() + b"\n" for e in order)


@dataclass(frozen=True, slots=True)
class LabelGeneration:
    """One key pair of a clearance label: the public part in clear, the private one sealed to each cleared node."""

    number: int
    public_key: bytes
    wraps: tuple[Wrap, ...]


@dataclass(frozen=True, slots=True)
class LabelKey:
    """The value of ``/trust/label/LABEL``. What is sealed anew is sealed to the latest generation."""

    label: str
    generations: tuple[LabelGeneration, ...]  # the latest last

    @property
    def latest(self) -> LabelGeneration:
        """The one to seal to."""
        return self.generations[-1]


@dataclass(frozen=True, slots=True)
class SealedKeyShare:
    """One share of a data key, sealed to one label's key."""

    label: str
    generation: int
    sealed: bytes


@dataclass(frozen=True, slots=True)
class Envelope:
    """A sealed payload. The data key is the XOR of all shares, so that every label is needed to open it."""

    shares: tuple[SealedKeyShare, ...]
    nonce: bytes
    ciphertext: bytes  # AES-256-GCM; its associated data names the object and the labels


@dataclass(frozen=True, slots=True)
class SecretRecord:
    """The value of ``/secret/OWNER/NAME``."""

    owner: str
    name: str
    labels: tuple[str, ...]  # clearance needed; `MEMBERS` alone when none is
    envelope: Envelope
    version: int = 1
    created_ms: int = 0
    created_by: str = ""


@dataclass(frozen=True, slots=True)
class GroupAcl:
    """The value of ``/acl/group/NAME``: what nodes in this group may be cleared for at most."""

    name: str
    clearances: tuple[str, ...] = ()


def effective_clearances(granted: tuple[str, ...], groups: tuple[GroupAcl, ...]) -> tuple[str, ...]:
    """What counts of the labels granted to a node: those that every one of its groups has as well."""
    allowed = set(granted)
    for group in groups:
        allowed &= set(group.clearances)
    return tuple(sorted(allowed))
