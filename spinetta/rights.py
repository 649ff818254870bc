"""Who may do what: one table, and the words for a refusal.

Rights come from the records under ``/acl/``, never from a certificate. A caller carries the guards that must hold in
every transaction made for it, so that a right withdrawn meanwhile undoes the write.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from spinetta import txn
from spinetta.access import MEMBERS, Limits, NodeRole, UserRole


class Call(enum.StrEnum):
    """What is asked for. Each call of the API is one of these."""

    STATUS = "status"  # tasks: ids, names, states, times, resources, labels
    PAYLOAD = "payload"  # of tasks: command, environment, working directory, what went wrong in words
    NODES = "nodes"
    SUBMIT = "submit"
    CANCEL = "cancel"
    LOG = "log"
    EXEC = "exec"
    COPY = "copy"  # files out of a task's scratch space
    DRAIN = "drain"  # and undrain
    LEAVE = "leave"
    CONFIRM_DEAD = "confirm-dead"
    BACKUP = "backup"
    IMAGES = "images"
    IMAGE_CHANGE = "image-change"
    IMAGE_IMPORT = "image-import"  # of files of the node, which are read as root
    WHOAMI = "whoami"
    RENEW = "renew"
    TOKENS = "tokens"
    ACCESS_LIST = "access-list"
    ACCESS_CHANGE = "access-change"
    POLICY = "policy"
    AUTHORITIES = "authorities"
    LABEL_KEYS = "label-keys"
    SECRETS = "secrets"
    HEALTH = "health"
    REFLECTION = "reflection"
    ENROLL = "enroll"  # join, log in, whom to believe
    PEER = "peer"  # TakeSeat and GiveUpSeat
    USAGE = "usage"  # what tasks that run on the node use now
    GATEWAY = "gateway"


class CallerKind(enum.StrEnum):
    """What sort of caller."""

    NOBODY = "nobody"  # shows no certificate of this cluster
    LOCAL = "local"  # plain text on loopback: nobody is told apart there
    USER = "user"
    NODE = "node"


class Reach(enum.IntEnum):
    """How far a right goes."""

    NONE = 0
    OWN = 1  # what belongs to the caller or to one of its projects
    ANY = 2


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and with which rights.

    Attributes:
        projects: owners, beside the own name, whose tasks are treated as the caller's own.
        clearances: labels whose tasks and logs the caller may handle: of a node those in effect.
        guards: must hold in every transaction made for this caller.
        limits: of its record; 0: as the policy or the node says.
        expires_s: when its certificate or token ends, in seconds since 1970; 0: never.
        unknown_because: of `NOBODY`: why what it showed was not taken, and what to do; may be empty.
    """

    kind: CallerKind
    name: str = ""
    role: UserRole | None = None
    node_role: NodeRole | None = None
    projects: tuple[str, ...] = ()
    clearances: tuple[str, ...] = ()
    guards: tuple[txn.Guard, ...] = ()
    limits: Limits = field(default_factory=Limits)
    expires_s: float = 0.0
    unknown_because: str = ""

    @classmethod
    def local(cls) -> Caller:
        """Whoever reaches a node in plain text: everything is allowed."""
        return cls(CallerKind.LOCAL)

    @classmethod
    def nobody(cls, because: str = "") -> Caller:
        """Who has not shown who it is."""
        return cls(CallerKind.NOBODY, unknown_because=because)

    @property
    def title(self) -> str:
        """For people and the audit log: ``user ann``, ``node n3``, ``local``, ``nobody``."""
        return f"{self.kind.value} {self.name}" if self.name else self.kind.value

    @property
    def role_name(self) -> str:
        """``viewer`` … ``admin``, ``voter``, ``worker``; empty for others."""
        role = self.role or self.node_role
        return role.name.lower() if role is not None else ""

    def owns(self, owner: str) -> bool:
        """What belongs to `owner` is treated as the caller's own. What belongs to nobody is nobody's."""
        return bool(owner) and self.kind is CallerKind.USER and (owner == self.name or owner in self.projects)


