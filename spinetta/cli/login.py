"""``spinetta login``, ``logout`` and ``whoami``."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spinetta.cli import exits, output
from spinetta.cli.base import client_options, config_files, config_option, json_option, with_client
from spinetta.errors import NotFound, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spinetta.client.admin import WhoAmI
    from spinetta.client.aio import AsyncClient
    from spinetta.client.credentials import Stored
    from spinetta.config import ClientSettings
    from spinetta.trust.contact import Met

TOKEN_BYTES_MAX = 4096  # ours have 114 characters
HASH_HINT = "--ca-hash HASH; an administrator sees it with: spinetta cluster authorities"


@click.command(epilog=exits.HELP)
@click.option("--node", metavar="HOST:PORT,…", help="Any nodes of the cluster (SPINETTA_NODE).")
@click.option("--token-file", metavar="FILE", help="File with the token; - for standard input.")
@click.option("--token", metavar="TOKEN", help="The token itself. Others on this machine can see it in ps.")
@click.option(
    "--bearer-file", metavar="FILE", help="An OIDC bearer token instead of one of ours; - for standard input."
)
@click.option("--ca-hash", metavar="HASH", help="Of the cluster's authority, for --bearer-file: believe no other.")
@click.option("--keep-bearer", is_flag=True, help="Take no certificate: use --bearer-file at each call.")
@click.option("--credentials", "out", metavar="FILE", help="Where to save (~/.config/spinetta/credentials.pem).")
@click.option("--force", is_flag=True, help="Also over the credentials of somebody else or another cluster.")
@click.option("--timeout", metavar="TIME", help="How long it may take (20s).")
@json_option
@config_option
def login(
    node: str | None,
    token_file: str | None,
    token: str | None,
    bearer_file: str | None,
    ca_hash: str | None,
    keep_bearer: bool,
    out: str | None,
    force: bool,
    timeout: str | None,
    as_json: bool,
    config_file: str | None,
) -> None:
    """Get a certificate of a secured cluster, which all other commands then use.

    The key is made here and never leaves this machine. The token says which cluster is meant, so that nobody can
    stand in between; an administrator makes it with `spinetta token create --role client --user NAME`. A certificate
    renews itself when it is used in the last third of its life.

    With --bearer-file, a token of an OIDC issuer that the cluster believes gets the certificate; the cluster's
    authority is then compared by --ca-hash, or by you.

    \b
    Examples:
      spinetta login --node 10.0.0.5:7220 --token-file ann.token
      spinetta login --node 10.0.0.5:7220 --token-file - < ann.token
      spinetta login --node 10.0.0.5:7220 --bearer-file ~/.oidc-token --ca-hash 5f0c…
    """
    _check_ways(token, token_file, bearer_file, keep_bearer)
    if bearer_file and keep_bearer:
        _check_kept(bearer_file)
    settings = _settings(node, timeout, config_file)
    path = _place(out, settings)
    there = _check_there(path, force=force)
    addresses, timeout_s = settings.nodes, settings.timeout_s
    if bearer_file:
        bearer_file = bearer_file if bearer_file == "-" else str(Path(bearer_file).absolute())
        stored, name = asyncio.run(
            _by_bearer(addresses, bearer_file, ca_hash, timeout_s, keep=keep_bearer, as_json=as_json)
        )
    else:
        text = token or os.environ.get("SPINETTA_TOKEN") or _secret_text(token_file or _no_token(), "token_file")
        stored = asyncio.run(_by_token(addresses, text, timeout_s))
        name = stored.credentials.name if stored.credentials else ""
    _save(path, stored, there)
    _tell(path, stored, name, as_json=as_json)


def _check_ways(token: str | None, token_file: str | None, bearer_file: str | None, keep_bearer: bool) -> None:
    if sum(map(bool, (token, token_file, bearer_file))) > 1:
        raise UserError(
            "more than one token is given", field="token", hint="one of --token, --token-file and --bearer-file"
        )
    if keep_bearer and (not bearer_file or bearer_file == "-"):
        raise UserError("--keep-bearer is for a --bearer-file", field="keep_bearer", hint="name a file, not -")


def _check_kept(bearer_file: str) -> None:
    from spinetta.client.credentials import check_private

    check_private(Path(bearer_file))


def _no_token() -> str:
    if not sys.stdin.isatty():
        raise UserError(
            "there is no token", field="token", hint="--token-file FILE, - for standard input, or SPINETTA_TOKEN"
        )
    return "?"


def _settings(node: str | None, timeout: str | None, config_file: str | None) -> ClientSettings:
    from spinetta.config import resolve_client

    return resolve_client({"node": node, "timeout": timeout}, os.environ, config_files(config_file)).settings


def _place(chosen: str | None, settings: ClientSettings) -> Path:
    """Where the credentials are, or are to be."""
    from spinetta.client.credentials import default_path

    if chosen:
        return Path(chosen).absolute()
    return Path(settings.credentials) if settings.credentials not in ("", "none") else default_path()


def _secret_text(source: str, field: str) -> str:
    """What a file, standard input (-) or a hidden prompt (?) says."""
    if source == "?":
        return str(click.prompt("Token", hide_input=True, err=True))
    try:
        if source == "-":
            if sys.stdin.isatty():
                return str(click.prompt("Token", hide_input=True, err=True))
            data = sys.stdin.buffer.read(4 * TOKEN_BYTES_MAX + 1)
        else:
            with Path(source).open("rb") as file:
                data = file.read(4 * TOKEN_BYTES_MAX + 1)
    except FileNotFoundError:
        raise UserError(f"there is no file {source}", field=field, hint="check its name") from None
    except OSError as e:
        raise UserError(f"{source} cannot be read: {e.strerror}", field=field, hint="check its permissions") from e
    if len(data) > 4 * TOKEN_BYTES_MAX:
        raise UserError(f"{source} is too long for a token", field=field, hint="is it the right file?")
    try:
        return data.decode().strip()
    except UnicodeDecodeError:
        raise UserError(f"{source} is not text", field=field, hint="is it the right file?") from None


async def _by_token(addresses: Sequence[str], text: str, timeout_s: float) -> Stored:
    from spinetta.client.login import with_token

    return await with_token(addresses, text, timeout_s)


async def _by_bearer(
    addresses: Sequence[str], bearer_file: str, ca_hash: str | None, timeout_s: float, *, keep: bool, as_json: bool
) -> tuple[Stored, str]:
    """What to keep, and the name by which the cluster knows the token's holder."""
    from spinetta.client.credentials import NODES_MAX, Stored, check_bearer
    from spinetta.client.login import whose_bearer, with_bearer
    from spinetta.trust.contact import meet

    text = check_bearer(_secret_text(bearer_file, "bearer_file"), bearer_file)
    wanted = _parse_hash(ca_hash) if ca_hash else _agreed(await meet(addresses, None), as_json=as_json)
    met = await meet(addresses, wanted)
    if keep:
        found = await whose_bearer(met, text, timeout_s)  # a token that does not count is told now
        known = tuple(dict.fromkeys([*met.voters, met.address]))[:NODES_MAX]
        return Stored(met.ca_bundle, None, known, bearer_file), found.name
    stored = await with_bearer(met, text, timeout_s)
    return stored, stored.credentials.name if stored.credentials else ""


