"""``spinetta cluster``: the cluster's certificate authorities."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from spinetta.cli import exits, output
from spinetta.cli.base import client_options, config_option, json_option, with_client
from spinetta.cli.who import confirm, document, done, role_word

if TYPE_CHECKING:
    from spinetta.client.admin import AuthorityInfo
    from spinetta.client.aio import AsyncClient


@click.group(epilog=exits.HELP)
def cluster() -> None:
    """See and change the cluster's certificate authorities.

    \b
    Examples:
      spinetta cluster authorities
      spinetta cluster rotate-ca --kind cluster --overlap 7d
      spinetta cluster rotate-ca --kind cluster --retire-now
      spinetta cluster rescue                        # nobody has an administrator's credentials any more
    """


@cluster.command()
@json_option
@client_options
def authorities(as_json: bool, node: str | None, timeout: str | None, config_file: str | None) -> None:
    """List the certificate authorities: of nodes and people (cluster), and of etcd's members (etcd).

    An authority is first *next*: nodes learn to believe it. Then it is *active* and signs; the one before is
    *retiring*, believed still until its time is over. BELIEVED is by how many of the nodes.
    """

    async def work(client: AsyncClient) -> list[AuthorityInfo]:
        return await client.admin.authorities()

    found = with_client(work, node, timeout, config_file)
    if as_json:
        output.put_json({"authorities": [document(a) for a in found]})
        return
    from spinetta.cli.show import moment

    rows = [
        (
            a.kind,
            role_word(a.state),
            a.hash,
            moment(a.created_ms),
            moment(a.expires_ms),
            f"{a.nodes_believing}/{a.nodes}",
            moment(a.retire_at_ms),
        )
        for a in found
    ]
    output.table(("KIND", "STATE", "HASH", "CREATED", "EXPIRES", "BELIEVED", "RETIRES"), rows)


@cluster.command("rotate-ca")
@click.option("--kind", type=click.Choice(["cluster", "etcd"]), default="cluster", show_default=True)
@click.option("--overlap", metavar="TIME", help="How long the old one is believed beside the new (see the policy).")
@click.option("--retire-now", is_flag=True, help="Do not wait for the end of the overlap: drop the old one.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@json_option
@client_options
def rotate_ca(
    kind: str,
    overlap: str | None,
    retire_now: bool,
    yes: bool,
    as_json: bool,
    node: str | None,
    timeout: str | None,
    config_file: str | None,
) -> None:
    """Begin a new certificate authority, in steps that no task notices.

    Nodes learn to believe the new one, then get certificates of it; people get theirs when they use the command line
    within the overlap, or log in anew. --retire-now makes all certificates of the old one worthless at once, which is
    for an authority whose key was stolen.

    \b
    Examples:
      spinetta cluster rotate-ca
      spinetta cluster rotate-ca --kind etcd --overlap 3d
      spinetta cluster rotate-ca --retire-now
    """
    from spinetta.errors import UserError
    from spinetta.units import parse_duration

    if retire_now and overlap:
        raise UserError("--overlap and --retire-now are given", field="overlap", hint="give one of the two")
    overlap_s = parse_duration(overlap, "overlap") if overlap else 0.0
    if retire_now:
        confirm(f"Make all certificates of the old {kind} authority worthless now?", yes=yes, as_json=as_json)

    async def work(client: AsyncClient) -> int:
        return await client.admin.rotate_authority(kind, overlap_s=overlap_s, retire_now=retire_now)

    generation = with_client(work, node, timeout, config_file)
    what = (
        "the old authority is dropped" if retire_now else "a new authority has begun; see: spinetta cluster authorities"
    )
    done(f"{kind}: {what} (generation {generation})", {"kind": kind, "generation": generation}, as_json=as_json)


@cluster.command()
@click.option("--data-dir", metavar="PATH", help="Of this machine's node, a voter [SPINETTA_DATA_DIR].")
@click.option("--user", default="admin", show_default=True, help="Who is made administrator.")
@json_option
@config_option
def rescue(data_dir: str | None, user: str, as_json: bool, config_file: str | None) -> None:
    """Make an administrator's credentials on a voter's machine, when nobody has any left.

    For root, or the user of the node. The cluster must be up; this machine's node need not. Writes DATA/admin.pem.

    \b
    Example:
      spinetta cluster rescue --data-dir /var/lib/spinetta
      SPINETTA_CREDENTIALS=/var/lib/spinetta/admin.pem spinetta whoami
    """
    import asyncio
    from pathlib import Path

    from spinetta.cli.node import resolved_node
    from spinetta.node.rescue import rescue as make

    directory = Path(resolved_node({"data_dir": data_dir}, config_file).settings.data_dir)
    path = asyncio.run(make(directory, user))
    done(f"credentials of administrator {user}: {path}", {"user": user, "path": str(path)}, as_json=as_json)
