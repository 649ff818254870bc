"""``spinetta cluster``: the cluster's certificate authorities, and its data as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from spinetta.cli import clusterdata, clusterstatus, exits, output
from spinetta.cli.base import client_options, config_option, credentials_file, json_option, with_client
from spinetta.cli.who import confirm, document, done, role_word

if TYPE_CHECKING:
    from pathlib import Path

    from spinetta.client.admin import AuthorityInfo, Rotated
    from spinetta.client.aio import AsyncClient


@click.group(epilog=exits.HELP)
def cluster() -> None:
    """See how the voters are; back up, restore and recover the cluster; see and change its certificate authorities.

    \b
    Examples:
      spinetta cluster status
      spinetta cluster backup today.db
      spinetta cluster recover                       # the majority of the voters is lost for good
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
    *retiring*, believed still until its time is over. BELIEVED is by how many of the nodes. Below it says which nodes a
    rotation waits for: for a worker until the old authority's time is over, then it is left behind and has to join
    again; for a voter as long as it lives.
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
    for kind, late in {a.kind: a for a in found if a.nodes_lagging}.items():
        output.tell(f"{kind}: waits for {_named(late)}")


def _named(authority: AuthorityInfo) -> str:
    more = authority.nodes_lagging - len(authority.lagging)
    return ", ".join(authority.lagging) + (f" and {more} more" if more else "")


@cluster.command("rotate-ca")
@click.option("--kind", type=click.Choice(["cluster", "etcd"]), default="cluster", show_default=True)
@click.option("--overlap", metavar="TIME", help="How long the old one is believed beside the new (see the policy).")
@click.option("--retire-now", is_flag=True, help="Do not wait for the end of the overlap: drop the old one.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask, with --retire-now; without it nothing is asked.")
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
    for an authority whose key was stolen. Your own certificate is exchanged first; other people have to log in anew.
    Workers that have not moved two minutes later have to join again.

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
    if yes and not retire_now:
        raise UserError("--yes is for --retire-now", field="yes", hint="nothing else is asked")
    overlap_s = parse_duration(overlap, "overlap") if overlap else 0.0
    if retire_now:
        confirm(f"Make all certificates of the old {kind} authority worthless now?", yes=yes, as_json=as_json)

    own = credentials_file(node, timeout, config_file) if retire_now and kind == "cluster" else None

    async def work(client: AsyncClient) -> Rotated:
        if retire_now:
            return await _retire(client, kind, own)
        return await client.admin.rotate_authority(kind, overlap_s=overlap_s)

    generation = with_client(work, node, timeout, config_file).generation
    what = (
        "the old authority is dropped" if retire_now else "a new authority has begun; see: spinetta cluster authorities"
    )
    done(f"{kind}: {what} (generation {generation})", {"kind": kind, "generation": generation}, as_json=as_json)


async def _retire(client: AsyncClient, kind: str, own: Path | None) -> Rotated:
    """End an overlap early. `own`: our credentials, which must not be by the old authority by then."""
    from spinetta.client.login import refresh

    late = next((a for a in await client.admin.authorities() if a.kind == kind and a.nodes_lagging), None)
    if late is not None:
        output.tell(f"{kind}: have not moved yet: {_named(late)}; workers among them may have to join again")
    for _ in range(2):  # the first time it may have been waiting for workers to believe the new one
        if own is not None:
            await refresh(client, own)
        rotated = await client.admin.rotate_authority(kind, retire_now=True)
        if not rotated.signs_now:
            break
    return rotated


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


for _command in (*clusterdata.COMMANDS, *clusterstatus.COMMANDS):
    cluster.add_command(_command)
