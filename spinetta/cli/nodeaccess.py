"""``spinetta node requests, approve, reject, access, revoke, grant, withdraw, forget``: which nodes may be here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from spinetta.cli import output
from spinetta.cli.base import client_options, json_option, with_client
from spinetta.cli.who import (
    complete_group,
    complete_node,
    complete_request,
    confirm,
    document,
    done,
    labels,
    role_word,
    words,
)
from spinetta.errors import UserError

if TYPE_CHECKING:
    from spinetta.access import JoinRequest, NodeAcl
    from spinetta.client.aio import AsyncClient


@click.command()
@json_option
@client_options
def requests(as_json: bool, node: str | None, timeout: str | None, config_file: str | None) -> None:
    """List nodes that wait to be approved.

    KEY is the beginning of the hash of the key that the node has made; it prints the same when it begins to wait.
    """

    async def work(client: AsyncClient) -> tuple[JoinRequest, ...]:
        return (await client.admin.members()).requests

    found = with_client(work, node, timeout, config_file)
    if as_json:
        output.put_json({"requests": [document(r, without=("csr", "etcd_csr")) for r in found]})
        return
    from spinetta.cli.show import age

    rows = [
        (
            r.name,
            role_word(r.role),
            "rejected" if r.rejected else "waits",
            r.address,
            ",".join(r.clearances),
            ",".join(r.groups),
            r.key_hash.hex()[:16],
            age(r.created_ms),
            r.token_id,
        )
        for r in found
    ]
    output.table(("NAME", "ROLE", "STATE", "ADDRESS", "CLEARANCE", "GROUPS", "KEY", "AGE", "TOKEN"), rows)


@click.command()
@click.argument("name", shell_complete=complete_request)
@click.option("--clearance", "-c", multiple=True, metavar="LABEL,…", help="Instead of what its token grants; '': none.")
@json_option
@client_options
def approve(
    name: str,
    clearance: tuple[str, ...],
    as_json: bool,
    node: str | None,
    timeout: str | None,
    config_file: str | None,
) -> None:
    """Let a node in that waits.

    \b
    Examples:
      spinetta node approve n7
      spinetta node approve n7 --clearance internal
    """
    wanted = labels(clearance) if clearance else None

    async def work(client: AsyncClient) -> None:
        await client.admin.decide_join(name, approve=True, clearances=wanted)

    with_client(work, node, timeout, config_file)
    done(f"node {name} is approved", {"node": name, "decision": "approved"}, as_json=as_json)


@click.command()
@click.argument("name", shell_complete=complete_request)
@json_option
@client_options
def reject(name: str, as_json: bool, node: str | None, timeout: str | None, config_file: str | None) -> None:
    """Do not let a node in that waits."""

    async def work(client: AsyncClient) -> None:
        await client.admin.decide_join(name, approve=False)

    with_client(work, node, timeout, config_file)
    done(f"node {name} is rejected", {"node": name, "decision": "rejected"}, as_json=as_json)


@click.command()
@json_option
@client_options
def access(as_json: bool, node: str | None, timeout: str | None, config_file: str | None) -> None:
    """List all approved nodes with what they may do, also those that are not running or were revoked.

    CLEARANCE is what counts; labels in brackets were granted, but a group of the node does not have them.
    """

    async def work(client: AsyncClient) -> tuple[NodeAcl, ...]:
        return (await client.admin.members()).nodes

    found = with_client(work, node, timeout, config_file)
    if as_json:
        output.put_json({"nodes": [document(n) for n in found]})
        return
    from spinetta.cli.show import age

    rows = [
        (
            n.name,
            role_word(n.role),
            "revoked" if n.revoked else "good",
            _clearances(n),
            ",".join(n.groups),
            age(n.created_ms),
            n.created_by,
            n.reason,
        )
        for n in found
    ]
    colours = {(i, 2): "red" for i, n in enumerate(found) if n.revoked}
    output.table(("NAME", "ROLE", "STATE", "CLEARANCE", "GROUPS", "AGE", "BY", "REASON"), rows, colours=colours)


def _clearances(n: NodeAcl) -> str:
    return ",".join(label if label in n.effective else f"({label})" for label in n.clearances)


@click.command()
@click.argument("name", shell_complete=complete_node)
@click.option("--reason", default="", metavar="TEXT", help="For the record.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@json_option
@client_options
def revoke(
    name: str,
    reason: str,
    yes: bool,
    as_json: bool,
    node: str | None,
    timeout: str | None,
    config_file: str | None,
) -> None:
    """Shut a node out: from the next transaction on it claims and finishes nothing, and its tasks run elsewhere.

    What it has seen it has seen: change secrets that it could open. A voter loses its seat, and etcd gets a new
    authority, so that its certificate is worthless there. It knew the keys of both authorities: after a theft exchange
    the cluster's as well (`spinetta cluster rotate-ca`, then `--retire-now`).

    \b
    Example:
      spinetta node revoke n7 --reason "stolen from room 12"
    """
    confirm(f"Revoke node {name}? Its running tasks start again elsewhere.", yes=yes, as_json=as_json)
    from spinetta.access import NodeRole

    async def work(client: AsyncClient) -> NodeAcl:
        return await client.admin.set_node(name, revoke=True, reason=reason)

    found = with_client(work, node, timeout, config_file)
    done(f"node {name} is revoked", document(found), as_json=as_json)
    if found is not None and found.role is NodeRole.VOTER:
        output.tell("it knew the authorities' keys: etcd's is being exchanged now; was it stolen, or worse, then")
        output.tell(
            "exchange the cluster's as well: spinetta cluster rotate-ca, and when all nodes have moved --retire-now"
        )


@click.command()
@click.argument("name", shell_complete=complete_node)
@click.option("--clearance", "-c", multiple=True, metavar="LABEL,…", help="Labels to clear it for.")
@click.option(
    "--join-group", "-g", "group", multiple=True, metavar="NAME,…", shell_complete=complete_group, help="Put it into."
)
@json_option
@client_options
def grant(
    name: str,
    clearance: tuple[str, ...],
    group: tuple[str, ...],
    as_json: bool,
    node: str | None,
    timeout: str | None,
    config_file: str | None,
) -> None:
    """Clear a node for further labels, or put it into groups.

    \b
    Examples:
      spinetta node grant n7 --clearance patient-data
      spinetta node grant n7 --join-group site-b
    """
    if not (words(clearance) or words(group)):
        raise UserError("nothing is granted", field="clearance", hint="--clearance LABEL or --join-group NAME")
    granted, groups = labels(clearance), words(group)

    async def work(client: AsyncClient) -> NodeAcl:
        return await client.admin.set_node(name, grant=granted, join_groups=groups)

    found = with_client(work, node, timeout, config_file)
    _tell(found, as_json=as_json)


@click.command()
@click.argument("name", shell_complete=complete_node)
@click.option("--clearance", "-c", multiple=True, metavar="LABEL,…", help="Labels that it loses.")
@click.option(
    "--leave-group",
    "-g",
    "group",
    multiple=True,
    metavar="NAME,…",
    shell_complete=complete_group,
    help="Take it out of.",
)
@json_option
@client_options
def withdraw(
    name: str,
    clearance: tuple[str, ...],
    group: tuple[str, ...],
    as_json: bool,
    node: str | None,
    timeout: str | None,
    config_file: str | None,
) -> None:
    """Take labels from a node, or take it out of groups. The labels get new keys, which it does not have.

    \b
    Example:
      spinetta node withdraw n7 --clearance patient-data
    """
    if not (words(clearance) or words(group)):
        raise UserError("nothing is withdrawn", field="clearance", hint="--clearance LABEL or --leave-group NAME")
    withdrawn, groups = labels(clearance), words(group)

    async def work(client: AsyncClient) -> NodeAcl:
        return await client.admin.set_node(name, withdraw=withdrawn, leave_groups=groups)

    found = with_client(work, node, timeout, config_file)
    _tell(found, as_json=as_json)


@click.command()
@click.argument("name", shell_complete=complete_node)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@json_option
@client_options
def forget(name: str, yes: bool, as_json: bool, node: str | None, timeout: str | None, config_file: str | None) -> None:
    """Forget a revoked node: its name is free for another one."""
    confirm(f"Forget node {name}?", yes=yes, as_json=as_json)

    async def work(client: AsyncClient) -> NodeAcl:
        return await client.admin.set_node(name, remove=True)

    with_client(work, node, timeout, config_file)
    done(f"node {name} is forgotten", {"node": name, "removed": True}, as_json=as_json)


def _tell(n: NodeAcl, *, as_json: bool) -> None:
    groups = f"; in {', '.join(n.groups)}" if n.groups else ""
    done(f"node {n.name}: cleared for {', '.join(n.effective) or 'no label'}{groups}", document(n), as_json=as_json)
    lacking = [label for label in n.clearances if label not in n.effective]
    if lacking and not as_json:
        output.tell(f"note: a group of {n.name} does not have {', '.join(lacking)}")


COMMANDS = (requests, approve, reject, access, revoke, grant, withdraw, forget)