_OWN, _ANY = Reach.OWN, Reach.ANY
_VIEWER: Mapping[Call, Reach] = {
    Call.STATUS: _ANY,
    Call.PAYLOAD: _OWN,
    Call.NODES: _ANY,
    Call.IMAGES: _ANY,
    Call.WHOAMI: _ANY,
    Call.RENEW: _ANY,
    Call.REFLECTION: _ANY,
}
_USER: Mapping[Call, Reach] = {
    **_VIEWER,
    Call.SUBMIT: _OWN,
    Call.CANCEL: _OWN,
    Call.LOG: _OWN,
    Call.EXEC: _OWN,
    Call.COPY: _OWN,
    Call.LABEL_KEYS: _ANY,  # public, but the list of labels is only for those who can use it
    Call.SECRETS: _OWN,
}
_OPERATOR: Mapping[Call, Reach] = {
    **_USER,
    Call.PAYLOAD: _ANY,
    # Not SUBMIT and SECRETS: a task in another's name would be given that owner's secrets.
    Call.CANCEL: _ANY,
    Call.LOG: _ANY,
    Call.EXEC: _ANY,  # but not of a task with secrets, which it could then read: see SECRETS
    Call.COPY: _ANY,
    Call.DRAIN: _ANY,
    Call.LEAVE: _ANY,
    Call.IMAGE_CHANGE: _ANY,
    Call.ACCESS_LIST: _ANY,
}
_ADMIN: Mapping[Call, Reach] = {
    **_OPERATOR,
    Call.SUBMIT: _ANY,
    Call.SECRETS: _ANY,
    Call.TOKENS: _ANY,
    Call.ACCESS_CHANGE: _ANY,
    Call.POLICY: _ANY,
    Call.AUTHORITIES: _ANY,
    Call.CONFIRM_DEAD: _ANY,  # not for operators: a wrong word lets two attempts of a task run at once
    Call.IMAGE_IMPORT: _ANY,  # not for operators: with a task in it they could read any file of the node
    Call.BACKUP: _ANY,  # all of the store, though what is sealed in it stays so
}
_WORKER: Mapping[Call, Reach] = {Call.NODES: _ANY, Call.WHOAMI: _ANY, Call.RENEW: _ANY, Call.GATEWAY: _ANY}
_VOTER: Mapping[Call, Reach] = {
    **_WORKER,
    # Passed on for a person whom the voter has checked; it could read and write all of it in the store anyway.
    Call.LOG: _ANY,
    Call.EXEC: _ANY,
    Call.COPY: _ANY,
    Call.DRAIN: _ANY,
    Call.LEAVE: _ANY,
    Call.IMAGES: _ANY,
    Call.IMAGE_CHANGE: _ANY,
    Call.IMAGE_IMPORT: _ANY,
    Call.PEER: _ANY,
    Call.USAGE: _ANY,
}

FOR_ALL = frozenset({Call.HEALTH, Call.ENROLL})
"""What needs no identity."""

RIGHTS: Mapping[UserRole, Mapping[Call, Reach]] = {
    UserRole.VIEWER: _VIEWER,
    UserRole.USER: _USER,
    UserRole.OPERATOR: _OPERATOR,
    UserRole.ADMIN: _ADMIN,
}
"""What a person may do. What is not listed is refused."""

NODE_RIGHTS: Mapping[NodeRole, Mapping[Call, Reach]] = {NodeRole.WORKER: _WORKER, NodeRole.VOTER: _VOTER}
"""What a node may do."""

