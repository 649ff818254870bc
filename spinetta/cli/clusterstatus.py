"""``spinetta cluster status``: how the voters are, also while they have no majority."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from spinetta.cli import exits, output
from spinetta.cli.base import Finished, client_options, json_option, with_client

if TYPE_CHECKING:
    from spinetta.client.aio import AsyncClient
    from spinetta.client.views import ClusterInfo, VoterInfo

DEGRADED = exits.TASK_FAILED  # something is wrong, and the cluster works all the same


@click.command()
@json_option
@client_options
def status(as_json: bool, node: str | None, timeout: str | None, config_file: str | None) -> None:
    """Show how the voters are: who takes part and leads, how full the store is, alarms.

    FILE is the size of etcd's file, which may grow to the quota; USED is what of it holds records and their history;
    BEHIND is how many changes a member has still to take over. Any node answers, also while no majority of the voters
    does; in a secured cluster what you may do cannot be looked up then, and the error says who answers.

    \b
    Exit codes:
      0  all is well
      1  something is wrong, and the cluster works: a voter is missing, an alarm, the store is nearly full
      4  no majority of the voters answers: nothing can be submitted, seen or recorded (or no node answered)

    \b
    Examples:
      spinetta cluster status
      spinetta cluster status --json | jq .voters[].alarms
      spinetta cluster status --node 127.0.0.2:7220
    """

    async def work(client: AsyncClient) -> ClusterInfo:
        return await client.cluster()

    found = with_client(work, node, timeout, config_file)
    if as_json:
        output.put_json(cluster_document(found))
    else:
        _show(found)
    code = exits.OK if not found.notices else DEGRADED if found.has_majority else exits.UNAVAILABLE
    if code:
        raise Finished(code)


def cluster_document(c: ClusterInfo) -> dict[str, Any]:
    """For programs."""
    return {
        "cluster_id": c.cluster_id,
        "generation": c.generation,
        "node": c.node,
        "version": c.version,
        "has_majority": c.has_majority,
        "quota_bytes": c.quota_bytes,
        "voters": [voter_document(v, c.quota_bytes) for v in c.voters],
        "notices": list(c.notices),
    }


def voter_document(v: VoterInfo, quota_bytes: int) -> dict[str, Any]:
    """One member, for programs. What is known only of one that answers is null otherwise."""
    known = v if v.answers else None
    return {
        "name": v.name,
        "member_id": f"{v.member_id:x}",
        "client_url": v.client_url,
        "peer_url": v.peer_url,
        "learner": v.learner,
        "answers": v.answers,
        "healthy": v.healthy,
        "etcd_leader": v.leader,
        "etcd_version": known.version if known else None,
        "db_bytes": known.db_bytes if known else None,
        "db_in_use_bytes": known.db_in_use_bytes if known else None,
        "quota_used": round(v.db_in_use_bytes / quota_bytes, 4) if known and quota_bytes else None,
        "behind": known.behind if known else None,
        "alarms": list(v.alarms),
    }


def voter_row(v: VoterInfo, quota_bytes: int) -> tuple[str, ...]:
    """One line of the table."""
    from spinetta import units

    name = v.name or f"({v.member_id:x})"
    role = "learner" if v.learner else "leader" if v.leader else "voter"
    if not v.answers:
        return (name, role, "does not answer", "", "", "", "", "", ", ".join(v.alarms))
    return (
        name,
        role,
        "takes part" if v.healthy else "sees no leader",
        v.version,
        units.format_bytes(v.db_bytes),
        units.format_bytes(v.db_in_use_bytes),
        f"{100 * v.db_in_use_bytes / quota_bytes:.0f} %" if quota_bytes else "",
        str(v.behind),
        ", ".join(v.alarms),
    )


def _show(c: ClusterInfo) -> None:
    from spinetta import units

    output.say(f"cluster {c.cluster_id}, as node {c.node} sees it; quota {units.format_bytes(c.quota_bytes)}")
    header = ("VOTER", "ROLE", "STATE", "ETCD", "FILE", "USED", "FULL", "BEHIND", "ALARMS")
    output.table(header, [voter_row(v, c.quota_bytes) for v in c.voters], right=(4, 5, 6, 7))
    for notice in c.notices:
        output.tell(f"notice: {notice}")


COMMANDS = (status,)
