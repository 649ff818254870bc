"""A node's membership: registration under a lease, guarded renewals, and what to do when they fail.

The lease is only a hint to others that the node may be dead. What counts is the incarnation: once the leader has
condemned it, no claim or renewal of it commits, and this node must stop all that it runs before it may begin another.
"""

from __future__ import annotations

import enum
import math
from dataclasses import replace

from spinetta import codec, keys, txn
from spinetta.access import NodeAcl
from spinetta.events import (
    Commit,
    CommitDone,
    Effect,
    Entry,
    GrantLease,
    KeepAlive,
    KeptAlive,
    LeaseGranted,
    NoAnswer,
    Notice,
    Read,
    ReadDone,
    Reading,
    Remember,
    Remembered,
    RenewRuntime,
    RevokeLease,
)
from spinetta.model import Beat, Incarnation, IncarnationId, LeaseId, Life, NodeRecord, Revision
from spinetta.settings import AgentSettings
from spinetta.standing import rights_in
from spinetta.tenancy import SLACK_S, TAG, LeaseChange

NOTHING_WAITS = Beat()
RETRY_S = 0.5
POLL_S = 1.0  # while waiting for the leader to close an earlier life
REFUSED_AFTER_S = 3.0  # one voter may be behind the others for a moment: a node that it does not know may be new
ADVERTISE_S = 1.0  # free resources are a hint to rivals: once a second is fresh enough


class Phase(enum.Enum):
    """Where the membership stands."""

    LOOKING = "looking"  # reading what the store says of us
    JOINING = "joining"  # lease, intent on disk, registration under way
    ACTIVE = "active"
    FENCED = "fenced"  # condemned: everything must stop
    WAITING = "waiting"  # an earlier life has not been closed yet
    LEFT = "left"
    RESTORED = "restored"  # the cluster was made anew from older data: what this daemon knows is of another history
    REVOKED = "revoked"  # its rights have been taken away: everything must stop, and it may not come back by itself


