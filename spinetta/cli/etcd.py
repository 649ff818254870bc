"""``spinetta decode`` and ``spinetta etcdctl``: looking below the surface."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spinetta.cli import output
from spinetta.cli.base import P, T, client_options, json_option, with_client
from spinetta.errors import CorruptRecord, NotFound, StoreUnavailable, UserError

if TYPE_CHECKING:
    from spinetta.client.aio import AsyncClient
    from spinetta.client.views import ClusterInfo

INPUT_BYTES_MAX = 64 << 20  # of `decode`; a value has at most 1.5 MiB
ETCDCTL_LIMIT_S = 15.0
# etcdctl's variables, its flags, and the files of a voter.
CREDENTIALS = (
    ("ETCDCTL_CACERT", "--cacert", "etcd-ca.pem"),
    ("ETCDCTL_CERT", "--cert", "etcd.pem"),
    ("ETCDCTL_KEY", "--key", "etcd.key"),
)


def data_dir_option(command: Callable[P, T]) -> Callable[P, T]:
    """``--data-dir``."""
    return click.option(
        "--data-dir", metavar="PATH", help="Of this machine's node, where etcd's certificate is [SPINETTA_DATA_DIR]."
    )(command)


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@data_dir_option
@client_options
def etcdctl(
    arguments: tuple[str, ...], data_dir: str | None, node: str | None, timeout: str | None, config_file: str | None
) -> None:
    """Run etcdctl against the cluster's etcd, with all voters as endpoints.

    Options of ours (--node, …) stand before etcdctl's. Reading is safe; writing behind the cluster's back is not.
    In a cluster with certificates it works on voters only, for their administrator: etcd knows voters and nobody else.

    \b
    Examples:
      spinetta etcdctl get --prefix /status/queued/ --keys-only
      spinetta etcdctl get --prefix /node/ -w json | spinetta decode
      spinetta etcdctl member list -w table
      spinetta etcdctl endpoint status -w table
    """
    program = _program()
    if any(a.startswith("--endpoints") for a in arguments):  # etcdctl refuses to be told twice
        environment = {**os.environ, "ETCDCTL_API": "3"}
    else:
        environment = _environment(node, timeout, config_file)
    urls = [environment.get("ETCDCTL_ENDPOINTS", ""), *arguments]
    environment |= _credentials(urls, data_dir, config_file, arguments)
    sys.stdout.flush()
    os.execve(program, ["etcdctl", *arguments], environment)  # noqa: S606 - becomes etcdctl: same streams, same exit code


def _program() -> str:
    found = shutil.which("etcdctl")
    if found is None:
        raise UserError("etcdctl is not installed", field="etcdctl", hint="on Debian: apt install etcd-client")
    return found


def _environment(node: str | None, timeout: str | None, config_file: str | None) -> dict[str, str]:
    async def work(client: AsyncClient) -> ClusterInfo:
        return await client.cluster()

    cluster = with_client(work, node, timeout, config_file)
    urls = [v.client_url for v in cluster.voters if v.client_url and not v.learner]
    if not urls:
        raise StoreUnavailable(f"node {cluster.node} names no voter with a client address")
    return {**os.environ, "ETCDCTL_API": "3", "ETCDCTL_ENDPOINTS": ",".join(urls)}


def _credentials(
    urls: Sequence[str], data_dir: str | None, config_file: str | None, arguments: Sequence[str] = ()
) -> dict[str, str]:
    """The variables that name this voter's etcd certificate, its key and its CAs; none for plain text.

    Raises:
        UserError: they are needed, and this user on this machine does not have them.
    """
    if not any("https://" in url for url in urls):
        return {}
    from spinetta.cli.node import resolved_node
    from spinetta.trust.generations import CURRENT

    trust = Path(resolved_node({"data_dir": data_dir}, config_file).settings.data_dir) / "trust" / CURRENT
    found = {}
    for variable, flag, name in CREDENTIALS:
        if variable in os.environ or any(a == flag or a.startswith(f"{flag}=") for a in arguments):
            continue  # told otherwise
        path = trust / name
        try:
            path.open("rb").close()
        except OSError as e:
            raise UserError(
                f"the cluster's etcd asks for a voter's certificate, and {path} cannot be read: {e.strerror}",
                hint="run this on a voter, as root or the user of its node; --data-dir says where that keeps its data",
                field="data_dir",
                reason="no-etcd-certificate",
            ) from None
        found[variable] = str(path)
    return found


@click.command()
@click.argument("key", required=False)
@click.option("--type", "type_", metavar="TYPE", help="task, node, running, user-acl, policy, …")
@json_option
@data_dir_option
@client_options
def decode(
    key: str | None,
    type_: str | None,
    as_json: bool,  # noqa: ARG001 - it is JSON anyway; errors look at the command line
    data_dir: str | None,
    node: str | None,
    timeout: str | None,
    config_file: str | None,
) -> None:
    """Print a stored record as JSON: the value of KEY, or what is read from standard input.

    Standard input may be one value as etcdctl prints it (--type tells what it is), a key and its value on two lines,
    or etcdctl's -w json with any number of keys, of which each becomes a line.

    \b
    Examples:
      spinetta decode /task/0190b6d3-…
      spinetta etcdctl get /node/n1 | spinetta decode
      spinetta etcdctl get --prefix /task/ -w json | spinetta decode
      spinetta etcdctl get /task/ID --print-value-only | spinetta decode --type task
    """
    from spinetta.cli.plain import TYPES

    if type_ is not None and type_ not in TYPES:
        raise UserError(f"there is no type {type_!r}", field="type", hint=", ".join(TYPES))
    if key is not None:
        environment = _environment(node, timeout, config_file)
        value = _fetch(key, environment | _credentials([environment["ETCDCTL_ENDPOINTS"]], data_dir, config_file))
        output.put_json(_decoded(type_ or key, value))
        return
    data = sys.stdin.buffer.read(INPUT_BYTES_MAX + 1)
    if len(data) > INPUT_BYTES_MAX:
        raise UserError("the input is larger than 64 MiB", field="input", hint="decode fewer keys at once")
    pairs = _etcdctl_json(data)
    if pairs is not None:
        for found_key, value in pairs:
            output.put_json_line({"key": found_key, "value": _decoded(type_ or found_key, value)})
        return
    first, newline, rest = data.partition(b"\n")
    if type_ is None and first.startswith(b"/") and newline:
        output.put_json(_decoded(first.decode(errors="replace"), rest))
        return
    if type_ is None:
        raise UserError(
            "the input does not begin with a key, so what it is cannot be told",
            field="type",
            hint=f"--type {', '.join(TYPES)}",
        )
    output.put_json(_decoded(type_, data))


def _decoded(key_or_type: str, value: bytes) -> dict[str, Any]:
    from spinetta.cli.plain import to_dict

    if not value.strip(b"\n"):
        return {}
    try:
        return to_dict(key_or_type, value)
    except CorruptRecord:
        # etcdctl ends a value with a newline. As the beginning of a field it is incomplete, so that a value with one
        # too many never reads as another value.
        if not value.endswith(b"\n"):
            raise
        return to_dict(key_or_type, value[:-1])


def _etcdctl_json(data: bytes) -> list[tuple[str, bytes]] | None:
    """Keys and values of etcdctl's -w json; None when it is not that."""
    if not data.startswith(b"{"):
        return None
    try:
        found = json.loads(data)
        return [
            (base64.b64decode(kv["key"]).decode(), base64.b64decode(kv.get("value", ""))) for kv in found.get("kvs", [])
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _fetch(key: str, environment: dict[str, str]) -> bytes:
    program = _program()
    try:
        done = subprocess.run(
            [program, "get", "-w", "json", "--", key],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=ETCDCTL_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise StoreUnavailable(f"etcd did not answer within {ETCDCTL_LIMIT_S:g} s") from None
    if done.returncode != 0:
        raise StoreUnavailable(f"etcd did not answer: {done.stderr.decode(errors='replace').strip()[:500]}")
    pairs = _etcdctl_json(done.stdout)
    if not pairs:
        raise NotFound(f"there is no key {key!r}", field="key", hint="see: spinetta etcdctl get --prefix / --keys-only")
    return pairs[0][1]
