"""``spinetta user``: people and programs, and what they may do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from spinetta.cli import exits, output
from spinetta.cli.base import client_options, json_option, with_client
from spinetta.cli.who import (
    complete_user,
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

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from spinetta.access import UserAcl
    from spinetta.client.admin import Access
    from spinetta.client.aio import AsyncClient

ROLES = click.Choice(["viewer", "user", "operator", "admin"])


@click.group(epilog=exits.HELP)
def user() -> None:
    """Add people and programs, and say what they may do.

    \b
    viewer    sees tasks and nodes
    user      submits, cancels and reads logs, for themselves and their projects
    operator  the same for everybody; drains nodes
    admin     users, tokens, nodes, policy, certificates

    \b
    Examples:
      spinetta user add ann --role user --project genomes
      spinetta token create --role client --user ann
      spinetta user set ann --clearance patient-data
      spinetta user revoke-certificates ann      # a lost laptop
    """


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        (
            click.option("--project", "-p", multiple=True, metavar="NAME,…", help="Whose tasks are as one's own."),
            click.option("--clearance", "-c", multiple=True, metavar="LABEL,…", help="Labels that may be handled."),
            click.option("--calls-per-s", type=click.FloatRange(min=0), metavar="N", help="0: as the policy says."),
            click.option("--tasks-per-s", type=click.FloatRange(min=0), metavar="N", help="0: as the policy says."),
        )
    ):
        command = option(command)
    return command


@user.command()
@click.argument("name")
@click.option("--role", type=ROLES, default="user", show_default=True, help="What the user may do.")
@_options
@json_option
@client_options
def add(
    name: str,
    role: str,
    project: tuple[str, ...],
    clearance: tuple[str, ...],
    calls_per_s: float | None,
    tasks_per_s: float | None,
    as_json: bool,
    node: str | None,
    timeout: str | None,
    config_file: str | None,
) -> None:
    """Add a user. To let them in, make a client token for them.

    \b
    Examples:
      spinetta user add ann
      spinetta user add ci-runner --project pipelines --clearance internal --tasks-per-s 50
    """
    from spinetta.access import Limits, UserAcl, UserRole
    from spinetta.names import check_owner

    check_owner(name, "name", "a name for a user")
    wanted = UserAcl(
        name,
        role_of(UserRole, role),
        words(project),
        labels(clearance),
        limits=Limits(calls_per_s or 0.0, tasks_per_s or 0.0),
    )

    async def work(client: AsyncClient) -> UserAcl:
        return await client.admin.set_user(wanted, create=True)

    found = with_client(work, node, timeout, config_file)
    done(f"user {name} is added: {rights_words(found)}", document(found), as_json=as_json)
    if not as_json:
        output.tell(f"To let them in: spinetta token create --role client --user {name}")


@user.command("list")
@json_option
@client_options
def list_users(as_json: bool, node: str | None, timeout: str | None, config_file: str | None) -> None:
    """List users. Those of an OIDC issuer are not among them unless they were added: their rights come with them."""

    async def work(client: AsyncClient) -> Access:
        return await client.admin.members()

    members = with_client(work, node, timeout, config_file)
    found = members.users
    tell_unreadable(members.unreadable)
    if as_json:
        output.put_json({"users": [document(u) for u in found], "unreadable": members.unreadable})
        return
    from spinetta.cli.show import age

    rows = [
        (
            u.name,
            role_word(u.role),
            "revoked" if u.revoked else "good",
            ",".join(u.projects),
            ",".join(u.clearances),
            age(u.created_ms),
            u.created_by,
            u.reason,
        )
        for u in found
    ]
    colours = {(i, 2): "red" for i, u in enumerate(found) if u.revoked}
    output.table(("NAME", "ROLE", "STATE", "PROJECTS", "CLEARANCE", "AGE", "BY", "REASON"), rows, colours=colours)


@user.command("set")
@click.argument("name", shell_complete=complete_user)
@click.option("--role", type=ROLES, help="What the user may do.")
@_options
@click.option("--restore", is_flag=True, help="Let a revoked user log in again.")
@json_option
@client_options
def set_user(
    name: str,
    role: str | None,
    project: tuple[str, ...],
    clearance: tuple[str, ...],
    calls_per_s: float | None,
    tasks_per_s: float | None,
    restore: bool,
    as_json: bool,
    node: str | None,
    timeout: str | None,
    config_file: str | None,
) -> None:
    """Change what a user may do; what is not given stays. It counts from the next call on.

    --project and --clearance replace the whole list; '' empties it.

    \b
    Examples:
      spinetta user set ann --role operator
      spinetta user set ann --project genomes,imaging
      spinetta user set ann --clearance ''
    """
    from dataclasses import replace

    from spinetta.access import Limits, UserRole

    async def work(client: AsyncClient) -> UserAcl:
        now = await client.admin.user(name)
        limits = Limits(
            now.limits.calls_per_s if calls_per_s is None else calls_per_s,
            now.limits.tasks_per_s if tasks_per_s is None else tasks_per_s,
        )
        wanted = replace(
            now,
            role=role_of(UserRole, role) if role else now.role,
            projects=words(project) if project else now.projects,
            clearances=labels(clearance) if clearance else now.clearances,
            limits=limits,
            revoked=now.revoked and not restore,
            reason="" if restore else now.reason,
        )
        return await client.admin.set_user(wanted)

    found = with_client(work, node, timeout, config_file)
    done(f"user {name}: {rights_words(found)}", document(found), as_json=as_json)
    if restore and not as_json:  # certificates from before the revocation stay worthless
        output.tell(f"To let them in again: spinetta token create --role client --user {name}")


@user.command()
@click.argument("name", shell_complete=complete_user)
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
    """Let a user do nothing any more, from the next transaction on. Their tasks go on: see `spinetta cancel`."""
    confirm(f"Revoke user {name}?", yes=yes, as_json=as_json)

    async def work(client: AsyncClient) -> None:
        await client.admin.revoke_user(name, reason)

    with_client(work, node, timeout, config_file)
    done(f"user {name} is revoked", {"user": name, "revoked": True}, as_json=as_json)


@user.command()
@click.argument("name", shell_complete=complete_user)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@json_option
@client_options
def remove(name: str, yes: bool, as_json: bool, node: str | None, timeout: str | None, config_file: str | None) -> None:
    """Forget a user. Whoever is added by the same name later inherits the tasks: revoking is mostly better."""
    confirm(f"Forget user {name}?", yes=yes, as_json=as_json)

    async def work(client: AsyncClient) -> None:
        await client.admin.remove_user(name)

    with_client(work, node, timeout, config_file)
    done(f"user {name} is forgotten", {"user": name, "removed": True}, as_json=as_json)


@user.command("revoke-certificates")
@click.argument("name", shell_complete=complete_user)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@json_option
@client_options
def revoke_certificates(
    name: str, yes: bool, as_json: bool, node: str | None, timeout: str | None, config_file: str | None
) -> None:
    """Make all certificates worthless that a user has so far, e.g. after a key was lost. They log in anew."""
    confirm(f"Make all certificates of {name} worthless?", yes=yes, as_json=as_json)

    async def work(client: AsyncClient) -> None:
        await client.admin.invalidate_certificates(name)

    with_client(work, node, timeout, config_file)
    done(f"certificates of {name} count no more", {"user": name, "certificates": "revoked"}, as_json=as_json)
    if not as_json:
        output.tell(f"To let them in again: spinetta token create --role client --user {name}")
