"""What all commands share: options, settings, the client, and how errors are shown."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

from spinetta.cli import exits, output
from spinetta.errors import OutcomeUnknown, SpinettaError, StoreUnavailable, UserError

if TYPE_CHECKING:
    from spinetta.client.aio import AsyncClient
    from spinetta.config import ClientSettings, FileTable, ResolvedClient

P = ParamSpec("P")
T = TypeVar("T")

ETC_FILE = Path("/etc/spinetta/spinetta.toml")


class Finished(Exception):
    """Ends the program with a code, after everything has been said."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def json_option(command: Callable[P, T]) -> Callable[P, T]:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, errors too.")(command)


def config_option(command: Callable[P, T]) -> Callable[P, T]:
    """``--config``."""
    return click.option(
        "--config",
        "config_file",
        metavar="FILE",
        envvar="SPINETTA_CONFIG",
        help="Settings file to read instead of the usual ones.",
    )(command)


def client_options(command: Callable[P, T]) -> Callable[P, T]:
    """``--node``, ``--timeout``, ``--config``: which cluster to talk to, and as whom.

    ``--credentials`` and ``--bearer-file`` are kept in click's context until `with_client` asks for them.
    """
    timeout = click.option("--timeout", metavar="TIME", help="How long one call may take (SPINETTA_TIMEOUT; 20s).")
    return _node_option(timeout(_identity_options(command)))


def waiting_client_options(command: Callable[P, T]) -> Callable[P, T]:
    """The same for a command with a ``--timeout`` of its own, or none."""
    return _node_option(_identity_options(command))


def _identity_options(command: Callable[P, T]) -> Callable[P, T]:
    command = config_option(command)
    for key, metavar, text in (
        ("bearer_file", "FILE", "OIDC bearer token to use instead of a certificate (SPINETTA_BEARER_FILE)."),
        ("credentials", "FILE|none", "From `spinetta login` (SPINETTA_CREDENTIALS); none: plain text."),
    ):
        command = click.option(
            "--" + key.replace("_", "-"), key, metavar=metavar, expose_value=False, callback=_keep, help=text
        )(command)
    return command


def _node_option(command: Callable[P, T]) -> Callable[P, T]:
    return click.option(
        "--node",
        metavar="HOST:PORT,…",
        help="Nodes to talk to, tried in order (SPINETTA_NODE; 127.0.0.1:7220). Any node of the cluster will do.",
    )(command)


def _keep(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value:
        # What is typed is meant from here; files and variables are read anywhere.
        ctx.meta[f"spinetta.{param.name}"] = value if value == "none" else os.path.abspath(value)  # noqa: PTH100


def config_files(chosen: str | None) -> list[FileTable]:
    """The settings files that there are, the strongest first.

    Raises:
        UserError: a file is not TOML or cannot be read, or the chosen one does not exist.
    """
    if chosen:
        paths = [Path(chosen)]
    else:
        home = Path(os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser())
        paths = [home / "spinetta" / "spinetta.toml", ETC_FILE]
    found = (_read_toml(path, must_exist=bool(chosen)) for path in paths)
    return [table for table in found if table is not None]


def _read_toml(path: Path, *, must_exist: bool) -> FileTable | None:
    import tomllib

    from spinetta.config import FileTable

    try:
        text = path.read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError):
        if must_exist:
            raise UserError(f"there is no settings file {path}", field="config", hint="check --config") from None
        return None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8", field="config", hint="save it as UTF-8") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}", field="config", hint="check its permissions") from e
    try:
        return FileTable(str(path), tomllib.loads(text))
    except tomllib.TOMLDecodeError as e:
        raise UserError(f"{path} is not TOML: {e}", field="config", hint="mend that line") from e


FIRST_CONTACT_S = 2.0  # a person has typed a wrong address; who wants more patience says so with --timeout


def _resolved_client(node: str | None, timeout: str | None, config_file: str | None) -> ResolvedClient:
    """The client's settings: of the credentials, when none are named the usual file, and of its nodes likewise."""
    from dataclasses import replace

    from spinetta.config import resolve_client

    flags: dict[str, str | None] = {"node": node, "timeout": timeout}
    context = click.get_current_context(silent=True)
    if context is not None:
        flags |= {key: context.meta.get(f"spinetta.{key}") for key in ("credentials", "bearer_file")}
    resolved = resolve_client(flags, os.environ, config_files(config_file))
    settings = resolved.settings
    if not settings.credentials:
        usual = usual_credentials()
        if usual is None:
            return resolved
        settings = replace(settings, credentials=str(usual))
    if settings.credentials != "none" and resolved.origins["nodes"].kind == "default":
        from spinetta.client.credentials import load

        settings = replace(settings, nodes=load(Path(settings.credentials)).nodes or settings.nodes)
    return replace(resolved, settings=settings)


