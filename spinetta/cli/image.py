"""``spinetta image``: images of containers on nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from spinetta.cli import exits, output
from spinetta.cli.base import Finished, client_options, json_option, waiting_client_options, with_client
from spinetta.cli.imageprogress import with_progress
from spinetta.cli.who import complete_running_node, done
from spinetta.errors import SpinettaError, UserError

if TYPE_CHECKING:
    from spinetta.client.aio import AsyncClient
    from spinetta.client.images import ImageInfo, ImageStep, NodeImages, Pulled, Verified

DIGEST_SHOWN = 12  # characters of hexadecimal: among 10,000 images two alike are one in five million
NAMES_SHOWN = 3

on_option = click.option(
    "--on",
    "on",
    default="",
    metavar="NODE",
    shell_complete=complete_running_node,
    help="Which node (the one that is asked).",
)


@click.group(epilog=exits.HELP)
def image() -> None:
    """Get, list, pin and remove images of containers.

    A node gets what its tasks ask for by itself, keeps it while it is used, and lets go of what is old or too much
    (settings image_keep and image_keep_time). These commands are for what is wanted beforehand, or out of the way.

    \b
    Examples:
      spinetta image pull docker://registry.example:5000/lab/aligner:1.2
      spinetta image import /srv/images/aligner.tar --name aligner:1.2 --on n2
      spinetta image list --all
      spinetta image pin aligner:1.2
    """


# --- getting one -----------------------------------------------------------------------------------------------------


@image.command()
@click.argument("reference")
@click.option("--name", default="", metavar="NAME", help="Call it so as well, e.g. tools/aligner:1.2.")
@on_option
@json_option
@waiting_client_options
def pull(reference: str, name: str, on: str, as_json: bool, node: str | None, config_file: str | None) -> None:
    """Have a node get an image; one that it has already is asked for again, as its tag may have moved.

    \b
    REFERENCE is one of:
      docker://HOST[:PORT]/REPOSITORY[:TAG|@sha256:…]   a registry
      NAME[:TAG]                                        the site's mirror (registries_conf)
      oci:/PATH, oci-archive:/PATH, docker-archive:/PATH, rootfs:/PATH, /PATH
                                                        files of the node; administrators only

    Ctrl-C ends it, unless a task waits for the same image.

    \b
    Examples:
      spinetta image pull docker://registry.example:5000/lab/aligner:1.2
      spinetta image pull --on n2 docker://registry.example:5000/lab/aligner:1.2 --name aligner:1.2
    """
    _pull(reference, name, on, as_json, node, config_file)


@image.command("import")
@click.argument("path")
@click.option("--name", default="", metavar="NAME", help="Call it so, for tasks: e.g. tools/aligner:1.2.")
@on_option
@json_option
@waiting_client_options
def import_image(path: str, name: str, on: str, as_json: bool, node: str | None, config_file: str | None) -> None:
    """Have a node make an image of files of its own.

    PATH is the node's, absolute: an OCI layout directory, an OCI or Docker archive (`docker save`), a root file system
    as a directory or a tar file (`docker export`). Which of them it is shows by what is in it; oci:, oci-archive:,
    docker-archive: or rootfs: before it says so. Tar files may be compressed with gzip, xz, zstd or bzip2.

    With --name tasks can ask for it by that name; without, by its digest.

    \b
    Examples:
      spinetta image import /srv/images/aligner.tar --name aligner:1.2
      spinetta image import rootfs:/srv/roots/debian --name debian:12 --on n2
    """
    from pathlib import Path

    from spinetta import imageref

    text = path
    if not path.startswith("/") and ":" not in path:  # typed here; on this machine it is the same
        text = str(Path(path).absolute())
    if not imageref.parse(text, "path").is_local:
        raise UserError(f"{path!r} names no files of a node", field="path", hint=f"spinetta image pull {path}")
    _pull(text, name, on, as_json, node, config_file)


def _pull(reference: str, name: str, on: str, as_json: bool, node: str | None, config_file: str | None) -> None:
    from spinetta import imageref

    imageref.parse(reference, "reference")
    if name:
        imageref.parse_name(name, "name")

    async def work(client: AsyncClient, tell: Callable[[ImageStep], None]) -> Pulled:
        return await client.images.pull(reference, name=name, node=on, tell=tell)

    found: Pulled = with_progress(reference, work, node, config_file, as_json=as_json)
    if as_json:
        output.put_json_line({"node": found.node, "image": asdict(found.image)})
        return
    _tell_of(found.image)
    output.say(f"{found.node} has {_names(found.image.names) or found.image.digest}")
    output.say(found.image.digest)


def _tell_of(image_: ImageInfo) -> None:
    if image_.left_out:
        what = "device or socket was" if image_.left_out == 1 else "devices and sockets were"
        output.tell(f"{image_.left_out} {what} left out: containers get theirs from the node")
    if image_.user_trouble:
        output.tell(f"warning: {image_.user_trouble}; tasks must name a user")


# --- what there is ---------------------------------------------------------------------------------------------------


@image.command("list")
@on_option
@click.option("--all", "everywhere", is_flag=True, help="Of all nodes.")
@json_option
@client_options
def list_images(
    on: str, everywhere: bool, as_json: bool, node: str | None, timeout: str | None, config_file: str | None
) -> None:
    """List the images of a node, or of all, the last used first.

    \b
    Examples:
      spinetta image list
      spinetta image list --all --json
    """
    if on and everywhere:
        raise UserError("--on and --all are given", field="all", hint="give one of them")

    async def work(client: AsyncClient) -> tuple[list[NodeImages], dict[str, str]]:
        if not everywhere:
            return [await client.images.list(on)], {}
        return await _everywhere(client)

    found, silent = with_client(work, node, timeout, config_file)
    if as_json:
        output.put_json(
            {
                "nodes": [
                    {"node": n.node, "images": [asdict(i) for i in n.images], "omitted": n.omitted} for n in found
                ],
                "silent": [{"node": name, "why": why} for name, why in sorted(silent.items())],
            }
        )
    elif everywhere:
        _table_of_all(found)
    else:
        _table(found[0])
    for name, why in sorted(silent.items()):
        if not as_json:
            output.tell(f"{name} did not tell: {why}")
    if silent and not found:
        raise Finished(exits.UNAVAILABLE)


async def _everywhere(client: AsyncClient) -> tuple[list[NodeImages], dict[str, str]]:
    import asyncio

    found: list[NodeImages] = []
    silent: dict[str, str] = {}
    at_once = asyncio.Semaphore(16)

    async def ask(name: str) -> None:
        async with at_once:
            try:
                found.append(await client.images.list(name))
            except SpinettaError as e:
                silent[name] = str(e)

    async with asyncio.TaskGroup() as group:
        for info in (await client.nodes()).nodes:
            group.create_task(ask(info.record.name))
    return sorted(found, key=lambda n: n.node), silent


def _table(of: NodeImages) -> None:
    from spinetta.cli.show import age
    from spinetta.units import format_bytes

    if not of.has_store:
        output.tell(f"{of.node} runs no containers, and keeps no images; see: spinetta doctor")
        return
    rows = [
        (_short(i.digest), format_bytes(i.size_bytes), age(i.used_ms), str(i.uses), _state(i), _names(i.names))
        for i in of.images
    ]
    output.table(("DIGEST", "SIZE", "LAST USED", "IN USE", "", "NAMES"), rows, right=(1, 3))
    if of.omitted:
        output.tell(f"… and {of.omitted} more, unused for longer")


def _table_of_all(of: Sequence[NodeImages]) -> None:
    """One row for each image, with the nodes that have it."""
    from spinetta.units import format_bytes

    nodes: dict[str, list[tuple[str, ImageInfo]]] = {}
    for one in of:
        for i in one.images:
            nodes.setdefault(i.digest, []).append((one.node, i))
    rows = []
    for digest, those in sorted(nodes.items(), key=lambda kv: -max(i.used_ms for _, i in kv[1])):
        names = sorted({name for _, i in those for name in i.names})
        where = ",".join(f"{node}*" if i.pinned else node for node, i in those)
        uses = sum(i.uses for _, i in those)
        rows.append((_short(digest), format_bytes(those[0][1].size_bytes), str(uses), where, _names(names)))
    output.table(("DIGEST", "SIZE", "IN USE", "NODES (* pinned)", "NAMES"), rows, right=(1, 2))


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:DIGEST_SHOWN]


def _state(i: ImageInfo) -> str:
    return "going" if i.marked else "pinned" if i.pinned else ""


def _names(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


# --- one of them -----------------------------------------------------------------------------------------------------


@image.command("rm")
@click.argument("images", metavar="IMAGE…", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Pinned ones too; those in use go as soon as nothing uses them.")
@on_option
@json_option
@client_options
def remove(
    images: tuple[str, ...],
    force: bool,
    on: str,
    as_json: bool,
    node: str | None,
    timeout: str | None,
    config_file: str | None,
) -> None:
    """Remove images from a node.

    IMAGE is a name, a digest, or the beginning of one (6 characters or more). Of an image with several names only the
    one given is removed; its digest, or --force, removes it with all of them.

    \b
    Examples:
      spinetta image rm aligner:1.1
      spinetta image rm 2411fe67e03d --on n2 --force
    """

    async def work(client: AsyncClient) -> list[dict[str, Any]]:
        out = []
        for name in images:
            found = await client.images.remove(name, force=force, node=on)
            out.append({"node": found.node, "image": name, "what": found.what, "digest": found.image.digest})
        return out

    found = with_client(work, node, timeout, config_file)
    if as_json:
        output.put_json({"images": found})
        return
    words = {
        "removed": "is removed",
        "unnamed": "is no name of it any more",
        "marked": "goes as soon as nothing uses it",
    }
    for item in found:
        output.say(f"{output.printable(item['image'])} {words.get(item['what'], item['what'])} ({item['node']})")


@image.command()
@click.argument("name", metavar="IMAGE")
@on_option
@json_option
@client_options
def pin(name: str, on: str, as_json: bool, node: str | None, timeout: str | None, config_file: str | None) -> None:
    """Keep an image on a node, whatever its limits say.

    \b
    Example:
      spinetta image pin aligner:1.2 --on n2
    """
    _pin(name, True, on, as_json, node, timeout, config_file)


@image.command()
@click.argument("name", metavar="IMAGE")
@on_option
@json_option
@client_options
def unpin(name: str, on: str, as_json: bool, node: str | None, timeout: str | None, config_file: str | None) -> None:
    """Let a pinned image go when the node's limits say so.

    \b
    Example:
      spinetta image unpin aligner:1.2
    """
    _pin(name, False, on, as_json, node, timeout, config_file)


def _pin(
    name: str, pinned: bool, on: str, as_json: bool, node: str | None, timeout: str | None, config_file: str | None
) -> None:
    async def work(client: AsyncClient) -> Pulled:
        return await client.images.pin(name, pinned, node=on)

    found = with_client(work, node, timeout, config_file)
    words = f"{output.printable(name)} is {'pinned' if pinned else 'not pinned any more'} ({found.node})"
    done(words, {"node": found.node, "image": asdict(found.image)}, as_json=as_json)


@image.command()
@click.argument("name", metavar="IMAGE")
@on_option
@json_option
@waiting_client_options
def verify(name: str, on: str, as_json: bool, node: str | None, config_file: str | None) -> None:
    """Compare an image's files on a node with the list made when it was unpacked.

    The exit code is 1 when they differ: then remove it and get it again.

    \b
    Example:
      spinetta image verify aligner:1.2
    """

    async def work(client: AsyncClient, tell: Callable[[ImageStep], None]) -> Verified:
        return await client.images.verify(name, node=on, tell=tell)

    found: Verified = with_progress(name, work, node, config_file, as_json=as_json)
    if as_json:
        output.put_json_line({"node": found.node, "digest": found.image.digest, "differences": list(found.differences)})
    elif not found.differences:
        output.say(f"{output.printable(name)} is as it was unpacked: {found.image.files} files ({found.node})")
    else:
        for line in found.differences:
            output.say(output.printable(line))
        output.tell(f"{name} is not what it was; remove it and get it again: spinetta image rm --force {name}")
    if found.differences:
        raise Finished(exits.TASK_FAILED)
