"""Model values to generated messages and back, as they are in stored records and on the wire.

A field that is not set means what it meant before there was one.
"""

from __future__ import annotations

from spinetta import trustcodec
from spinetta.errors import CorruptRecord
from spinetta.model import (
    LOSSES_ALLOWED,
    Attempt,
    ContainerSpec,
    IncarnationId,
    Mount,
    NodeId,
    NodeRecord,
    Outcome,
    Resources,
    Revision,
    ShimInfo,
    State,
    Task,
    TaskId,
    TaskSpec,
    Usage,
)
from spinetta.v1 import record_pb2 as pb


def resources_to_pb(r: Resources) -> pb.Resources:
    """Model to message."""
    return pb.Resources(
        cpu_millis=r.cpu_millis,
        memory_bytes=r.memory_bytes,
        disk_bytes=r.disk_bytes,
        countables=dict(r.countables),
    )


def resources_from_pb(m: pb.Resources) -> Resources:
    """Message to model."""
    return Resources.of(m.cpu_millis, m.memory_bytes, m.disk_bytes, m.countables)


def spec_to_pb(s: TaskSpec) -> pb.TaskSpec:
    """Model to message."""
    return pb.TaskSpec(
        id=s.id,
        name=s.name,
        labels=dict(s.labels),
        command=s.command,
        env=dict(s.env),
        working_directory=s.working_directory,
        resources=resources_to_pb(s.resources),
        walltime_s=s.walltime_s,
        tags_required=s.tags_required,
        tags_forbidden=s.tags_forbidden,
        priority=s.priority,
        retries=s.retries,
        retry_backoff_s=s.retry_backoff_s,
        restart_on_node_failure=s.restart_on_node_failure,
        owner=s.owner,
        grace_s=s.grace_s,
        clearance=s.clearance,
        sealed=trustcodec.envelope_to_pb(s.sealed) if s.sealed is not None else None,
        secrets=[pb.SecretRef(name=name, file=file) for name, file in s.secrets],
        overlap=s.overlap,
        losses_allowed=s.losses_allowed,
        container=container_to_pb(s.container) if s.container is not None else None,
        keep_scratch_s=s.keep_scratch_s,
        open_files_max=s.open_files_max,
    )


def spec_from_pb(m: pb.TaskSpec) -> TaskSpec:
    """Message to model; an absent restart_on_node_failure means yes. Maps and tags come out sorted."""
    return TaskSpec(
        id=TaskId(m.id),
        command=tuple(m.command),
        name=m.name,
        labels=tuple(sorted(m.labels.items())),
        env=tuple(sorted(m.env.items())),
        working_directory=m.working_directory,
        resources=resources_from_pb(m.resources),
        walltime_s=m.walltime_s,
        tags_required=tuple(sorted(m.tags_required)),
        tags_forbidden=tuple(sorted(m.tags_forbidden)),
        priority=m.priority,
        retries=m.retries,
        retry_backoff_s=m.retry_backoff_s,
        restart_on_node_failure=m.restart_on_node_failure if m.HasField("restart_on_node_failure") else True,
        owner=m.owner,
        grace_s=m.grace_s,
        clearance=tuple(sorted(set(m.clearance))),
        sealed=trustcodec.envelope_from_pb(m.sealed) if m.HasField("sealed") else None,
        secrets=tuple((r.name, r.file or r.name) for r in m.secrets),
        overlap=m.overlap,
        losses_allowed=m.losses_allowed if m.HasField("losses_allowed") else LOSSES_ALLOWED,
        container=container_from_pb(m.container) if m.HasField("container") else None,
        keep_scratch_s=m.keep_scratch_s,
        open_files_max=m.open_files_max,
    )


def container_to_pb(c: ContainerSpec) -> pb.ContainerSpec:
    """Model to message."""
    return pb.ContainerSpec(
        image=c.image,
        network="" if c.network == "none" else c.network,
        writable=c.writable,
        user=c.user,
        capabilities=c.capabilities,
        mounts=[pb.Mount(source=m.source, target=m.target, writable=m.writable) for m in c.mounts],
        tmp_bytes=c.tmp_bytes,
    )


def container_from_pb(m: pb.ContainerSpec) -> ContainerSpec:
    """Message to model, in normal form."""
    return ContainerSpec(
        image=m.image,
        network=m.network or "none",
        writable=m.writable,
        user=m.user,
        capabilities=tuple(sorted(set(m.capabilities))),
        mounts=tuple(sorted((Mount(x.source, x.target, x.writable) for x in m.mounts), key=lambda x: x.target)),
        tmp_bytes=m.tmp_bytes,
    )


def usage_to_pb(u: Usage) -> pb.Usage:
    """Model to message."""
    return pb.Usage(
        cpu_user_s=u.cpu_user_s,
        cpu_system_s=u.cpu_system_s,
        memory_peak_bytes=u.memory_peak_bytes,
        io_read_bytes=u.io_read_bytes,
        io_write_bytes=u.io_write_bytes,
        pids_peak=u.pids_peak,
    )


def usage_from_pb(m: pb.Usage) -> Usage:
    """Message to model."""
    return Usage(m.cpu_user_s, m.cpu_system_s, m.memory_peak_bytes, m.io_read_bytes, m.io_write_bytes, m.pids_peak)


