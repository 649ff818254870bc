"""``spinetta node``: run a node, and look after nodes."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from spinetta.cli import drain, exits, nodeaccess, nodeloss, output
from spinetta.cli.base import (
    Finished,
    client_options,
    config_files,
    config_option,
    default_data_dir,
    json_option,
    with_client,
)
from spinetta.errors import NotFound, OutcomeUnknown, StoreUnavailable, UserError
from spinetta.options import NODE_OPTIONS, variable

if TYPE_CHECKING:
    from spinetta.client.aio import AsyncClient
    from spinetta.client.views import NodeInfo, NodeList
    from spinetta.config import Resolved

F = TypeVar("F", bound=Callable[..., Any])

STOP_LIMIT_S = 120.0  # for a daemon to give its tasks back and end its shim
KEEP_LIMIT_S = 30.0


@click.group(epilog=exits.HELP)
def node() -> None:
    """Run a node, and look after nodes.

    \b
    Examples:
      spinetta node join --address 127.0.0.1:7220
      spinetta node join --address 127.0.0.2:7220 --peers 127.0.0.1:7220 --tags ssd
      spinetta node join --address 10.0.0.6:7220 --peers 10.0.0.5:7220 --token-file worker.token
      spinetta node list
      spinetta node drain n2 && spinetta node leave n2
    """


def setting_options(command: F) -> F:
    """A flag for each setting of a node."""
    for option in reversed(NODE_OPTIONS):
        text = f"{option.help} [{variable(option)}]"
        command = click.option(option.flag, option.key, metavar=option.metavar, help=text)(command)
    return command


def resolved_node(flags: dict[str, str | None], config_file: str | None) -> Resolved:
    """The node's settings from flags, environment and files."""
    from spinetta.config import resolve
    from spinetta.names import node_name_from_host

    for path in ("data_dir", "token_file"):  # what is typed is meant from here; files and variables are read anywhere
        if flags.get(path):
            flags = {**flags, path: os.path.abspath(str(flags[path]))}  # noqa: PTH100 - keeps symbolic links
    defaults = {"name": node_name_from_host(socket.gethostname()), "data_dir": default_data_dir()}
    return resolve(flags, os.environ, config_files(config_file), defaults)


@node.command()
@setting_options
@config_option
def join(config_file: str | None, **flags: str | None) -> None:
    """Run a node in the foreground.

    Without --peers it starts a new cluster, or goes on with the one that its data directory belongs to; with --peers
    it joins theirs. Every setting may also stand in a file (see `spinetta config show`) or a variable, named in
    brackets below; flags come first, then variables, then files.

    SIGTERM ends the daemon and leaves the tasks running for the next one (--on-terminate drain: waits for them;
    release: gives them back); Ctrl-C gives them back to the cluster and ends everything. A second one ends the daemon
    at once and leaves what runs as it is.

    \b
    Examples:
      spinetta node join
      spinetta node join --name n2 --address 127.0.0.2:7220 --data-dir /tmp/n2 --peers 127.0.0.1:7220
      spinetta node join --address 10.0.0.6:7220 --peers 10.0.0.5:7220 --token-file worker.token
      spinetta node join --cpus 8 --memory 32GiB --countables gpu=2 --tags ssd,site-a
    """
    resolved = resolved_node(flags, config_file)
    warn_of_loopback(resolved)
    from spinetta.node import start

    raise Finished(start.run(resolved))


def warn_of_loopback(resolved: Resolved) -> None:
    """The default address is on loopback: in a cluster of several machines that is an oversight."""
    from spinetta.names import is_loopback

    settings = resolved.settings
    if settings.peers and is_loopback(settings.address) and not any(is_loopback(p) for p in settings.peers):
        output.tell(
            f"warning: {settings.address} is on loopback, where no other machine reaches this node, e.g. for its logs: "
            "give --address"
        )


@node.command("list")
@json_option
@client_options
def list_nodes(as_json: bool, node: str | None, timeout: str | None, config_file: str | None) -> None:
    """List the nodes of the cluster.

    ROLE: a voter runs an etcd member, a worker does not; * holds the office of the leader. AGE is the time since the
    node started, SEEN since its last heartbeat was noticed. Resources are free/total. CLEARANCE is shown when a node
    is cleared for a label; IMAGES when one runs containers: digests that it has, + those on their way, - where none
    run. A draining node shows how many tasks it still has; of a lost one no more is known than its name.

    \b
    Examples:
      spinetta node list
      spinetta node list --json | jq -r '.nodes[] | select(.status != "ready") | .name'
    """
    found = with_client(_nodes, node, timeout, config_file)
    from spinetta.cli import show

    if as_json:
        output.put_json({"nodes": [show.node_document(n) for n in found.nodes], "notices": list(found.notices)})
        return
    node_table(found)