CHANGES = frozenset(
    {
        Call.SUBMIT,
        Call.CANCEL,
        Call.EXEC,
        Call.DRAIN,
        Call.LEAVE,
        Call.CONFIRM_DEAD,
        Call.IMAGE_CHANGE,
        Call.IMAGE_IMPORT,
        Call.RENEW,
        Call.TOKENS,
        Call.ACCESS_CHANGE,
        Call.POLICY,
        Call.AUTHORITIES,
        Call.SECRETS,
        Call.PEER,
    }
)
"""Calls that change something."""

AUDITED = CHANGES | {Call.ENROLL, Call.LOG, Call.COPY, Call.LABEL_KEYS, Call.BACKUP}
"""Calls that the audit log tells of also when they are allowed. The gateway tells of its own."""

DOING: Mapping[Call, str] = {
    Call.STATUS: "see tasks",
    Call.PAYLOAD: "see what tasks run",
    Call.NODES: "see nodes",
    Call.SUBMIT: "submit tasks",
    Call.CANCEL: "cancel tasks",
    Call.LOG: "read logs",
    Call.EXEC: "run commands beside tasks",
    Call.COPY: "copy tasks' files",
    Call.DRAIN: "drain nodes",
    Call.LEAVE: "make nodes leave",
    Call.CONFIRM_DEAD: "vouch that nodes are dead",
    Call.BACKUP: "take backups",
    Call.IMAGES: "see images",
    Call.IMAGE_CHANGE: "pull, pin, verify or remove images",
    Call.IMAGE_IMPORT: "import files of nodes as images",
    Call.WHOAMI: "ask who it is",
    Call.RENEW: "renew certificates",
    Call.TOKENS: "make, list or revoke tokens",
    Call.ACCESS_LIST: "list who has access",
    Call.ACCESS_CHANGE: "change who has access",
    Call.POLICY: "see or change the policy",
    Call.AUTHORITIES: "see or rotate certificate authorities",
    Call.LABEL_KEYS: "get the keys of labels",
    Call.SECRETS: "handle secrets",
    Call.HEALTH: "ask whether the node is well",
    Call.REFLECTION: "list the services",
    Call.ENROLL: "ask to be let in",
    Call.PEER: "give or take voters' seats",
    Call.USAGE: "ask a node what its tasks use",
    Call.GATEWAY: "use the gateway to the store",
}


def reach(caller: Caller, call: Call) -> Reach:
    """How far the caller's right to this goes."""
    if caller.kind is CallerKind.LOCAL or call in FOR_ALL:
        return Reach.ANY
    match caller.kind:
        case CallerKind.USER if caller.role is not None:
            return RIGHTS[caller.role].get(call, Reach.NONE)
        case CallerKind.NODE if caller.node_role is not None:
            return NODE_RIGHTS[caller.node_role].get(call, Reach.NONE)
        case _:
            return Reach.NONE


def refusal(caller: Caller, call: Call, *, owner: str | None = None, clearance: Iterable[str] = ()) -> str | None:
    """Why this caller may not do this; None when it may.

    Args:
        caller: who asks.
        call: what for.
        owner: of the task or secret it is about; None: whether the call may be made at all, about something.
        clearance: the labels of what it is about. They must be covered whatever the role, an admin's too.
    """
    if caller.kind is CallerKind.LOCAL or call in FOR_ALL:
        return None
    if caller.kind is CallerKind.NOBODY:
        return caller.unknown_because or f"who asks is not known here, and so may not {DOING[call]}"
    who = f"{caller.title} ({caller.role_name})" if caller.role_name else caller.title
    far = reach(caller, call)
    if far is Reach.NONE:
        return f"{who} may not {DOING[call]}"
    if far is Reach.OWN and owner is not None and not caller.owns(owner):
        whose = f"of {owner}" if owner else "that belong to nobody"
        return f"{who} may {DOING[call]} of its own and its projects only, not {whose}"
    lacking = sorted(set(clearance) - set(caller.clearances) - {MEMBERS})
    if lacking:
        return f"{caller.title} is not cleared for {', '.join(lacking)}"
    return None
