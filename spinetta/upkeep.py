"""What etcd needs now and then, and how it stands: pure, from what its members say of themselves.

The one in charge calls `next_care` every few seconds with what it sees, does the one thing it names, and looks again.
Nothing but pace is remembered between two looks, so whoever takes over just goes on.

Three facts shape it (docs/adr/0025-etcd-upkeep.md). Etcd's quota counts the file of its database, holes and all, and
only defragmentation makes that smaller. A member that is being defragmented answers nobody, for as long as it takes to
copy what is in use. And a store that is full refuses renewals, which would kill every task: so it must never get there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from spinetta import units

NOSPACE, CORRUPT = "NOSPACE", "CORRUPT"

LOOK_EVERY_S = 5.0
LOOK_SOON_S = 1.0  # after something was done: a full store is waited for by everybody

# --- how full it may be, as parts of the quota. In use is what records and their history take; a store that was never
# defragmented has a larger file, which cannot grow while it has holes.
COMPACT_FROM = 0.5  # history is given up for room from here on; etcd itself keeps it for an hour or two
COMPACT_HARD_FROM = 0.7  # … down to seconds
WARN_FROM = 0.8
SUBMITS_UP_TO = 0.85  # the rest is kept for renewals and for the ends of what was submitted
SUBMITS_LOOK_EACH = 0.02  # so much taken by one node since it last looked, and it looks again: others take, too
# File of all members, before the alarm is taken back. Above where submits stop: tasks that wait may hold that much for
# as long as they like, and with the alarm up no node can register.
RELIEVED_BELOW = 0.92

# --- compaction. Watches and lists that need older history than is kept list again, which costs them one list.
KEEP_HISTORY_S = 300.0  # the longest list of a million tasks takes a minute, all at one revision
KEEP_HISTORY_HARD_S = 15.0
COMPACT_EVERY_S = 60.0
COMPACT_EVERY_HARD_S = 15.0

# --- defragmentation
WASTED_BYTES_MIN = 64 << 20  # less is not worth stopping a member for: etcd uses holes again
WASTED_SHARE_MIN = 0.5  # of the file: below it the holes will be used again soon
CRAMPED_FROM = 0.8  # file by quota: here holes bring the alarm nearer …
CRAMPED_SHARE_MIN = 0.2  # … and this much of the file is worth a stop
RAISED_SHARE_MIN = 0.05  # or this much, of one that has raised NOSPACE
DEFRAGMENT_EVERY_S = 3600.0  # one member; a busy queue makes holes again within minutes, and uses them again
DEFRAGMENT_EVERY_CRAMPED_S = 600.0
DEFRAGMENT_EVERY_FULL_S = 10.0  # or DUTY_FACTOR times as long as it takes
DUTY_FACTOR = 4.0
MOVE_EVERY_S = 60.0  # etcd's lead, which may come back by itself
BLOCKED_S_PER_GIB = 15.0  # measured 7 to 11 s for each GiB in use, records of 1 kB, two cores
BUSY_FACTOR = 4.0  # on a machine at its limit: 66 MiB took 3 to 9 s with 25 processes for each core
BLOCKED_S_MIN = 30.0  # for the deadline of a call: giving up does not stop it, so better late
DEADLINE_FACTOR = 6.0
BEHIND_MAX = 1000  # entries that a member may be behind and still count as caught up: a second of a busy cluster
DISARM_EVERY_S = 30.0


@dataclass(frozen=True, slots=True)
class MemberView:
    """One etcd member.

    Attributes:
        name: of its node; empty before its first start.
        voter: it has a vote.
        answers: its status could be had; all that follows is known only then.
        leader_id: etcd's leader as it sees it; 0: it knows of none.
        db_bytes, in_use_bytes: the database's file, and what of it is not holes.
        applied: how far it has come in the log of all changes.
    """

    member_id: int
    name: str
    voter: bool = True
    answers: bool = True
    leader_id: int = 0
    version: str = ""
    db_bytes: int = 0
    in_use_bytes: int = 0
    applied: int = 0

    @property
    def healthy(self) -> bool:
        """It takes part in the cluster."""
        return self.answers and self.leader_id != 0

    @property
    def wasted_bytes(self) -> int:
        """What defragmenting it would give back."""
        return max(self.db_bytes - self.in_use_bytes, 0)

    @property
    def title(self) -> str:
        """What people call it."""
        return self.name or f"member {self.member_id:x}"


@dataclass(frozen=True, slots=True)
class EtcdView:
    """All members at one moment, and what is wrong with them.

    Attributes:
        alarms: member and name of each alarm raised; None: not known, nobody could be asked.
        revision: of the store now; 0: not known.
    """

    members: tuple[MemberView, ...]
    alarms: tuple[tuple[int, str], ...] | None = ()
    revision: int = 0

    @property
    def voters(self) -> tuple[MemberView, ...]:
        """Those with a vote."""
        return tuple(m for m in self.members if m.voter)

    @property
    def has_majority(self) -> bool:
        """Enough voters take part for the store to take writes."""
        voters = self.voters
        return sum(m.healthy for m in voters) > len(voters) // 2

    def raised(self, name: str) -> tuple[int, ...]:
        """Members that have raised this alarm."""
        return tuple(member for member, alarm in self.alarms or () if alarm == name)

    @property
    def in_use_bytes(self) -> int:
        """Of the fullest member."""
        return max((m.in_use_bytes for m in self.members if m.answers), default=0)


# --- what to do next -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Compact:
    """Forget the history before this revision."""

    revision: int


@dataclass(frozen=True, slots=True)
class MoveLeader:
    """Let another member lead etcd, so that this one can be defragmented without anybody waiting for it."""

    member_id: int
    to_id: int


@dataclass(frozen=True, slots=True)
class Defragment:
    """Rewrite this member's file without its holes. It answers nobody meanwhile."""

    member_id: int
    deadline_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Disarm:
    """Take back the alarm NOSPACE of this member: there is room again."""

    member_id: int