def attempt_to_pb(a: Attempt) -> pb.Attempt:
    """Model to message."""
    return pb.Attempt(
        number=a.number,
        node=a.node,
        incarnation=a.incarnation,
        token=a.token,
        started_ms=a.started_ms,
        ended_ms=a.ended_ms,
        outcome=pb.Outcome.ValueType(a.outcome),
        exit_code=a.exit_code,
        signal=a.signal,
        reason=a.reason,
        message=a.message,
        usage=usage_to_pb(a.usage),
    )


def attempt_from_pb(m: pb.Attempt) -> Attempt:
    """Message to model."""
    return Attempt(
        number=m.number,
        node=NodeId(m.node),
        incarnation=IncarnationId(m.incarnation),
        token=Revision(m.token),
        started_ms=m.started_ms,
        ended_ms=m.ended_ms,
        outcome=Outcome(m.outcome),
        exit_code=m.exit_code if m.HasField("exit_code") else None,
        signal=m.signal,
        reason=m.reason,
        message=m.message,
        usage=usage_from_pb(m.usage),
    )


def task_to_pb(t: Task) -> pb.Task:
    """Model to message."""
    return pb.Task(
        spec=spec_to_pb(t.spec),
        state=pb.State.ValueType(t.state),
        outcome=pb.Outcome.ValueType(t.outcome),
        reason=t.reason,
        message=t.message,
        attempts_started=t.attempts_started,
        attempts=[attempt_to_pb(a) for a in t.attempts],
        failures=t.failures,
        losses=t.losses,
        submitted_ms=t.submitted_ms,
        completed_ms=t.completed_ms,
        submitted_at_node=t.submitted_at_node,
        losses_excused=t.losses_excused,
        losses_preparing=t.losses_preparing,
    )


def task_from_pb(m: pb.Task) -> Task:
    """Message to model."""
    if m.state == pb.STATE_UNSPECIFIED:
        raise CorruptRecord(f"the record of task {m.spec.id or '?'} has no state")
    return Task(
        spec=spec_from_pb(m.spec),
        state=State(m.state),
        outcome=Outcome(m.outcome),
        reason=m.reason,
        message=m.message,
        attempts_started=m.attempts_started,
        attempts=tuple(attempt_from_pb(a) for a in m.attempts),
        failures=m.failures,
        losses=m.losses,
        submitted_ms=m.submitted_ms,
        completed_ms=m.completed_ms,
        submitted_at_node=m.submitted_at_node,
        losses_excused=m.losses_excused,
        losses_preparing=m.losses_preparing,
    )


def shim_to_pb(s: ShimInfo) -> pb.Shim:
    """Model to message."""
    return pb.Shim(
        code=s.code,
        release=s.release,
        started_ms=s.started_ms,
        retiring=s.retiring,
        attempts=s.attempts,
        services=s.services,
    )


def shim_from_pb(m: pb.Shim) -> ShimInfo:
    """Message to model."""
    return ShimInfo(m.code, m.release, m.started_ms, m.retiring, m.attempts, tuple(m.services))


def node_to_pb(n: NodeRecord) -> pb.Node:
    """Model to message."""
    return pb.Node(
        name=n.name,
        address=n.address,
        incarnation=n.incarnation,
        capacity=resources_to_pb(n.capacity),
        free=resources_to_pb(n.free),
        tags=n.tags,
        running=n.running,
        draining=n.draining,
        leaving=n.leaving,
        etcd_client_url=n.etcd_client_url,
        etcd_peer_url=n.etcd_peer_url,
        etcd_member_id=n.etcd_member_id,
        candidate=n.candidate,
        version=n.version,
        started_ms=n.started_ms,
        boot_id=n.boot_id,
        runtimes=n.runtimes,
        warnings=n.warnings,
        trust_generation=n.trust_generation,
        certificate_expires_ms=n.certificate_expires_ms,
        clearances=n.clearances,
        authority_signed=n.authority_signed,
        etcd_trust_generation=n.etcd_trust_generation,
        etcd_authority_signed=n.etcd_authority_signed,
        brake=n.brake,
        unfit=n.unfit,
        allows=n.allows,
        images=n.images,
        images_coming=n.images_coming,
        shims=map(shim_to_pb, n.shims),
        units={name: ",".join(labels) for name, labels in n.units},
    )


def node_from_pb(m: pb.Node) -> NodeRecord:
    """Message to model."""
    return NodeRecord(
        name=NodeId(m.name),
        address=m.address,
        incarnation=IncarnationId(m.incarnation),
        capacity=resources_from_pb(m.capacity),
        free=resources_from_pb(m.free),
        tags=tuple(m.tags),
        running=m.running,
        draining=m.draining,
        leaving=m.leaving,
        etcd_client_url=m.etcd_client_url,
        etcd_peer_url=m.etcd_peer_url,
        etcd_member_id=m.etcd_member_id,
        candidate=m.candidate,
        version=m.version,
        started_ms=m.started_ms,
        boot_id=m.boot_id,
        runtimes=tuple(m.runtimes),
        warnings=tuple(m.warnings),
        trust_generation=m.trust_generation,
        certificate_expires_ms=m.certificate_expires_ms,
        clearances=tuple(m.clearances),
        authority_signed=m.authority_signed,
        etcd_trust_generation=m.etcd_trust_generation,
        etcd_authority_signed=m.etcd_authority_signed,
        brake=m.brake,
        unfit=m.unfit,
        allows=tuple(m.allows),
        images=tuple(m.images),
        images_coming=tuple(m.images_coming),
        shims=tuple(map(shim_from_pb, m.shims)),
        units=tuple(sorted((name, tuple(labels.split(","))) for name, labels in m.units.items())),
    )
