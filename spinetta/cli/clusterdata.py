"""``spinetta cluster backup``, ``restore`` and ``recover``: the cluster's data as a whole."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spinetta.cli import output
from spinetta.cli.base import client_options, config_option, json_option, with_client
from spinetta.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from spinetta.client.aio import AsyncClient
    from spinetta.config import Settings
    from spinetta.node.rebuilding import Confirm
    from spinetta.node.recovery import Made

TOLD_EVERY_S = 1.0

OTHERS_GONE = """\
Its other voters are given up: they must be gone for good. What only they have is lost. One that comes back finds out
that it does not belong here any more, puts its data aside and joins again; until then it must not reach a majority of
its old cluster, or there are two clusters that run the same tasks. Tasks that ran, or ended in the last moments, may
run again."""

OLD_GONE = """\
The cluster that it was taken of must not run any more: stop all its nodes first. What happened after the backup is
forgotten: tasks submitted since are gone, tasks that ended since run again, nodes and people revoked since have their
rights back, those let in since have none."""


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
@client_options
def backup(file: Path, as_json: bool, node: str | None, timeout: str | None, config_file: str | None) -> None:
    """Save all that the cluster knows into FILE: tasks, nodes, rights, sealed keys. For administrators.

    Any node will do; the cluster goes on meanwhile. FILE must not exist, and appears when it is whole and on the disk.
    It is a snapshot of etcd, as `etcdctl snapshot status` reads it, for its owner alone. Logs and results of tasks are
    not in it. In a secured cluster it opens nothing by itself: restoring takes the trust/ of a voter, too.

    \b
    Examples:
      spinetta cluster backup /backup/spinetta-$(date +%F).db
      spinetta cluster backup --node 10.0.0.5:7220 --json today.db
    """
    from spinetta import units
    from spinetta.store.snapshot import SnapshotFile, SnapshotWriter

    if str(file) == "-":
        raise UserError(
            "a backup does not go to standard output: nobody could tell whether it is whole",
            field="file",
            hint="name a file",
        )
    begun_s = time.monotonic()
    source = {"node": "", "cluster": ""}

    async def work(client: AsyncClient) -> SnapshotFile:
        from contextlib import aclosing

        told_s = begun_s
        with SnapshotWriter(file) as writer:
            async with aclosing(client.admin.backup()) as pieces:
                async for piece in pieces:
                    if piece.node:
                        source.update(node=piece.node, cluster=piece.cluster_id)
                    writer.write(piece.data)  # here: a thread could write on when this has been given up
                    if not as_json and time.monotonic() - told_s >= TOLD_EVERY_S:
                        told_s = time.monotonic()
                        all_bytes = writer.written_bytes + piece.remaining_bytes
                        output.tell(
                            f"{units.format_bytes(writer.written_bytes)} of about {units.format_bytes(all_bytes)}"
                        )
            return writer.finish()

    found = with_client(work, node, timeout, config_file)
    took_s = time.monotonic() - begun_s
    if as_json:
        output.put_json(
            {
                "file": str(found.path),
                "bytes": found.file_bytes,
                "sha256": found.sha256,
                "node": source["node"],
                "cluster_id": source["cluster"],
                "seconds": round(took_s, 3),
            }
        )
        return
    output.say(
        f"{found.path}: {units.format_bytes(found.file_bytes)} of cluster {source['cluster']}, from {source['node']}, "
        f"in {units.format_duration(took_s)}; SHA-256 {found.sha256}"
    )


_confirm_option = click.option(
    "--confirm", metavar="ID", help="For scripts: the id that would have to be typed. Nothing is asked then."
)
_nothing_runs_option = click.option(
    "--nothing-runs",
    is_flag=True,
    help="No task of the time before runs anywhere any more: all their machines were off. Nothing is waited for.",
)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--data-dir", metavar="PATH", help="Of the node to be; no node's yet [SPINETTA_DATA_DIR].")
@click.option("--name", metavar="NAME", help="Of the node to be [SPINETTA_NAME].")
@click.option("--address", metavar="HOST:PORT", help="Of the node to be [SPINETTA_ADDRESS].")
@click.option("--etcd-client-port", metavar="PORT", help="Of its etcd [SPINETTA_ETCD_CLIENT_PORT].")
@click.option("--etcd-peer-port", metavar="PORT", help="Of its etcd [SPINETTA_ETCD_PEER_PORT].")
@click.option("--etcd-program", metavar="PATH", help="Its etcd; etcdctl or etcdutl of that version must be there, too.")
@_confirm_option
@_nothing_runs_option
@json_option
@config_option
def restore(
    file: Path,
    confirm: str | None,
    nothing_runs: bool,
    as_json: bool,
    config_file: str | None,
    **flags: str | None,
) -> None:
    """Make a cluster of one node from a backup, when there is no cluster any more. Then start that node.

    The data directory must be new; of a secured cluster put the trust/ of one of its voters into it first, and use that
    voter's name. The cluster's id has to be typed. What ran at the time of the backup is put back into the queue when
    it is certain that it runs no more; the command waits for that (about a minute, see --nothing-runs).

    \b
    Examples:
      spinetta cluster restore today.db --data-dir /srv/n1 --name n1 --address 127.0.0.1:7220
      spinetta cluster restore today.db --data-dir /srv/n1 --confirm 6b1f0c3a5d2e4f78 --nothing-runs --json
    """
    from spinetta.node import rebuilding

    path = file.absolute()

    async def work(settings: Settings, directory: Path, ask: Confirm) -> Made:
        return await rebuilding.restore(
            settings, directory, path, confirm=ask, tell=_teller(as_json), nothing_runs=nothing_runs
        )

    question = f"{file} becomes a cluster of its own.\n{OLD_GONE}"
    _build(work, flags, config_file, question, confirm, as_json=as_json, new=True)


@click.command()
@click.option("--data-dir", metavar="PATH", help="Of this machine's node, a voter [SPINETTA_DATA_DIR].")
@_confirm_option
@_nothing_runs_option
@json_option
@config_option
def recover(
    data_dir: str | None, confirm: str | None, nothing_runs: bool, as_json: bool, config_file: str | None
) -> None:
    """Make a cluster of one node from this voter's data, when the majority of the voters is lost for good.

    On the machine of the one voter that has most (or of any), as root or the user of its node, which must be stopped:
    spinetta node stop --keep. It refuses while a majority can be reached. The cluster's id has to be typed. Then start
    the node again; others join it as before, and the cluster takes voters again by itself. The data of before is kept
    beside the new.

    \b
    Examples:
      spinetta cluster recover --data-dir /srv/n1
      spinetta cluster recover --data-dir /srv/n1 --confirm 6b1f0c3a5d2e4f78 --nothing-runs
    """
    from spinetta.node import rebuilding
    from spinetta.node.entry import remembered_any

    async def work(settings: Settings, directory: Path, ask: Confirm) -> Made:
        from dataclasses import replace

        known = remembered_any(directory)
        if known is not None:
            settings = replace(settings, name=known.node, address=known.address)
        return await rebuilding.recover(
            settings, directory, known, confirm=ask, tell=_teller(as_json), nothing_runs=nothing_runs
        )

    question = f"This node's data becomes a cluster of its own.\n{OTHERS_GONE}"
    _build(work, {"data_dir": data_dir}, config_file, question, confirm, as_json=as_json, new=False)


def _build(
    work: Callable[[Settings, Path, Confirm], Coroutine[Any, Any, Made]],
    flags: dict[str, str | None],
    config_file: str | None,
    question: str,
    confirmed: str | None,
    *,
    as_json: bool,
    new: bool,
) -> None:
    import asyncio

    from spinetta.cli.node import resolved_node
    from spinetta.node.lock import DirectoryLock, holder

    settings = resolved_node({k: v for k, v in flags.items() if v is not None}, config_file).settings
    directory = Path(settings.data_dir)
    if not new and not directory.is_dir():
        raise UserError(f"there is no data directory {directory}", field="data_dir", hint="name it with --data-dir")
    pid = holder(directory)
    if pid is not None:
        raise UserError(
            f"a daemon runs on {directory} (process {pid})",
            field="data_dir",
            hint=f"first: spinetta node stop --keep --data-dir {directory}",
            reason="already-exists",
        )
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{directory} cannot be made: {e.strerror}", field="data_dir", reason="disk") from e

    def ask(cluster_id: str) -> None:
        _typed(question, cluster_id or settings.name, confirmed, as_json=as_json)

    with DirectoryLock(directory):
        made = asyncio.run(work(settings, directory, ask))
    if as_json:
        output.put_json(
            {
                "cluster_id": made.cluster_id,
                "member_id": made.member_id,
                "generation": made.generation.id,
                "former_cluster_ids": list(made.generation.former_cluster_ids),
                "put_aside": made.put_aside,
                "data_dir": str(directory),
            }
        )
        return
    if made.put_aside:
        output.say(f"the data of before is in {made.put_aside}: remove it when all is well")
    output.say(f"cluster {made.cluster_id} is in {directory}; start its node: {_join_command(directory)}")


def _join_command(directory: Path) -> str:
    """How the node of a data directory is started, when no settings file says who it is."""
    from shlex import quote

    from spinetta.node.entry import remembered_any

    known = remembered_any(directory)
    who = f"--name {quote(known.node)} --address {known.address} " if known is not None and known.address else ""
    return f"spinetta node join {who}--data-dir {quote(str(directory))}"


def _typed(question: str, word: str, given: str | None, *, as_json: bool) -> None:
    """Have the cluster's id typed before what cannot be undone.

    Raises:
        UserError: it was another one, or nobody is there to type it.
    """
    if given is None:
        if as_json or not sys.stdin.isatty():
            raise UserError(
                "the cluster's id has to be typed, and nobody is here to do so",
                field="confirm",
                hint=f"add --confirm {word} if you mean it",
                reason="not-confirmed",
            )
        output.tell(question)
        given = click.prompt(f"Type {word} to go on", err=True, default="", show_default=False)
    if given.strip() != word:
        raise UserError(
            f"{given.strip() or 'nothing'} was typed, not {word}: nothing was changed",
            field="confirm",
            hint="look whether this is the right cluster",
            reason="not-confirmed",
        )


def _teller(as_json: bool) -> Callable[[str], None]:
    return (lambda _: None) if as_json else output.tell


COMMANDS = (backup, restore, recover)