@dataclass(frozen=True, slots=True)
class Rest:
    """Nothing to do now; `reason` is empty when nothing is wanted either."""

    reason: str = ""


Care = Compact | MoveLeader | Defragment | Disarm | Rest


@dataclass(slots=True)
class Past:
    """What was done when, by whoever is in charge now; a new one begins with an empty one and is no less right.

    Attributes:
        seen: revisions of the store and when they were current, oldest first.
        compacted, compacted_s: the latest compaction.
        just_compacted: nothing else was looked for since.
        defragmented_s: by member: its latest one, tried or done.
        moved_s: when the lead was handed on.
        disarmed_s: by member: when its alarm was last taken back.
    """

    seen: list[tuple[float, int]] = field(default_factory=list)
    compacted: int = 0
    compacted_s: float = float("-inf")
    just_compacted: bool = False
    defragmented_s: dict[int, float] = field(default_factory=dict)
    moved_s: float = float("-inf")
    disarmed_s: dict[int, float] = field(default_factory=dict)

    def look(self, now_s: float, revision: int) -> None:
        """Remember the revision of this moment; what is older than is ever asked for is forgotten."""
        if revision and (not self.seen or revision > self.seen[-1][1]):
            self.seen.append((now_s, revision))
        while len(self.seen) > 1 and self.seen[1][0] <= now_s - KEEP_HISTORY_S:
            del self.seen[0]

    def revision_at(self, at_s: float) -> int:
        """The newest revision that was current then or earlier; 0: nobody looked."""
        return max((revision for seen_s, revision in self.seen if seen_s <= at_s), default=0)

    def done(self, care: Care, now_s: float) -> None:
        """Remember that this was done, or tried."""
        self.just_compacted = isinstance(care, Compact)
        match care:
            case Compact(revision):
                self.compacted, self.compacted_s = revision, now_s
            case Defragment(member_id):
                self.defragmented_s[member_id] = now_s
            case MoveLeader():
                self.moved_s = now_s
            case Disarm(member_id):
                self.disarmed_s[member_id] = now_s
            case Rest():
                pass

    def keep(self, members: Iterable[int]) -> None:
        """Forget members that there are no more."""
        kept = frozenset(members)
        self.defragmented_s = {i: at_s for i, at_s in self.defragmented_s.items() if i in kept}
        self.disarmed_s = {i: at_s for i, at_s in self.disarmed_s.items() if i in kept}