def node_table(found: NodeList) -> None:
    """Nodes as a table; notices to standard error."""
    from spinetta import units
    from spinetta.cli import show
    from spinetta.cli.contained import images_cell
    from spinetta.container import CONTAINER

    cleared = any(n.record.clearances for n in found.nodes)  # in open clusters no node ever is
    header = ["NAME", "ADDRESS", "STATUS", "ROLE", "CORES", "MEMORY", "DISK", "OTHER", "RUNNING", "AGE", "SEEN", "TAGS"]
    contained = any(CONTAINER in n.record.allows for n in found.nodes)
    header += ["CLEARANCE"] * cleared + ["IMAGES"] * contained
    rows, colours = [], {}
    for i, n in enumerate(found.nodes):
        free, all_, r = n.record.free, n.record.capacity, n.record
        other = dict(free.countables)
        rows.append(
            (
                r.name,
                r.address,
                drain.status_words(n),
                ("voter" if n.voter else "worker") + (" *" if n.leader else ""),
                *_offers(n),
                ",".join(f"{name}={other.get(name, 0)}/{total}" for name, total in all_.countables),
                str(r.running) if n.known else "",
                show.age(r.started_ms),
                "" if n.beat_age_ms < 0 else units.format_duration(n.beat_age_ms / 1000),
                ",".join(r.tags),
                *((",".join(r.clearances),) if cleared else ()),
                *((images_cell(r),) if contained else ()),
            )
        )
        colours[(i, 2)] = {"ready": "green", "draining": "yellow", "leaving": "yellow"}.get(n.status, "red")
    output.table(header, rows, right=(8,), colours=colours)
    for notice in found.notices:
        output.tell(f"notice: {notice}")


def _offers(n: NodeInfo) -> tuple[str, str, str]:
    """Cores, memory and disk, free/total; empty when they are not known: no resources would be another thing."""
    from spinetta import units

    if not n.known:
        return "", "", ""
    free, all_ = n.record.free, n.record.capacity
    return (
        f"{units.format_cpus(free.cpu_millis)}/{units.format_cpus(all_.cpu_millis)}",
        f"{units.format_bytes(free.memory_bytes)}/{units.format_bytes(all_.memory_bytes)}",
        f"{units.format_bytes(free.disk_bytes)}/{units.format_bytes(all_.disk_bytes)}",
    )


async def _nodes(client: AsyncClient) -> NodeList:
    return await client.nodes()


@node.command()
@click.argument("name", required=False)
@json_option
@client_options
def show(name: str | None, as_json: bool, node: str | None, timeout: str | None, config_file: str | None) -> None:
    """Show one node in full; without NAME the one that is asked.

    \b
    Examples:
      spinetta node show n2
      spinetta node show --json n2 | jq .warnings
    """

    from spinetta.cli.unitlines import Given, given_units, unit_words

    async def work(client: AsyncClient) -> tuple[NodeInfo, Given]:
        wanted = await drain.chosen(client, name)
        found = next((n for n in (await client.nodes()).nodes if n.record.name == wanted), None)
        if found is None:
            raise NotFound(f"there is no node {wanted}", field="node", hint="see: spinetta node list")
        return found, await given_units(client, found.record)

    found, given = with_client(work, node, timeout, config_file)
    from spinetta import openfiles
    from spinetta.cli import show as shown
    from spinetta.cli.contained import allowed_words

    if as_json:
        output.put_json({**shown.node_document(found), "units_given": given})
        return
    r = found.record
    pairs = [
        ("Node", r.name),
        ("Address", r.address),
        ("Status", drain.status_words(found)),
        ("Role", ("voter" if found.voter else "worker") + (", leader" if found.leader else "")),
        ("Offers", shown.resources_words(r.capacity)),
        ("Free", (shown.resources_words(r.free) or "nothing") if found.known else ""),
        ("Running", str(r.running) if found.known else ""),
        *(("Units", words) for words in unit_words(given)),
        ("Tags", ", ".join(r.tags)),
        ("Cleared for", ", ".join(r.clearances)),
        ("Started", shown.moment(r.started_ms)),
        ("Heartbeat", f"{found.beat_age_ms / 1000:.1f} s ago" if found.beat_age_ms >= 0 else ""),
        ("etcd", r.etcd_client_url + (" (leader)" if found.etcd_leader else "")),
        ("Runtimes", ", ".join(r.runtimes)),
        ("Allows", ", ".join(allowed_words(r.allows))),
        ("Open files", f"at most {most} for a task" if (most := openfiles.most(r.allows)) else ""),
        *(("Image", digest) for digest in r.images),
        *(("Image", f"{digest} (on its way)") for digest in r.images_coming),
        ("Certificate", f"until {shown.moment(r.certificate_expires_ms)}" if r.certificate_expires_ms else ""),
        *(("Shim", shown.shim_words(shim)) for shim in r.shims),
        ("Incarnation", r.incarnation),
        ("Version", r.version),
        *((("Takes no tasks", r.unfit),) if r.unfit else ()),
        *(("Warning", w) for w in r.warnings),
    ]
    for heading, text in pairs:
        if text:
            output.say(f"{heading + ':':<13}{output.printable(text)}")