class Session:
    """The membership of one node, as a state machine."""

    def __init__(self, settings: AgentSettings, incarnation: IncarnationId | None) -> None:
        self.settings = settings
        self.phase = Phase.LOOKING
        self.incarnation = incarnation
        self.registration: txn.Registration | None = None
        self.record = settings.record
        self.lease: LeaseId | None = None
        self._act_at_s: float | None = None
        self._busy = False
        self._renewing_since_s: float | None = None
        self._keeping_alive = False
        self._renew_at_s = 0.0
        self.renewed_at_s: float | None = None  # when the latest renewal that was committed had been sent
        self._advertised: NodeRecord | None = None
        self._advertising: NodeRecord | None = None
        self._advertise_at_s = 0.0
        self._change = LeaseChange()
        self._put_under: LeaseId | None = None  # the lease of the description that is under way
        self._pausing = self._shortened = False
        self._notice = ""
        self._deregistering = False
        self._open_revision = Revision(0)  # of the incarnation to go on with; 0: none, register a new one
        self._generation = Revision(0)
        self._generation_value: bytes | None = None  # as first seen by this daemon; empty: there was none
        self._granting = False
        self._remembering = False
        # The id is of a life that is not known to have begun: it is kept, because a registration whose answer was lost
        # may commit after a reading that does not show it, and must then be recognised as ours.
        self._fresh = False
        # Ids that were ours and are no longer, one a life: a registration under one of them may still commit.
        self._former = {incarnation} if incarnation is not None else set()
        self._resumed = False  # requests of an earlier daemon of this life have been shut out
        self._leaving = False
        self.acl: NodeAcl | None = None  # our rights as last read; None: no record, or not read yet
        self.acl_seen = Revision(0)  # its revision: ends are recorded under it
        self._refused_since_s: float | None = None
        self._beat = NOTHING_WAITS  # what the latest renewal says
        self._renew_not_before_s = -math.inf  # however much somebody waits for it: the latest one had no answer
        self.promised: frozenset[Revision] = frozenset()  # not to be started before a renewal without it is committed

    # --- outside view ---

    @property
    def name(self) -> str:
        """The node's name."""
        return self.settings.name

    @property
    def active(self) -> bool:
        """True while the registration stands, as far as we know."""
        return self.phase is Phase.ACTIVE and self.registration is not None

    @property
    def may_start(self) -> bool:
        """True once a renewal was committed: before that the runtime has no deadline and would refuse to start."""
        return self.active and self.renewed_at_s is not None

    @property
    def next_s(self) -> float | None:
        """When `poll` has something to do."""
        times = []
        if self._act_at_s is not None and not self._busy:
            times.append(self._act_at_s)
        if self.active:
            times.append(self._renew_at_s)
            if self._has_news and self._advertising is None:
                times.append(self._advertise_at_s)
            if self._change.next_s is not None:
                times.append(self._change.next_s)
        return min(times, default=None)

    @property
    def life_seen(self) -> Revision:
        """The revision of our incarnation as last seen; 0 while there is none, or none that we may write under."""
        return Revision(0) if self.revoked or self.restored else self._open_revision

    @property
    def revoked(self) -> bool:
        """True once this node's rights have been taken away: it may write nothing any more."""
        return self.phase is Phase.REVOKED

    @property
    def restored(self) -> bool:
        """True once the cluster has another generation than when this daemon came: it must begin again with nothing in
        memory, because revisions, by which everything is told apart here, have gone back."""
        return self.phase is Phase.RESTORED

    @property
    def clearances(self) -> tuple[str, ...] | None:
        """The labels this node is cleared for, sorted; None while it is not known, or where nobody has rights."""
        return None if self.acl is None else self.acl.effective

    def look_again(self, now: float) -> None:
        """Something may have changed about this node: read what the store says, and go on meanwhile."""
        self._look(now)

    def begin(self, now: float) -> None:
        """Start by reading what the store says of this node."""
        self._look(now)

    def poll(
        self, now: float, unstarted: Beat = NOTHING_WAITS, wanted: frozenset[Revision] = frozenset()
    ) -> list[Effect]:
        """What time asks for.

        `unstarted`: attempts that are not to be started now: the next renewal promises it, so that whoever puts them
        back when this node has died knows that they had no part in it. `wanted`: tokens of those that wait for the
        promise to be taken back, and for nothing else.
        """
        if wanted & self.promised and self._renewing_since_s is None:
            self._renew_at_s = min(self._renew_at_s, max(now, self._renew_not_before_s))
        effects: list[Effect] = []
        if self._act_at_s is not None and self._act_at_s <= now and not self._busy:
            self._act_at_s = None
            self._busy = True
            effects.append(Read("self", self._self_keys()))
        if self.active and self._renew_at_s <= now:
            effects += self._renew(now, unstarted)
        if self.active:
            effects += self._change.poll(now)
        if self.active and self._advertising is None and self._advertise_at_s <= now:
            effects += self._advertise(now)
        return effects

    @property
    def _has_news(self) -> bool:
        return self.record != self._advertised or self._change.lease is not None

    def pause(self, for_s: int) -> None:
        """This daemon ends soon, and another follows: the node is not to be suspected before that, but `for_s`."""
        self._pausing = True
        if for_s > self.settings.lease_ttl_s:
            self._change.want(for_s)

    @property
    def paused(self) -> bool:
        """True once all is done that `pause` asks for."""
        return self._pausing and not self._change.wanted

    @property
    def told(self) -> bool:
        """True when the others know what this node now says of itself."""
        return self.active and self._advertised == self.record

    @property
    def must_stop(self) -> bool:
        """True when nothing of this node may run on: its life has been ended by others."""
        return self.phase in (Phase.FENCED, Phase.WAITING, Phase.RESTORED, Phase.REVOKED)

    def describe(self, record: NodeRecord) -> None:
        """New facts for what this node says of itself; sent when it is time."""
        self.record = replace(record, incarnation=self.incarnation or IncarnationId(""))

    # --- answers ---

    def read_done(self, done: ReadDone, now: float, *, nothing_runs: bool) -> list[Effect]:
        """The store's word on this node."""
        self._busy = False
        if done.reading is None:
            self._act_at_s = now + RETRY_S
            return []
        self._refused_since_s = None
        return self._decide(done.reading, now, nothing_runs)

    def refused(self, text: str, now: float) -> list[Effect]:
        """Whoever keeps the store for this node does not let it in.

        It reads again until it is let in, or the reading says more. If that goes on for a while, everything stops: none
        of it could be recorded, and the others will have it put back.
        """
        if self.phase in (Phase.REVOKED, Phase.RESTORED, Phase.LEFT):
            return []
        if self._refused_since_s is None:
            self._refused_since_s = now
        self._look(now + RETRY_S)
        if now - self._refused_since_s < REFUSED_AFTER_S:
            return []
        self.phase = Phase.FENCED
        self.registration = None
        return self._say(f"the cluster refuses node {self.name}; it stops all that it runs: {text}")

    def lease_granted(self, granted: LeaseGranted, now: float) -> list[Effect]:
        """A lease for the node key: first remember the incarnation on disk, then register."""
        if granted.tag == TAG:
            self._advertise_at_s = min(self._advertise_at_s, now)
            return self._change.granted(granted, now)
        self._granting = False
        if granted.lease is None:
            self._look(now + RETRY_S)
            return []
        if self.phase is not Phase.JOINING:
            return [RevokeLease(granted.lease)]
        self.lease = granted.lease
        if self.incarnation is None:
            self.incarnation = IncarnationId(f"{granted.lease:016x}")
            self._fresh = self._remembering = True
            return [Remember(self.incarnation)]
        return self._commit_registration()

    def remembered(self, done: Remembered, now: float) -> list[Effect]:
        """The incarnation is on disk: it may be registered."""
        self._remembering = False
        if done.incarnation != self.incarnation or self.phase is not Phase.JOINING:
            self._look(now + RETRY_S)
            return []
        if not done.done:
            self.incarnation = None
            self._look(now + POLL_S)
            return self._say("the node's state cannot be written to disk; it cannot join until that is mended")
        return self._commit_registration()

    def commit_done(self, done: CommitDone, now: float) -> list[Effect]:
        """The answer to a registration, renewal, description, or word of one's own death."""
        match done.tag:
            case "renew":
                return self._renewed(done, now)
            case "advertise":
                return self._advertised_now(done, now)
            case "deregister":
                self._deregistering = False
                if isinstance(done.result, txn.Committed):
                    self.phase = Phase.LEFT
                    self.registration = None
                    self.incarnation = None
                    return [RevokeLease(self.lease)] if self.lease else []
                self.suspect(now)
                return []
            case _:  # register, reattach, resume, concede: what the store says next decides, whatever the answer was
                if done.tag == "resume" and isinstance(done.result, txn.Committed):
                    self._resumed = True
                self._look(now if done.result is not None else now + RETRY_S)
                return []

    def kept_alive(self, kept: KeptAlive, now: float) -> list[Effect]:
        """The lease's time to live, or its end."""
        self._keeping_alive = False
        if kept.lease == self.lease and kept.ttl_s is None:
            self.suspect(now)
        elif kept.lease == self.lease and not isinstance(kept.ttl_s, NoAnswer) and kept.ttl_s is not None:
            self._shorten(kept.ttl_s)
        return []

    def _shorten(self, ttl_s: float) -> None:
        """The lease is that of a daemon that was to be followed soon: once is enough, etcd may have a shortest one."""
        if ttl_s > self.settings.lease_ttl_s + SLACK_S and not self._pausing and not self._shortened:
            self._shortened = True
            self._change.want(self.settings.lease_ttl_s)

    def deregister(self) -> list[Effect]:
        """Leave, holding nothing."""
        if self.registration is None or self._deregistering:
            return []
        self._deregistering = self._leaving = True
        return [Commit("deregister", txn.deregister(self.registration))]

    # --- inside ---

    def _self_keys(self) -> tuple[str, ...]:
        name = self.settings.name
        return keys.node(name), keys.incarnation(name), keys.GENERATION, keys.acl_node(name)

    def _look(self, at_s: float) -> None:
        if self.revoked or self.restored:
            return
        self._act_at_s = at_s if self._act_at_s is None else min(at_s, self._act_at_s)

    def suspect(self, now: float) -> None:
        """A guarded write failed: claim nothing until the store has said why."""
        if self.revoked or self.restored:
            return
        self.registration = None
        if self.phase is Phase.ACTIVE:
            self.phase = Phase.LOOKING
        self._look(now)

    def _decide(self, reading: Reading, now: float, nothing_runs: bool) -> list[Effect]:
        name = self.settings.name
        node = reading.entries[keys.node(name)]
        inc = reading.entries[keys.incarnation(name)]
        generation = reading.entries[keys.GENERATION]
        if self._is_another(generation.value if generation is not None else b""):
            return self._restored_now()
        self._generation = generation.modified if generation else Revision(0)
        self._open_revision = inc.modified if inc else Revision(0)
        barred = self._take_rights(reading.entries[keys.acl_node(name)], now)
        if barred is not None:
            return barred
        if inc is None:
            return self._begin_life(node, now, nothing_runs)
        life = codec.readable(codec.decode_incarnation, inc.value)
        if life is None:  # overwritten by some other hand; the leader ends it as if it had been condemned
            return self._wait_for_other(False, now)
        if life.id != self.incarnation and life.id in self._former and life.state is Life.OPEN and nothing_runs:
            # Our own registration came after we had given up on it. Waiting for the leader to bury it could take for
            # ever: it does not when more than half of the nodes look dead.
            self.phase = Phase.WAITING
            return [self._concede(inc.modified, life)]
        if life.id != self.incarnation:
            return self._wait_for_other(node is not None, now)
        if life.state is Life.OPEN:
            if node is None:
                return self._join(now)
            record = codec.readable(codec.decode_node, node.value)
            if record is None or record.incarnation != self.incarnation:
                return self._wait_for_other(True, now)
            registration = txn.Registration(name, node.created, inc.modified, self._generation, self.acl_seen)
            if node.lease != self.lease and not self._resumed:
                self.phase = Phase.LOOKING
                return [Commit("resume", txn.resume(registration, inc.value))]
            self.lease = node.lease
            return self._activate(registration, now)
        return self._condemned_by(inc.modified, life, now, nothing_runs)

    def _is_another(self, value: bytes) -> bool:
        """Whether the cluster has been made anew since this daemon came. By its value: revisions may repeat."""
        if self._generation_value is None:
            self._generation_value = value
        return value != self._generation_value

    def _restored_now(self) -> list[Effect]:
        self.phase = Phase.RESTORED
        self.registration = None
        self.lease = None
        self._act_at_s = None
        return self._say(
            "the cluster has been restored or recovered from older data: this node stops what it runs and begins again"
        )

    def _take_rights(self, entry: Entry | None, now: float) -> list[Effect] | None:
        """What the store says of our rights; None when we may go on."""
        if entry is None:
            if not self.settings.secured and self.acl is None:
                return None
            return self._revoked_by("an administrator has removed it from the cluster")
        acl = rights_in(entry.value)
        if acl is None:  # neither a yes nor a no
            self.phase = Phase.LOOKING
            self.registration = None
            self._look(now + POLL_S)
            return self._say(f"the record of the rights of node {self.name} cannot be read; it takes nothing now")
        if acl.revoked:  # nothing is ever to be guarded by that revision
            return self._revoked_by(acl.reason or "no reason was given")
        self.acl, self.acl_seen = acl, entry.modified
        return None

    def _revoked_by(self, why: str) -> list[Effect]:
        # For good, as far as this daemon goes: the name may be given to another machine, which must not bring this one
        # back. What it holds it stops; what becomes of it in the store is for the leader to write.
        self.phase = Phase.REVOKED
        self.registration = None
        self.lease = None
        self._act_at_s = None
        return self._say(
            f"the rights of node {self.name} in this cluster have been revoked ({why}); it stops all that it runs. "
            "To come back it must join anew, with a new token"
        )

    def _begin_life(self, node: Entry | None, now: float, nothing_runs: bool) -> list[Effect]:
        if not nothing_runs:  # leftovers of a life that has been closed: stop them before beginning another
            self.phase = Phase.FENCED
            self._look(now + POLL_S)
            return []
        if node is not None:
            self.phase = Phase.WAITING
            self._look(now + POLL_S)
            return [RevokeLease(node.lease)] if node.lease == self.lease else []
        if self._leaving:  # the answer to the deregistration was lost
            self.phase = Phase.LEFT
            return []
        if not self._fresh:
            if self.incarnation is not None:
                self._former.add(self.incarnation)
            self.incarnation = None
            self.renewed_at_s = None
        return self._join(now)

    def _join(self, now: float) -> list[Effect]:
        """A lease first; what follows depends on what the store said last."""
        self.phase = Phase.JOINING
        if self._granting or self._remembering:
            self._look(now + RETRY_S)
            return []
        self._granting = True
        return [GrantLease("self", self.settings.lease_ttl_s)]

    def _wait_for_other(self, alive: bool, now: float) -> list[Effect]:
        self.phase = Phase.WAITING
        self.registration = None
        self._look(now + POLL_S)
        if alive:
            return self._say(f"the name {self.name} is alive in this cluster elsewhere: choose another with --name")
        return self._say(f"waiting until the leader has closed an earlier life of {self.name}")

    def _condemned_by(self, seen: Revision, life: Incarnation, now: float, nothing_runs: bool) -> list[Effect]:
        self.phase = Phase.FENCED
        self.registration = None
        if not nothing_runs or life.state is Life.DEAD:
            self._look(now + POLL_S)
            return self._say("this node has been given up by the others; it stops what it runs and begins again")
        return [self._concede(seen, life)]

    def _concede(self, seen: Revision, life: Incarnation) -> Effect:
        """Tell the leader that nothing of this life runs, so that it need not wait."""
        dead = codec.encode_incarnation(replace(life, state=Life.DEAD))
        return Commit("concede", txn.concede(self.settings.name, seen, dead, self.acl_seen))

    def _commit_registration(self) -> list[Effect]:
        assert self.incarnation is not None and self.lease is not None  # noqa: S101, PT018 - set by lease_granted
        self._advertised = replace(self.record, incarnation=self.incarnation)
        record = codec.encode_node(self._advertised)
        name = self.settings.name
        if self._open_revision:
            body = txn.reattach(name, self.lease, record, self._open_revision, self._generation, self.acl_seen)
            return [Commit("reattach", body)]
        life = Incarnation(
            self.incarnation,
            Life.OPEN,
            self.settings.boot_id,
            self.settings.lease_ttl_s,
            self.settings.kill_margin_s,
        )
        body = txn.register(name, self.lease, record, codec.encode_incarnation(life), self._generation, self.acl_seen)
        return [Commit("register", body)]

    def _activate(self, registration: txn.Registration, now: float) -> list[Effect]:
        self.phase = Phase.ACTIVE
        self._fresh = False
        self.registration = registration
        self.record = replace(self.record, incarnation=self.incarnation or IncarnationId(""))
        self._advertise_at_s = now
        self._renew_at_s = now
        self._notice = ""
        return []

    def _renew(self, now: float, unstarted: Beat) -> list[Effect]:
        assert self.registration is not None and self.lease is not None  # noqa: S101, PT018 - active
        self._renew_at_s = now + self.settings.renew_every_s
        effects: list[Effect] = []
        if not self._keeping_alive:
            self._keeping_alive = True
            effects.append(KeepAlive("self", self.lease))
        if self._renewing_since_s is None:
            self._renewing_since_s = now
            self._beat = unstarted
            self.promised |= unstarted.promised  # an answer that is lost may mean that it was made
            effects.append(Commit("renew", txn.renew(self.registration, codec.encode_beat(unstarted))))
        return effects

    def _renewed(self, done: CommitDone, now: float) -> list[Effect]:
        sent_at_s, self._renewing_since_s = self._renewing_since_s, None
        if isinstance(done.result, txn.Committed) and sent_at_s is not None:
            self.renewed_at_s = sent_at_s
            self.promised = self._beat.promised
            return [RenewRuntime(sent_at_s)]
        if isinstance(done.result, txn.Conflict):
            self.suspect(now)
        else:
            self._renew_at_s = min(self._renew_at_s, now + RETRY_S)
            self._renew_not_before_s = now + RETRY_S
        return []

    def _advertise(self, now: float) -> list[Effect]:
        if not self._has_news:
            return []
        assert self.registration is not None and self.lease is not None  # noqa: S101, PT018 - active
        self._advertise_at_s = now + ADVERTISE_S
        self._advertising = self.record
        self._put_under = self._change.lease or self.lease
        body = txn.advertise(self.registration, self._put_under, codec.encode_node(self.record))
        return [Commit("advertise", body)]

    def _advertised_now(self, done: CommitDone, now: float) -> list[Effect]:
        sent, self._advertising = self._advertising, None
        lease, self._put_under = self._put_under, None
        changes = lease is not None and lease == self._change.lease
        if isinstance(done.result, txn.Committed):
            self._advertised = sent
            if not changes:
                return []
            self._change.done()
            before, self.lease = self.lease, lease
            return [RevokeLease(before)] if before is not None and before != lease else []
        if changes:
            self._change.failed(now)
            self._advertised = None  # put again, under the lease that is kept alive
        if isinstance(done.result, txn.Conflict):
            self.suspect(now)
        return []

    def _say(self, text: str) -> list[Effect]:
        if text == self._notice:
            return []
        self._notice = text
        return [Notice(text)]