def next_care(view: EtcdView, past: Past, now_s: float, *, quota_bytes: int, pause_s: float) -> Care:
    """The one thing to do now.

    Args:
        view: etcd as it is.
        past: what was done when; `look` has been called for this moment.
        now_s: a clock that never goes back.
        quota_bytes: of each member's database.
        pause_s: how long the only voter may answer nobody without any harm (several bear more: the others answer).
    """
    if view.alarms is None or not view.has_majority:
        return Rest("no majority of the voters answers")
    if view.raised(CORRUPT):
        return Rest("alarm CORRUPT: an administrator has to say which member is right")
    full = bool(view.raised(NOSPACE))
    compact = _compaction(view, past, now_s, quota_bytes, full=full)
    if compact is not None and not (full and past.just_compacted):  # the holes and the alarm have their turns
        return compact
    # One member at a time, and only when all the others are as they should be: whoever is defragmented is missing.
    ill = next((m for m in view.members if not m.healthy), None)
    if ill is not None:
        return Rest(f"{ill.title} is not healthy" if full or _due(view, past, now_s, quota_bytes, full=full) else "")
    if any(not m.voter for m in view.members):
        return Rest("a learner catches up" if full else "")
    front = max(m.applied for m in view.members)
    late = next((m for m in view.members if front - m.applied > BEHIND_MAX), None)
    if late is not None:
        return Rest(f"{late.title} catches up" if full else "")
    due = _due(view, past, now_s, quota_bytes, full=full)
    if due:
        return _defragmentation(view, past, now_s, due, pause_s, full=full)
    if full:
        return _disarming(view, past, now_s, quota_bytes)
    return Rest()


def _compaction(view: EtcdView, past: Past, now_s: float, quota_bytes: int, *, full: bool) -> Compact | None:
    share = view.in_use_bytes / quota_bytes
    hard = full or share >= COMPACT_HARD_FROM
    if not hard and share < COMPACT_FROM:
        return None
    if now_s < past.compacted_s + (COMPACT_EVERY_HARD_S if hard else COMPACT_EVERY_S):
        return None
    target = past.revision_at(now_s - (KEEP_HISTORY_HARD_S if hard else KEEP_HISTORY_S))
    return Compact(target) if target > past.compacted else None


def _due(view: EtcdView, past: Past, now_s: float, quota_bytes: int, *, full: bool) -> list[tuple[MemberView, str]]:
    """Members worth a stop, each with the reason, etcd's leader last."""
    found = []
    for m in view.voters:
        cramped = m.db_bytes >= CRAMPED_FROM * quota_bytes
        enough = m.wasted_bytes >= WASTED_BYTES_MIN and m.wasted_bytes >= WASTED_SHARE_MIN * m.db_bytes
        if cramped and m.wasted_bytes >= CRAMPED_SHARE_MIN * m.db_bytes:
            enough = True
        if full and m.in_use_bytes < RELIEVED_BELOW * quota_bytes <= m.db_bytes:
            enough = True  # it is all that stands between this member and taking the alarm back
        defragmented_s = past.defragmented_s.get(m.member_id, float("-inf"))
        if m.member_id in view.raised(NOSPACE) and m.wasted_bytes >= RAISED_SHARE_MIN * m.db_bytes:
            # Its own quota may be smaller than ours, which etcd does not tell: once each time the alarm is raised.
            enough |= defragmented_s <= past.disarmed_s.get(m.member_id, float("-inf"))
        every_s = DEFRAGMENT_EVERY_CRAMPED_S if cramped else DEFRAGMENT_EVERY_S
        if full:
            every_s = max(DEFRAGMENT_EVERY_FULL_S, DUTY_FACTOR * blocked_for_s(m.in_use_bytes))
        if enough and now_s >= defragmented_s + every_s:
            reason = f"{units.format_bytes(m.wasted_bytes)} of {units.format_bytes(m.db_bytes)} are holes"
            found.append((m, reason))
    return sorted(found, key=lambda each: (each[0].leader_id == each[0].member_id, each[0].name, each[0].member_id))


def _defragmentation(
    view: EtcdView, past: Past, now_s: float, due: Sequence[tuple[MemberView, str]], pause_s: float, *, full: bool
) -> Care:
    m, reason = due[0]
    blocked_s = blocked_for_s(m.in_use_bytes)
    if m.leader_id == m.member_id:  # everybody waits for etcd's leader, leases too
        others = [each for each in view.voters if each is not m]
        if others:
            if now_s < past.moved_s + (DEFRAGMENT_EVERY_FULL_S if full else MOVE_EVERY_S):
                return Rest("etcd's lead has just been handed on")
            return MoveLeader(m.member_id, max(others, key=lambda each: (each.applied, each.name)).member_id)
        if BUSY_FACTOR * blocked_s > pause_s and not full:
            return Rest(
                f"{reason}, but the only voter might stand still for {units.format_duration(BUSY_FACTOR * blocked_s)}, "
                f"longer than the {units.format_duration(pause_s)} that leases allow: add voters"
            )
    return Defragment(m.member_id, max(BLOCKED_S_MIN, DEADLINE_FACTOR * blocked_s), reason)