@node.command()
@click.argument("name", required=False)
@click.option(
    "--wait", "wait_text", metavar="TIME", help="How long to wait for its tasks (default: its drain_timeout, 1h)."
)
@json_option
@client_options
def leave(
    name: str | None,
    wait_text: str | None,
    as_json: bool,
    node: str | None,
    timeout: str | None,
    config_file: str | None,
) -> None:
    """Let a node leave the cluster for good: it drains, gives up its voter's seat, deregisters and ends.

    Tasks that still run when the time is over go back to the queue. Without NAME the one that is asked leaves.
    Ctrl-C stops watching; the node goes on leaving.

    \b
    Examples:
      spinetta node leave n2
      spinetta node leave n2 --wait 0     # give its tasks back at once
    """
    from spinetta.units import parse_duration

    limit_s = None if wait_text is None else parse_duration(wait_text, "wait")

    async def work(client: AsyncClient) -> str:
        wanted = await drain.chosen(client, name)
        done = False
        try:
            async for step in client.leave(wanted, timeout_s=limit_s):
                done = done or step.done
                if as_json:
                    output.put_json_line(
                        {"node": wanted, "step": step.step, "running": step.running, "done": step.done}
                    )
                elif not step.done:
                    output.tell(f"{wanted}: {step.step}" + (f" ({step.running} running)" if step.running else ""))
        except OutcomeUnknown:
            if not done and not await _is_gone(client, wanted):
                raise
        if not as_json:
            output.say(f"{wanted} has left")
        return wanted

    with_client(work, node, timeout, config_file)


async def _is_gone(client: AsyncClient, name: str) -> bool:
    """Whether the others say that the node has left: the one that leaves may end before its last word arrives."""
    try:
        return all(n.record.name != name for n in (await client.nodes()).nodes)
    except StoreUnavailable:
        return False


@node.command()
@click.option("--data-dir", metavar="PATH", help="Of the node to stop [SPINETTA_DATA_DIR].")
@click.option("--keep", is_flag=True, help="End the daemon only: tasks and etcd go on for the next one.")
@json_option
@config_option
def stop(data_dir: str | None, keep: bool, as_json: bool, config_file: str | None) -> None:
    """Stop the node that runs on this machine with this data directory.

    Its tasks go back to the queue, its etcd member ends, and it may join again later; to take it out of the cluster
    for good use `spinetta node leave`. No error when nothing runs.

    \b
    Examples:
      spinetta node stop
      spinetta node stop --keep --data-dir /srv/n2     # to restart or upgrade the daemon
    """
    directory = Path(resolved_node({"data_dir": data_dir}, config_file).settings.data_dir)
    if not directory.is_dir():
        raise UserError(f"there is no data directory {directory}", field="data_dir", hint="name it with --data-dir")
    from spinetta.node.lock import holder

    pid = holder(directory)
    if pid is not None:
        _end(pid, signal.SIGUSR1 if keep else signal.SIGINT, KEEP_LIMIT_S if keep else STOP_LIMIT_S)
    # The daemon ends its shim itself; one whose daemon had died before is still there.
    shim = False if keep else _end_shim(directory)
    if as_json:
        output.put_json(
            {
                "data_dir": str(directory),
                "daemon_stopped": pid is not None,
                "shim_stopped": not keep and (shim or pid is not None),
            }
        )
    elif keep:
        output.say("the daemon has ended; tasks and etcd go on" if pid else "no daemon was running")
    else:
        output.say("stopped" if pid or shim else "nothing was running")


def _end(pid: int, number: signal.Signals, limit_s: float) -> None:
    """Signal a process and wait for its end, by a descriptor: the number might be used again."""
    import select

    from spinetta.runtime.processes import open_process

    try:
        fd = open_process(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(fd, number)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(limit_s * 1000):
            raise StoreUnavailable(f"process {pid} has not ended within {limit_s:g} s; look at the node's log")
    except ProcessLookupError:
        return
    except PermissionError:
        raise UserError(
            f"process {pid} is not ours to stop", field="data_dir", hint="use the user that started it, or root"
        ) from None
    finally:
        os.close(fd)


def _end_shim(directory: Path) -> bool:
    """End the shims that no daemon looks after, with all that they hold; False when there is none."""
    import asyncio

    from spinetta.node.entry import note_shims_ended
    from spinetta.node.networks import clear
    from spinetta.runtime import generations
    from spinetta.runtime.shims import end_all

    async def end() -> bool:
        try:
            found = await end_all(directory / "shim")
            await clear(directory)
            return found
        finally:
            await asyncio.to_thread(note_shims_ended, directory)
            await generations.sweep(directory / "shim", generations.SWEEP_AT_END_S)

    try:
        return asyncio.run(end())
    except OSError as e:
        raise UserError(f"the shims of {directory} cannot be ended: {e}", field="data_dir") from None


for _command in (drain.drain, drain.undrain, nodeloss.confirm_dead, *nodeaccess.COMMANDS):
    node.add_command(_command)
