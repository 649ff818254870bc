"""``spinetta token``: join tokens."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from spinetta.cli import exits, output
from spinetta.cli.base import client_options, json_option, with_client
from spinetta.cli.who import complete_user, document, done, labels, role_of, role_word, tell_unreadable, words

if TYPE_CHECKING:
    from spinetta.access import TokenRecord
    from spinetta.client.admin import NewToken, Tokens
    from spinetta.client.aio import AsyncClient


@click.group(epilog=exits.HELP)
def token() -> None:
    """Make and revoke join tokens, with which nodes join and people log in.

    \b
    Examples:
      spinetta token create --role worker
      spinetta token create --role voter --uses 3 --ttl 30m
      spinetta token create --role client --user ann
      spinetta token list
    """


@token.command()
@click.option("--role", type=click.Choice(["voter", "worker", "client"]), required=True, help="What it lets in.")
@click.option("--user", metavar="NAME", shell_complete=complete_user, help="Whom a client token is for.")
@click.option("--ttl", metavar="TIME", help="How long it is good (1h).")
@click.option("--uses", metavar="N", type=click.IntRange(1, 10_000), help="How often it may be used (1).")
@click.option("--clearance", "-c", multiple=True, metavar="LABEL,…", help="What its nodes are cleared for.")
@click.option("--group", "-g", multiple=True, metavar="NAME,…", help="Groups that its nodes are in.")
@click.option("--approval", is_flag=True, help="An administrator approves each node that comes with it.")
@json_option
@client_options
def create(
    role: str,
    user: str | None,
    ttl: str | None,
    uses: int | None,
    clearance: tuple[str, ...],
    group: tuple[str, ...],
    approval: bool,
    as_json: bool,
    node: str | None,
    timeout: str | None,
    config_file: str | None,
) -> None:
    """Make a token and print it with the command to use it. It is shown this once; whoever has it may use it.

    A voter may hold a seat and is trusted with everything; a worker sees what concerns its tasks. Both take their
    clearance from the token. A client token is for one user, who must have been added before.

    Standard output gets the token alone, so that it can be put into a file; the rest goes to standard error.

    \b
    Examples:
      spinetta token create --role worker --clearance patient-data --uses 20 --ttl 4h
      (umask 077; spinetta token create --role client --user ann > ann.token)
    """
    from spinetta.access import TokenRole
    from spinetta.errors import UserError
    from spinetta.units import parse_duration

    if role == "client" and not user:
        raise UserError("a client token is for one user", field="user", hint="--user NAME; see spinetta user add")
    if role == "client" and (clearance or group or approval):
        raise UserError(
            "--clearance, --group and --approval are for nodes", field="role", hint="a user's are set by: user set"
        )
    if role != "client" and user:
        raise UserError("--user is for client tokens", field="user", hint="--role client")
    ttl_s = parse_duration(ttl, "ttl") if ttl else 0.0
    if ttl and ttl_s <= 0:
        raise UserError("a token that is good for no time", field="ttl", hint="e.g. --ttl 1h")

    async def work(client: AsyncClient) -> NewToken:
        return await client.admin.create_token(
            role_of(TokenRole, role),
            ttl_s=ttl_s,
            uses=uses or 0,
            clearances=labels(clearance),
            groups=words(group),
            user=user or "",
            approval=approval,
        )

    made = with_client(work, node, timeout, config_file)
    command = _command(made)
    if as_json:
        output.put_json(
            {"token": made.text, "command": command, "addresses": list(made.addresses), **_document(made.record)}
        )
        return
    output.say(made.text)
    left = _words_left(made.record)
    output.tell(f"\nToken {made.record.id} for a {role}{f', user {user}' if user else ''}: {left}.")
    output.tell(f"Put it into a file that nobody else may read, e.g. join.token, then:\n\n  {command}\n")
    if approval:
        output.tell("Each node that uses it waits for: spinetta node approve NAME")


def _command(made: NewToken) -> str:
    peers = ",".join(made.addresses[:3]) or "HOST:PORT"
    if role_word(made.record.role) == "client":
        return f"spinetta login --node {peers} --token-file join.token"
    return f"spinetta node join --address HOST:PORT --peers {peers} --token-file join.token"


def _words_left(t: TokenRecord) -> str:
    from spinetta.units import format_duration

    left_s = t.expires_ms / 1000 - time.time()
    uses = f"{t.uses_left} use{'' if t.uses_left == 1 else 's'}"
    return f"{uses}, good for {format_duration(round(max(left_s, 0)))}"


@token.command("list")
@json_option
@client_options
def list_tokens(as_json: bool, node: str | None, timeout: str | None, config_file: str | None) -> None:
    """List the tokens there are, also those that are spent, revoked or past."""

    async def work(client: AsyncClient) -> Tokens:
        return await client.admin.all_tokens()

    tokens = with_client(work, node, timeout, config_file)
    found = tokens.records
    tell_unreadable(tokens.unreadable)
    if as_json:
        output.put_json({"tokens": [_document(t) for t in found], "unreadable": tokens.unreadable})
        return
    from spinetta.cli.show import age, moment

    header = ("ID", "ROLE", "FOR", "STATE", "LEFT", "EXPIRES", "CLEARANCE", "GROUPS", "APPROVAL", "AGE", "BY")
    rows = [
        (
            t.id,
            role_word(t.role),
            t.user,
            _state(t),
            str(t.uses_left),
            moment(t.expires_ms),
            ",".join(t.clearances),
            ",".join(t.groups),
            "yes" if t.approval else "",
            age(t.created_ms),
            t.created_by,
        )
        for t in sorted(found, key=lambda t: t.created_ms)
    ]
    colours = {(i, 3): "green" if row[3] == "good" else "dim" for i, row in enumerate(rows)}
    output.table(header, rows, right=(4,), colours=colours)


def _state(t: TokenRecord) -> str:
    if t.revoked:
        return "revoked"
    if t.expires_ms <= time.time() * 1000:
        return "expired"
    return "good" if t.uses_left else "spent"


def _document(t: TokenRecord) -> dict[str, object]:
    found: dict[str, object] = document(t, without=("salt", "secret_hash"))
    return {**found, "state": _state(t)}


def _ids(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    from spinetta.cli.who import COMPLETION_LIMIT_S
    from spinetta.errors import SpinettaError

    async def work(client: AsyncClient) -> list[TokenRecord]:
        return await client.admin.tokens()

    try:
        found = with_client(work, None, COMPLETION_LIMIT_S, None)
    except SpinettaError:
        return []
    return [t.id for t in found if t.id.startswith(incomplete) and _state(t) == "good"]


@token.command()
@click.argument("token_id", metavar="ID", shell_complete=_ids)
@json_option
@client_options
def revoke(token_id: str, as_json: bool, node: str | None, timeout: str | None, config_file: str | None) -> None:
    """Let nobody join with a token any more. Who has joined with it stays: see `spinetta node revoke`.

    \b
    Example:
      spinetta token revoke k3x7m2qa
    """
    # Whoever has the text only, e.g. from where it leaked, has the id as well.
    if token_id.strip().count("_") > 1:
        from spinetta.tokens import parse

        token_id = parse(token_id).id

    async def work(client: AsyncClient) -> None:
        await client.admin.revoke_token(token_id)

    with_client(work, node, timeout, config_file)
    done(f"token {token_id} is revoked", {"token": token_id, "state": "revoked"}, as_json=as_json)
