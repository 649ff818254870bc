"""``spinetta group`` and ``spinetta policy``: the cluster's rules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spinetta.cli import exits, output
from spinetta.cli.base import client_options, json_option, with_client
from spinetta.cli.who import (
    complete_group,
    confirm,
    document,
    done,
    labels,
    rights_words,
    role_of,
    role_word,
    tell_unreadable,
    words,
)
from spinetta.errors import NotFound, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from spinetta.access import GroupMapping, Issuer, Policy
    from spinetta.client.admin import Access
    from spinetta.client.aio import AsyncClient

CA_BYTES_MAX = 64 << 10


@click.group(epilog=exits.HELP)
def group() -> None:
    """Groups of nodes, which limit what their nodes are cleared for.

    A node is cleared for a label only if it was granted to the node and every group of the node has it.

    \b
    Examples:
      spinetta group set site-b --clearance internal
      spinetta node grant n7 --join-group site-b
      spinetta group list
    """


@group.command("set")
@click.argument("name", shell_complete=complete_group)
@click.option("--clearance", "-c", multiple=True, required=True, metavar="LABEL,…", help="All that its nodes may have.")
@json_option
@client_options
def set_group(
    name: str,
    clearance: tuple[str, ...],
    as_json: bool,
    node: str | None,
    timeout: str | None,
    config_file: str | None,
) -> None:
    """Make a group, or change what its nodes may be cleared for. '' for nothing.

    \b
    Example:
      spinetta group set site-b --clearance internal,genomes
    """
    wanted = labels(clearance)

    async def work(client: AsyncClient) -> int:
        return await client.admin.set_group(name, wanted)

    changed = with_client(work, node, timeout, config_file)
    found = {"group": name, "clearances": list(wanted), "nodes_changed": changed}
    done(f"group {name}: {', '.join(wanted) or 'no clearance'}; {changed} nodes changed", found, as_json=as_json)


@group.command("list")
@json_option
@client_options
def list_groups(as_json: bool, node: str | None, timeout: str | None, config_file: str | None) -> None:
    """List groups with their nodes."""

    async def work(client: AsyncClient) -> Access:
        return await client.admin.members()

    found = with_client(work, node, timeout, config_file)
    groups = [(g, [n.name for n in found.nodes if g.name in n.groups]) for g in found.groups]
    tell_unreadable(found.unreadable)
    if as_json:
        documents = [{**document(g), "nodes": members} for g, members in groups]
        output.put_json({"groups": documents, "unreadable": found.unreadable})
        return
    rows = [(g.name, ",".join(g.clearances), ",".join(members)) for g, members in groups]
    output.table(("NAME", "CLEARANCE", "NODES"), rows)


@group.command("remove")
@click.argument("name", shell_complete=complete_group)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@json_option
@client_options
def remove_group(
    name: str, yes: bool, as_json: bool, node: str | None, timeout: str | None, config_file: str | None
) -> None:
    """Dissolve a group. Its limits are gone with it: its nodes are cleared for all that was granted to them."""
    confirm(f"Dissolve group {name}, and with it its limits?", yes=yes, as_json=as_json)

    async def work(client: AsyncClient) -> int:
        return await client.admin.remove_group(name)

    changed = with_client(work, node, timeout, config_file)
    done(f"group {name} is gone; {changed} nodes changed", {"group": name, "nodes_changed": changed}, as_json=as_json)


@click.group(epilog=exits.HELP)
def policy() -> None:
    """The cluster's rules: approval, lifetimes, limits, OIDC issuers.

    \b
    Examples:
      spinetta policy show
      spinetta policy set --approval yes --calls-per-s 200
      spinetta policy issuer add https://login.example.org --audience spinetta --prefix uni- --map staff=user:genomes
    """


@policy.command()
@json_option
@client_options
def show(as_json: bool, node: str | None, timeout: str | None, config_file: str | None) -> None:
    """Show the rules."""
    found = with_client(_policy, node, timeout, config_file)
    if as_json:
        output.put_json(document(found))
        return
    _show(found)


async def _policy(client: AsyncClient) -> Policy:
    return await client.admin.policy()


def _show(p: Policy) -> None:
    from spinetta.node.services import limits
    from spinetta.units import format_duration_exact

    def rate(given: float, built_in: float) -> str:
        return f"{given or built_in:g}/s for each identity{'' if given else ' (built in)'}"

    pairs = [
        ("Approval", "each joining node" if p.approval else "by token alone"),
        ("Node certs", format_duration_exact(p.node_certificate_s)),
        ("User certs", format_duration_exact(p.user_certificate_s)),
        ("Overlap", format_duration_exact(p.overlap_s)),
        ("Calls", rate(p.limits.calls_per_s, limits.CALLS_PER_S)),
        ("Tasks", rate(p.limits.tasks_per_s, limits.TASKS_PER_S)),
    ]
    for issuer in p.issuers:
        pairs.append(
            ("Issuer", f"{issuer.url} for {issuer.audience}" + (f", as {issuer.prefix}…" if issuer.prefix else ""))
        )
        pairs += [("", f"  {m.group} = {rights_words(m)}") for m in issuer.groups]
    for heading, text in pairs:
        if text:
            output.say(f"{heading + ':' if heading else '':<13}{output.printable(text)}")


@policy.command("set")
@click.option("--approval", type=click.Choice(["yes", "no"]), help="Whether an administrator approves each node.")
@click.option("--node-certificate", metavar="TIME", help="Lifetime; renewed at two thirds.")
@click.option("--user-certificate", metavar="TIME", help="The same for people.")
@click.option("--overlap", metavar="TIME", help="How long an old authority is believed beside a new one.")
@click.option("--calls-per-s", type=click.FloatRange(min=0), metavar="N", help="Of one identity; 0: as built in.")
@click.option("--tasks-per-s", type=click.FloatRange(min=0), metavar="N", help="Of one identity; 0: as built in.")
@json_option
@client_options
def set_policy(
    approval: str | None,
    node_certificate: str | None,
    user_certificate: str | None,
    overlap: str | None,
    calls_per_s: float | None,
    tasks_per_s: float | None,
    as_json: bool,
    node: str | None,
    timeout: str | None,
    config_file: str | None,
) -> None:
    """Change rules; what is not given stays.

    \b
    Examples:
      spinetta policy set --approval yes
      spinetta policy set --node-certificate 30d --user-certificate 12h
    """
    from spinetta.access import Limits
    from spinetta.units import parse_duration

    def change(p: Policy) -> Policy:
        def time(text: str | None, field: str, now_s: float) -> float:
            return now_s if text is None else parse_duration(text, field)

        return replace(
            p,
            approval=p.approval if approval is None else approval == "yes",
            node_certificate_s=time(node_certificate, "node_certificate", p.node_certificate_s),
            user_certificate_s=time(user_certificate, "user_certificate", p.user_certificate_s),
            overlap_s=time(overlap, "overlap", p.overlap_s),
            limits=Limits(
                p.limits.calls_per_s if calls_per_s is None else calls_per_s,
                p.limits.tasks_per_s if tasks_per_s is None else tasks_per_s,
            ),
        )

    _changed(change, as_json, (node, timeout, config_file))


def _changed(
    change: Callable[[Policy], Policy], as_json: bool, where: tuple[str | None, str | None, str | None]
) -> None:
    async def work(client: AsyncClient) -> Policy:
        wanted = change(await client.admin.policy())
        await client.admin.set_policy(wanted)
        return wanted

    found = with_client(work, *where)
    if as_json:
        output.put_json(document(found))
    else:
        _show(found)


@policy.group()
def issuer() -> None:
    """OIDC issuers whose bearer tokens are believed."""


@issuer.command()
@click.argument("url")
@click.option("--audience", required=True, metavar="TEXT", help="The token must be for it.")
@click.option(
    "--map", "mappings", multiple=True, required=True, metavar="GROUP=ROLE[:PROJECT,…[:LABEL,…]]",
    help="What members of an issuer's group may do; may be repeated.",
)  # fmt: skip
@click.option("--prefix", required=True, metavar="TEXT", help="Before its users' names: they are nobody else's.")
@click.option("--name-claim", default="sub", show_default=True, help="Where the name is.")
@click.option("--groups-claim", default="groups", show_default=True, help="Where the groups are.")
@click.option("--ca-file", metavar="FILE", help="To verify the issuer's certificate with, instead of the system's.")
@json_option
@client_options
def add(
    url: str,
    audience: str,
    mappings: tuple[str, ...],
    prefix: str,
    name_claim: str,
    groups_claim: str,
    ca_file: str | None,
    as_json: bool,
    node: str | None,
    timeout: str | None,
    config_file: str | None,
) -> None:
    """Believe an issuer's tokens, or replace what was said of it.

    A token gives the rights of the first of its groups that is mapped, highest role first; a token without one is
    refused.

    \b
    Examples:
      spinetta policy issuer add https://login.example.org --audience spinetta --prefix uni- \\
          --map staff=user --map ops=operator
      spinetta policy issuer add https://id.site-b.org --audience spinetta --prefix site-b- \\
          --name-claim preferred_username --map genomics=user:genomes:internal
    """
    from spinetta.access import Issuer

    if not url.startswith(("https://", "http://127.")):
        raise UserError("an issuer's address begins with https://", field="url", hint="as in the tokens' iss claim")
    wanted = Issuer(
        url, audience, prefix, name_claim, groups_claim, tuple(_mapping(text) for text in mappings), _ca(ca_file)
    )

    def change(p: Policy) -> Policy:
        return replace(p, issuers=(*(i for i in p.issuers if i.url != url), wanted))

    _changed(change, as_json, (node, timeout, config_file))


def _mapping(text: str) -> GroupMapping:
    from spinetta.access import GroupMapping, UserRole

    # Groups may be called like paths or mail addresses, so the last = counts; roles and labels have none.
    name, equals, rest = text.rpartition("=")
    role, _, more = rest.partition(":")
    projects, _, clearances = more.partition(":")
    if not equals or not name or role.upper() not in UserRole.__members__:
        roles = ", ".join(role_word(r) for r in UserRole)
        raise UserError(f"not GROUP=ROLE: {text!r}", field="map", hint=f"e.g. staff=user:genomes; roles: {roles}")
    return GroupMapping(name, role_of(UserRole, role), words([projects]), labels([clearances], "map"))


def _ca(path: str | None) -> bytes:
    if path is None:
        return b""
    try:
        with Path(path).open("rb") as file:
            data = file.read(CA_BYTES_MAX + 1)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}", field="ca_file", hint="a PEM file") from e
    if b"-----BEGIN CERTIFICATE-----" not in data or len(data) > CA_BYTES_MAX:
        raise UserError(f"{path} holds no certificate in PEM", field="ca_file", hint="a PEM file of 64 KiB at most")
    return data


@issuer.command()
@click.argument("url")
@json_option
@client_options
def remove(url: str, as_json: bool, node: str | None, timeout: str | None, config_file: str | None) -> None:
    """Believe an issuer's tokens no more, from the next call on. Certificates got with them stay good."""

    def change(p: Policy) -> Policy:
        left: tuple[Issuer, ...] = tuple(i for i in p.issuers if i.url != url)
        if len(left) == len(p.issuers):
            raise NotFound(f"there is no issuer {url}", field="url", hint="see: spinetta policy show")
        return replace(p, issuers=left)

    _changed(change, as_json, (node, timeout, config_file))