def _parse_hash(text: str) -> bytes:
    try:
        found = bytes.fromhex(text.strip().replace(":", ""))
    except ValueError:
        found = b""
    if len(found) != 32:
        raise UserError(
            "not the hash of an authority",
            field="ca_hash",
            hint="64 hexadecimal digits; see: spinetta cluster authorities",
        )
    return found


def _agreed(met: Met, *, as_json: bool) -> bytes:
    """The authority's hash, once the person here has compared it."""
    if as_json or not sys.stdin.isatty():
        raise UserError(
            f"nobody is here to compare the hash of the authority of cluster {met.cluster}",
            field="ca_hash",
            hint=HASH_HINT,
        )
    output.tell(f"Node {met.node} at {met.address} says: cluster {met.cluster}, whose authority has the hash\n")
    output.tell(f"  {met.ca_hash.hex()}\n")
    output.tell("Compare it with what an administrator sees with: spinetta cluster authorities")
    click.confirm("Is it the same?", abort=True, err=True)
    return met.ca_hash


def _check_there(path: Path, *, force: bool) -> Stored | None:
    """What is there already, before a token is spent: it must be something that can be written over.

    Raises:
        UserError: it cannot be used, so that whose it is cannot be told.
    """
    from spinetta.client.credentials import load

    if force or not path.exists():
        return None
    try:
        return load(path)
    except UserError as e:
        raise UserError(
            f"{path} is there already, and cannot be used: {e.message}",
            field="credentials",
            hint="--force, or another file",
        ) from None