def _disarming(view: EtcdView, past: Past, now_s: float, quota_bytes: int) -> Care:
    most = max(max(m.in_use_bytes, m.db_bytes) for m in view.members)
    if most >= RELIEVED_BELOW * quota_bytes:
        return Rest(
            "the store is full. Old history is given up by itself; beyond that finished tasks have to leave it, "
            "waiting ones to be cancelled, or the voters to be given a larger etcd_quota"
        )
    # Each member raises its own, and etcd takes writes again when all are taken back.
    for member_id in view.raised(NOSPACE):
        if now_s >= past.disarmed_s.get(member_id, float("-inf")) + DISARM_EVERY_S:
            return Disarm(member_id)
    return Rest("the alarm NOSPACE has just been taken back")


def blocked_for_s(in_use_bytes: int) -> float:
    """About how long a member that is defragmented answers nobody."""
    return BLOCKED_S_PER_GIB * in_use_bytes / (1 << 30)


# --- what to say ---------------------------------------------------------------------------------------------------


def full_words(view: EtcdView, quota_bytes: int, more_bytes: int = 0) -> str:
    """Why nothing may be submitted now; empty: it may. `more_bytes`: put into it since that view."""
    percent = 100 * (view.in_use_bytes + more_bytes) // quota_bytes
    if view.raised(NOSPACE):
        return f"the cluster's store is full (etcd alarm NOSPACE, {percent} % in use)"
    if view.in_use_bytes + more_bytes >= SUBMITS_UP_TO * quota_bytes:
        return f"the cluster's store is {percent} % full, and the rest is kept for the tasks that there are"
    return ""


FULL_HINT = (
    "finished tasks leave it by themselves; an administrator can have them leave sooner, cancel waiting ones, or give "
    "the voters a larger etcd_quota. See: spinetta cluster status"
)


def notices(view: EtcdView, quota_bytes: int) -> list[str]:
    """What an administrator should know, the worst first; empty: all is well."""
    found = []
    names = {m.member_id: m.title for m in view.members}
    if not view.has_majority:
        found.append(no_majority_words(view))
    for member, alarm in sorted(view.alarms or (), key=lambda each: (names.get(each[0], ""), each)):
        what = {
            NOSPACE: "it takes no new records; the leader makes room and takes the alarm back when it can",
            CORRUPT: "its data differs from that of the others; nothing is written until an administrator has acted",
        }.get(alarm, "see etcd's log")
        found.append(f"etcd alarm {alarm} on {names.get(member, f'member {member:x}')}: {what}")
    if view.has_majority:
        found += [f"voter {m.title} does not take part" for m in view.voters if not m.healthy]
    full = full_words(view, quota_bytes)
    if full and not view.raised(NOSPACE):
        found.append(f"{full}: nothing can be submitted")
    elif not full and view.in_use_bytes >= WARN_FROM * quota_bytes:
        percent = 100 * view.in_use_bytes // quota_bytes
        found.append(
            f"the cluster's store is {percent} % full; at {SUBMITS_UP_TO * 100:.0f} % nothing can be submitted"
        )
    return found


def no_majority_words(view: EtcdView, *, named: bool = True) -> str:
    """That the store cannot be used, and who of the voters answers. `named`: it may be told which there are."""
    if not named:
        return "no majority of the cluster's voters answers"
    voters = view.voters
    groups: Mapping[str, list[str]] = {
        "takes part": [m.title for m in voters if m.healthy],
        "answers but sees no leader": [m.title for m in voters if m.answers and not m.healthy],
        "does not answer": [m.title for m in voters if not m.answers],
    }
    parts = [f"{', '.join(sorted(names))} {_plural(words, names)}" for words, names in groups.items() if names]
    if not any(m.answers for m in voters):
        listed = ", ".join(sorted(m.title for m in voters))
        return f"none of the voters ({listed}) answers this node: it is cut off from them, or they are all down"
    return f"no majority of the {len(voters)} voters answers this node: {'; '.join(parts)}"


def _plural(words: str, names: Sequence[str]) -> str:
    if len(names) == 1:
        return words
    return words.replace("takes", "take").replace("does", "do").replace("answers", "answer").replace("sees", "see")


def back_words(view: EtcdView) -> str:
    """How it goes on."""
    missing = len(view.voters) // 2 + 1 - sum(m.healthy or m.answers for m in view.voters)
    if not any(m.answers for m in view.voters):
        return "ask another node, or try again later; it goes on by itself"
    if missing <= 0:
        return "try again: they are electing a leader"
    what = "when one more of them is" if missing == 1 else f"when {missing} more of them are"
    return (
        f"it goes on by itself {what} back; if too many are gone for good, an administrator rebuilds from one that is "
        "left: spinetta cluster recover"
    )
