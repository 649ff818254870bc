"""``spinetta node requests, approve, reject, access, revoke, grant, withdraw, forget``: which nodes may be here."""

from __future__ import annotations

import re
import sys
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
    tell_unreadable,
    words,
)
from spinetta.errors import NotFound, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spinetta.access import JoinRequest, NodeAcl
    from spinetta.client.admin import Access
    from spinetta.client.aio import AsyncClient


@click.command()
@json_option
@client_options
def requests(as_json: bool, node: str | None, timeout: str | None, config_file: str | None) -> None:
    """List nodes that wait to be approved.

    KEY is the fingerprint of the key that the node has made; it prints the same when it begins to wait.
    """

    async def work(client: AsyncClient) -> Access:
        return await client.admin.members()

    members = with_client(work, node, timeout, config_file)
    found = members.requests
    tell_unreadable(members.unreadable)
    if as_json:
        waiting = [document(r, without=("csr", "etcd_csr")) for r in found]
        output.put_json({"requests": waiting, "unreadable": members.unreadable})
        return
    from spinetta.access import fingerprint
    from spinetta.cli.show import age

    rows = [
        (
            r.name,
            role_word(r.role),
            "rejected" if r.rejected else "waits",
            r.address,
            ",".join(r.clearances),
            ",".join(r.groups),
            fingerprint(r.key_hash),
            age(r.created_ms),
            r.token_id,
        )
        for r in found
    ]
    output.table(("NAME", "ROLE", "STATE", "ADDRESS", "CLEARANCE", "GROUPS", "KEY", "AGE", "TOKEN"), rows)


@click.command()
@click.argument("name", shell_complete=complete_request)
@click.option("--clearance", "-c", multiple=True, metavar="LABEL,…", help="Instead of what its token grants; '': none.")
@click.option(
    "--fingerprint", "given", metavar="HEX", help="The key that the node has printed, 8 digits of it or more."
)
@click.option("--yes", "-y", is_flag=True, help="Do not ask: whichever machine waits under the name.")
@json_option
@client_options
def approve(
    name: str,
    clearance: tuple[str, ...],
    given: str | None,
    yes: bool,
    as_json: bool,
    node: str | None,
    timeout: str | None,
    config_file: str | None,
) -> None:
    """Let a node in that waits: the machine whose key is shown, or named, and no other under its name.

    At a terminal it asks, unless the fingerprint is given.

    \b
    Examples:
      spinetta node approve n7
      spinetta node approve n7 --fingerprint 5d1f0c9a2b7e4410
      spinetta node approve n7 --clearance internal
    """
    from spinetta.access import JoinRequest, fingerprint
    from spinetta.names import check_node_name

    check_node_name(name, "name")
    wanted = labels(clearance) if clearance else None
    beginning = None if given is None else _digits(given)

    async def look(client: AsyncClient) -> JoinRequest | NodeAcl:
        return _meant(await client.admin.members(), name)

    found = with_client(look, node, timeout, config_file)
    key = fingerprint(found.key_hash)
    if beginning is not None and not found.key_hash.hex().startswith(beginning):
        raise UserError(
            f"the machine that asks under the name {name} has another key: {key}",
            field="fingerprint",
            hint="look at both: spinetta node requests, and what the node has printed",
            reason="changed",
        )
    if isinstance(found, JoinRequest) and beginning is None and not yes and sys.stdin.isatty():
        _show(found, found.clearances if wanted is None else wanted)
        click.confirm("Is that what the node has printed? Let it in?", abort=True, err=True)

    async def work(client: AsyncClient) -> None:
        await client.admin.decide_join(name, approve=True, key_hash=found.key_hash, clearances=wanted)

    with_client(work, node, timeout, config_file)
    decided = {"node": name, "decision": "approved", "fingerprint": key}
    done(f"node {name} is approved, with key {key}", decided, as_json=as_json)


def _digits(given: str) -> str:
    """A fingerprint, or its beginning."""
    beginning = given.strip().lower()
    if not re.fullmatch(r"[0-9a-f]{8,64}", beginning):
        raise UserError(
            f"not a fingerprint: {given!r}", field="fingerprint", hint="8 to 64 hexadecimal digits, as the node prints"
        )
    return beginning


def _meant(found: Access, name: str) -> JoinRequest | NodeAcl:
    """The request of this name; else the node, as the answer to an approval may have been lost."""
    from spinetta import keys
    from spinetta.model import NodeId

    waiting = next((r for r in found.requests if r.name == name), None)
    approved = next((n for n in found.nodes if n.name == name and not n.revoked), None)
    if meant := waiting or approved:
        return meant
    for key in (keys.request(NodeId(name)), keys.acl_node(NodeId(name))):
        found.check_readable(key)
    raise NotFound(f"no node {name} waits to be approved", field="name", hint="spinetta node requests")


def _show(r: JoinRequest, clearances: Sequence[str]) -> None:
    """A request, for who has to decide."""
    from spinetta.access import fingerprint

    state = f"{role_word(r.role)} at {r.address}" + (", rejected before" if r.rejected else "")
    output.tell(f"node {r.name}: {state}")
    output.tell(f"  clearance    {', '.join(clearances) or 'none'}")
    if r.groups:
        output.tell(f"  groups       {', '.join(r.groups)}")
    output.tell(f"  fingerprint  {fingerprint(r.key_hash)}")


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

    async def work(client: AsyncClient) -> Access:
        return await client.admin.members()

    members = with_client(work, node, timeout, config_file)
    found = members.nodes
    tell_unreadable(members.unreadable)
    if as_json:
        output.put_json({"nodes": [document(n) for n in found], "unreadable": members.unreadable})
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