def _save(path: Path, stored: Stored, there: Stored | None) -> None:
    """Save, but not over the credentials of somebody else: then beside them, as the token has been spent.

    Raises:
        UserError: they were saved beside, and where.
    """
    from spinetta.client.credentials import save

    old, new = (s.credentials.name if s is not None and s.credentials else "" for s in (there, stored))
    if there is None or (there.cluster == stored.cluster and (not (old and new) or old == new)):
        save(path, stored)
        return
    beside = path.with_name(f"{path.stem}-{new or 'bearer'}-{stored.cluster[:6]}.pem")
    save(beside, stored)
    raise UserError(
        f"{path} has the credentials of {old or 'a bearer token'} in cluster {there.cluster}; the new ones were saved "
        f"in {beside}",
        field="credentials",
        hint=f"use them with --credentials {beside}; or log in with --force the next time",
        reason="already-exists",
    )


def _tell(path: Path, stored: Stored, name: str, *, as_json: bool) -> None:
    from spinetta.trust.certificates import expiry

    own = stored.credentials
    until_s = expiry(own.cert_pem)[1] if own else 0.0
    if as_json:
        output.put_json(
            {
                "user": name,
                "cluster": stored.cluster,
                "credentials": str(path),
                "nodes": list(stored.nodes),
                "expires_ms": int(until_s * 1000),
            }
        )
        return
    if own is None:
        output.say(f"you are {name} in cluster {stored.cluster}, as long as {stored.bearer_file} says so, at each call")
    else:
        when = time.strftime("%Y-%m-%d", time.gmtime(until_s))
        output.say(f"logged in as {own.name} to cluster {stored.cluster}, until {when} and renewed by use")
    output.tell(f"saved in {path}; try: spinetta whoami")


@click.command()
@click.option("--credentials", "chosen", metavar="FILE", help="Which (~/.config/spinetta/credentials.pem).")
@json_option
@config_option
def logout(chosen: str | None, as_json: bool, config_file: str | None) -> None:
    """Remove the credentials from this machine.

    The certificate itself stays good until it expires: if somebody may have a copy, have an administrator say
    `spinetta user revoke-certificates NAME`.

    \b
    Example:
      spinetta logout
    """
    path = _place(chosen, _settings(None, None, config_file))
    try:
        path.unlink()
    except FileNotFoundError:
        raise NotFound(f"there is no file {path}", field="credentials", hint="you are logged out already") from None
    except OSError as e:
        raise UserError(f"{path} cannot be removed: {e.strerror}", field="credentials", hint="its directory?") from e
    if as_json:
        output.put_json({"credentials": str(path), "removed": True})
    else:
        output.say(f"{path} is removed")


@click.command()
@json_option
@client_options
def whoami(as_json: bool, node: str | None, timeout: str | None, config_file: str | None) -> None:
    """Show who the cluster takes you for, and what you may do.

    \b
    Examples:
      spinetta whoami
      spinetta whoami --credentials /var/lib/spinetta/admin.pem
    """

    async def work(client: AsyncClient) -> WhoAmI:
        return await client.admin.whoami()

    found = with_client(work, node, timeout, config_file)
    if as_json:
        from spinetta.cli.who import document

        output.put_json(document(found))
        return
    from spinetta.cli.show import moment

    if found.kind == "local":
        output.say("This is an open cluster: everybody on this machine may do everything.")
        return
    pairs = [
        (found.kind.capitalize(), found.name),
        ("Role", found.role),
        ("Projects", ", ".join(found.projects)),
        ("Clearance", ", ".join(found.clearances)),
        ("Cluster", found.cluster),
        ("Until", moment(found.expires_ms)),
    ]
    for heading, text in pairs:
        if text:
            output.say(f"{heading + ':':<11}{output.printable(text)}")
