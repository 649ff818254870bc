"""The node that is on a data directory: does its daemon answer, is its etcd well, are its certificates good?"""

from __future__ import annotations

import time
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from spinetta import units, upkeep
from spinetta.access import NodeRole
from spinetta.checkup import Finding, Level, ok
from spinetta.config import Settings
from spinetta.errors import SpinettaError, StoreUnavailable, UserError
from spinetta.node.entry import etcd_tls, remembered_any
from spinetta.node.lock import holder
from spinetta.runtime.generations import living
from spinetta.store.identity import Identity
from spinetta.store.maintenance import look
from spinetta.trust.credentials import NodeCredentials
from spinetta.trust.dial import Dialer, node_name

ANSWER_S = 5.0
SOON_S = 3 * 86400.0  # certificates renew themselves at two thirds of weeks: one that ends so soon did not


async def node(settings: Settings) -> list[Finding]:
    """All that can be asked without being anybody but this machine's node."""
    data_dir = Path(settings.data_dir)
    try:
        known = remembered_any(data_dir)
        pid = holder(data_dir)
        credentials = NodeCredentials.load(data_dir / "trust") if known is not None else None
    except UserError as e:
        return [Finding("node", Level.PROBLEM, e.message, "the node on it cannot start, or not be looked at", e.hint)]
    except OSError as e:
        return [
            Finding(
                "node", Level.PROBLEM, f"{data_dir} cannot be read: {e.strerror}", "", "run this as its node's user"
            )
        ]
    if known is None:
        return [ok("node", f"none has been on {data_dir} yet")]
    found = [_certificates(credentials)] if credentials is not None else []
    if pid is None:
        found.append(
            Finding("node", Level.NOTE, f"node {known.node} belongs to {data_dir}; its daemon does not run", "",
                    f"spinetta node join --data-dir {data_dir}")
        )  # fmt: skip
    else:
        found.append(await _daemon(known, pid, credentials))
    found += await _shims(data_dir)
    found += await _etcd(settings, known, credentials, runs=pid is not None)
    return found


async def _shims(data_dir: Path) -> list[Finding]:
    """After an upgrade there may be more than one for a while."""
    try:
        count = len(await living(data_dir / "shim"))
    except OSError:  # another user's
        return []
    if count <= 1:
        return []
    seen = f"{count} shims run: {count - 1} of them of before an upgrade, until what they hold has ended"
    return [Finding("node", Level.NOTE, seen, "", "spinetta node show; docs/operating.md#upgrading")]


def _certificates(credentials: NodeCredentials) -> Finding:
    left_s = credentials.identity.not_after_s - time.time()
    if left_s < 0:
        return Finding(
            "node", Level.PROBLEM,
            f"the certificate of node {credentials.name} ended {units.format_duration(-left_s)} ago",
            "the cluster does not let it in",
            "see that the clock is right; else join again with a token (docs/trust.md)",
        )  # fmt: skip
    seen = f"the certificate of node {credentials.name} is good for {units.format_duration(left_s)}"
    if left_s < SOON_S:
        return Finding(
            "node", Level.WARNING, seen, "it should have been renewed long ago", "start the node, and look into its log"
        )
    return ok("node", seen)


async def _daemon(known: Identity, pid: int, credentials: NodeCredentials | None) -> Finding:
    """Ask the daemon's health service, over the address that other nodes use."""
    dialer = Dialer.open() if credentials is None else Dialer.secured(credentials.pems)
    seen = f"node {known.node} (process {pid}, {known.address})"
    try:
        async with dialer.channel(known.address, node_name(known.node)) as channel:
            request = health_pb2.HealthCheckRequest()
            answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=ANSWER_S)
    except (grpc.aio.AioRpcError, SpinettaError) as e:
        why = (e.details() or e.code().name) if isinstance(e, grpc.aio.AioRpcError) else str(e)
        return Finding(
            "node", Level.PROBLEM, f"{seen} does not answer: {why}", "nobody can submit or ask there",
            "look into its log; spinetta node stop --keep, then spinetta node join: tasks run on meanwhile",
        )  # fmt: skip
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        return Finding(
            "node", Level.WARNING, f"{seen} answers, and says that it does not serve now",
            "it is starting, ending, or has lost the store", "spinetta cluster status",
        )  # fmt: skip
    return ok("node", f"{seen} answers and serves")


async def _etcd(
    settings: Settings, known: Identity, credentials: NodeCredentials | None, *, runs: bool
) -> list[Finding]:
    """Ask the members of etcd themselves, as this node does: that needs no daemon and no majority."""
    if credentials is not None and (credentials.role is not NodeRole.VOTER or credentials.etcd is None):
        return [ok("node", "a worker: it reaches the store through voters, and has no etcd to look at")]
    endpoints = list(known.endpoints)
    if known.member_id and known.etcd_client_port:
        host = known.address.rpartition(":")[0]
        scheme = "http" if credentials is None else "https"
        endpoints.insert(0, f"{scheme}://{host}:{known.etcd_client_port}")
    endpoints = list(dict.fromkeys(endpoints))
    if not endpoints:
        return []
    files = credentials.etcd if credentials is not None else None
    tls = etcd_tls(files) if files is not None else None
    try:
        view, _ = await look(endpoints, (), None if tls is None else lambda: tls)
    except StoreUnavailable as e:
        return [_no_etcd(str(e), runs=runs)]
    if not any(m.answers for m in view.members):
        return [_no_etcd(f"no etcd member answers at {', '.join(endpoints[:3])}", runs=runs)]
    notices = upkeep.notices(view, settings.etcd_quota_bytes)
    if not notices:
        members = f"{len(view.voters)} voters" if len(view.voters) != 1 else "1 voter"
        return [ok("node", f"etcd: {members}, all take part, {units.format_bytes(view.in_use_bytes)} in use")]
    level = Level.WARNING if view.has_majority else Level.PROBLEM
    return [Finding("node", level, f"etcd: {n}", "", "spinetta cluster status; docs/operating.md") for n in notices]


def _no_etcd(seen: str, *, runs: bool) -> Finding:
    if not runs:
        return Finding("node", Level.NOTE, f"{seen}, while this node's daemon does not run", "", "")
    return Finding("node", Level.PROBLEM, seen, "nothing can be submitted, seen or recorded", "see DATA/etcd.log")
