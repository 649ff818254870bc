"""``spinetta secret``: passwords, keys and tokens for tasks."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from spinetta.cli import exits, output
from spinetta.cli.base import client_options, json_option, with_client
from spinetta.cli.files import read_limited
from spinetta.cli.who import confirm, document, done, labels
from spinetta.errors import UserError

if TYPE_CHECKING:
    from spinetta.access import SecretRecord
    from spinetta.client.aio import AsyncClient


@click.group(epilog=exits.HELP)
def secret() -> None:
    """Keep passwords, keys and tokens for tasks.

    A secret is sealed here for the nodes that may open it; the cluster's store never has it in clear. A task gets it
    as a file in memory, in the directory that $SPINETTA_SECRETS names.

    \b
    Examples:
      spinetta secret set s3-key < s3.key
      spinetta submit --secret s3-key -- sh -c 'upload --key-file "$SPINETTA_SECRETS/s3-key" out.bam'
      spinetta secret list
    """


def _names(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    from spinetta.cli.who import COMPLETION_LIMIT_S
    from spinetta.errors import SpinettaError

    async def work(client: AsyncClient) -> list[SecretRecord]:
        return await client.admin.secrets()

    try:
        return [s.name for s in with_client(work, None, COMPLETION_LIMIT_S, None) if s.name.startswith(incomplete)]
    except SpinettaError:
        return []


@secret.command("set")
@click.argument("name", shell_complete=_names)
@click.option("--file", "file", metavar="FILE", help="Where it is; else standard input, or a hidden prompt.")
@click.option("--clearance", "-c", multiple=True, metavar="LABEL,…", help="Only for tasks with all these labels.")
@click.option("--owner", "-p", default="", metavar="NAME", help="A project whose tasks get it (yourself).")
@json_option
@client_options
def set_secret(
    name: str,
    file: str | None,
    clearance: tuple[str, ...],
    owner: str,
    as_json: bool,
    node: str | None,
    timeout: str | None,
    config_file: str | None,
) -> None:
    """Store a secret, in the place of one of that name. Tasks that start from then on get the new one.

    It is taken byte by byte, with the newline at its end if it has one. There is no option for the value: others on
    this machine could see it.

    \b
    Examples:
      spinetta secret set s3-key < s3.key
      printf %s "$PASSWORD" | spinetta secret set db-password --owner genomes --clearance patient-data
    """
    wanted = labels(clearance)
    content = _content(file)
    if not content:
        raise UserError("the secret is empty", field="file", hint="--file FILE, or standard input")

    async def work(client: AsyncClient) -> int:
        return await client.put_secret(name, content, owner=owner, labels=wanted)

    version = with_client(work, node, timeout, config_file)
    done(
        f"secret {name} is stored, version {version}",
        {"name": name, "owner": owner, "clearances": list(wanted), "version": version},
        as_json=as_json,
    )


def _content(file: str | None) -> bytes:
    from spinetta.confidential import SECRET_BYTES_MAX

    path = file or "-"
    if path == "-" and sys.stdin.isatty():
        return str(click.prompt("Secret", hide_input=True, confirmation_prompt=True, err=True)).encode()
    data = read_limited(path, SECRET_BYTES_MAX)
    if len(data) > SECRET_BYTES_MAX:
        raise UserError(
            f"the secret has more than {SECRET_BYTES_MAX >> 10} KiB",
            field="file",
            hint="data belongs in files",
            reason="too-large",
        )
    return data


@secret.command("list")
@click.option("--owner", "-p", default="", metavar="NAME", help="Of a project, or of another user.")
@json_option
@client_options
def list_secrets(owner: str, as_json: bool, node: str | None, timeout: str | None, config_file: str | None) -> None:
    """List secrets, without what is in them."""

    async def work(client: AsyncClient) -> list[SecretRecord]:
        return await client.admin.secrets(owner)

    found = with_client(work, node, timeout, config_file)
    if as_json:
        output.put_json({"secrets": [document(s, without=("envelope",)) for s in found]})
        return
    from spinetta.access import MEMBERS
    from spinetta.cli.show import age

    rows = [
        (
            s.name,
            s.owner,
            "" if s.labels == (MEMBERS,) else ",".join(s.labels),
            str(s.version),
            age(s.created_ms),
            s.created_by,
        )
        for s in sorted(found, key=lambda s: (s.owner, s.name))
    ]
    output.table(("NAME", "OWNER", "CLEARANCE", "VERSION", "AGE", "BY"), rows, right=(3,))


@secret.command()
@click.argument("name", shell_complete=_names)
@click.option("--owner", "-p", default="", metavar="NAME", help="Of a project, or of another user.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@json_option
@client_options
def remove(
    name: str,
    owner: str,
    yes: bool,
    as_json: bool,
    node: str | None,
    timeout: str | None,
    config_file: str | None,
) -> None:
    """Remove a secret. Tasks that ask for it fail to start from then on."""
    confirm(f"Remove secret {name}?", yes=yes, as_json=as_json)

    async def work(client: AsyncClient) -> None:
        await client.admin.remove_secret(name, owner)

    with_client(work, node, timeout, config_file)
    done(f"secret {name} is removed", {"name": name, "removed": True}, as_json=as_json)