def is_somebody(node: str | None, timeout: str | None, config_file: str | None) -> bool:
    """Whether we have an identity of the cluster's, so that the cluster knows better than we who is asking."""
    return credentials_file(node, timeout, config_file) is not None


def credentials_file(node: str | None, timeout: str | None, config_file: str | None) -> Path | None:
    """Where our identity is kept; None: we have none."""
    path = _resolved_client(node, timeout, config_file).settings.credentials
    return Path(path) if path not in ("", "none") else None


def usual_credentials() -> Path | None:
    """``~/.config/spinetta/credentials.pem``, if it is there."""
    from spinetta.client.credentials import default_path

    path = default_path()
    return path if path.exists() else None


def with_client(
    work: Callable[[AsyncClient], Coroutine[Any, Any, T]],
    node: str | None,
    timeout: str | None,
    config_file: str | None,
) -> T:
    """Run a coroutine with a client, on an event loop of its own."""
    import asyncio

    from spinetta.client.aio import AsyncClient

    resolved = _resolved_client(node, timeout, config_file)
    patience_s = FIRST_CONTACT_S if resolved.origins["timeout_s"].kind == "default" else None

    async def run() -> T:
        async with AsyncClient.from_settings(resolved.settings, first_contact_s=patience_s) as client:
            found = await work(client)
            await _renewed(client, resolved.settings)
            return found

    return asyncio.run(run())


async def _renewed(client: AsyncClient, settings: ClientSettings) -> None:
    """Renew the certificate when it is time; a command that has done its work never fails because of that."""
    import time

    if settings.credentials in ("", "none"):
        return
    from spinetta.client.login import renew

    try:
        warning = await renew(client, Path(settings.credentials), time.time())
    except (SpinettaError, OSError):  # e.g. its directory is not ours to write to
        return
    if warning:
        output.tell(f"warning: {warning}")


def default_data_dir() -> str:
    """Where a node keeps things when nothing is said."""
    if os.geteuid() == 0:
        return "/var/lib/spinetta"
    state = os.environ.get("XDG_STATE_HOME") or str(Path("~/.local/state").expanduser())
    return str(Path(state) / "spinetta")


def show_error(error: SpinettaError, *, as_json: bool, code: int, asks: bool = True) -> None:
    """Say what went wrong: a line for people on standard error, a document for programs on standard output.

    `asks`: whether the command asks nodes, which one may name.
    """
    if as_json:
        detail: dict[str, object] = {"message": str(error), "reason": exits.word_of(error), "exit_code": code}
        if isinstance(error, UserError):
            detail = {
                "message": error.message,
                "reason": error.reason,
                "field": error.field,
                "hint": error.hint,
                "exit_code": code,
            }
        elif isinstance(error, StoreUnavailable | OutcomeUnknown):
            detail["hint"] = error.hint
        output.put_json({"error": detail})
        return
    sys.stdout.flush()
    prefix = output.paint("error:", "red", on=output.in_colour(sys.stderr))
    field = f"{error.field}: " if isinstance(error, UserError) and _says_more(error) else ""
    hint = f" ({error.hint})" if isinstance(error, StoreUnavailable | OutcomeUnknown) and error.hint else ""
    output.tell(f"{prefix} {field}{error}{hint}")
    if asks and isinstance(error, StoreUnavailable) and not hint and "SPINETTA_NODE" not in os.environ:
        from spinetta.config import DEFAULT_ADDRESS

        hint = "Is a node running here? Name others with --node HOST:PORT or SPINETTA_NODE"
        is_usual = DEFAULT_ADDRESS in str(error) and usual_credentials() is None  # nothing at all was said
        output.tell(f"{hint}; for a cluster elsewhere: spinetta login." if is_usual else f"{hint}.")


_UNSAID = ("yes", "wall_ms", "remove", "labels")  # what a request calls it, and nobody has typed


def _says_more(error: UserError) -> bool:
    """Whether the field is worth showing: not when the message names it, or begins with an origin."""
    if error.field in _UNSAID:
        return False
    last = error.field.rpartition(".")[2].partition("[")[0].replace("_", "-")
    return (
        bool(error.field)
        and not error.message.startswith(("-", "/", "SPINETTA_"))
        and ("[" in error.field or last not in error.message.replace("_", "-"))
    )
