"""The root command: a table of commands, each imported when it is called, and the end of every run."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Sequence

import click

from spinetta.cli import exits, output
from spinetta.cli.base import Finished, show_error
from spinetta.errors import SpinettaError

# name → (module, function, one line of help). The line stands here, too, so that --help imports no command.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "submit": ("submit", "submit", "Submit one task, or many from a file."),
    "status": ("tasks", "status", "Show tasks in full, or the cluster's state."),
    "list": ("tasks", "list_tasks", "List tasks."),
    "log": ("log", "log", "Print what a task writes."),
    "exec": ("execute", "exec_", "Run a command beside a running task."),
    "cp": ("copy", "copy", "Copy a task's files from its node."),
    "cancel": ("tasks", "cancel", "Cancel tasks."),
    "wait": ("tasks", "wait", "Wait until tasks have ended."),
    "top": ("top", "top", "Watch nodes and tasks live."),
    "node": ("node", "node", "Run, list, drain and stop nodes."),
    "image": ("image", "image", "Get, list, pin and remove images of containers."),
    "login": ("login", "login", "Get a certificate of a secured cluster."),
    "logout": ("login", "logout", "Remove it from this machine."),
    "whoami": ("login", "whoami", "Show who the cluster takes you for."),
    "secret": ("secret", "secret", "Keep passwords and keys for tasks."),
    "token": ("token", "token", "Make and revoke join tokens."),
    "user": ("user", "user", "Add people, and say what they may do."),
    "group": ("trust", "group", "Limit what groups of nodes are cleared for."),
    "policy": ("trust", "policy", "Approval, lifetimes, limits, OIDC issuers."),
    "cluster": ("cluster", "cluster", "Back up, restore, recover; certificate authorities."),
    "audit": ("audit", "audit", "Read and check a node's audit log."),
    "doctor": ("doctor", "doctor", "Check this machine: what it lacks for a node."),
    "config": ("configure", "config", "Show settings and where they come from."),
    "decode": ("etcd", "decode", "Print a stored record as JSON."),
    "etcdctl": ("etcd", "etcdctl", "Run etcdctl against the cluster's etcd."),
    "completion": ("misc", "completion", "Print a script for shell completion."),
    "version": ("misc", "version", "Print the version."),
    "shim": ("misc", "shim", "Start a node's shim by hand."),
}


class Root(click.Group):
    """Imports a command's module when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """In the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        """Import it."""
        found = COMMANDS.get(cmd_name)
        if found is None:
            return None
        command: click.Command = getattr(importlib.import_module(f"spinetta.cli.{found[0]}"), found[1])
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As usual, but an unknown command names a near one."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as e:
            from spinetta.names import did_you_mean, quoted

            raise click.UsageError(
                f"there is no command {quoted(args[0])}; {did_you_mean(args[0], COMMANDS)}", ctx
            ) from e

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's signature
        """The table itself."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"]}, epilog=exits.HELP)
@click.version_option(package_name="spinetta", message="spinetta %(version)s")
def root() -> None:
    """A cluster without a head node: submit tasks at any node, any node may run them.

    \b
    Examples:
      spinetta node join                          start a cluster on this machine
      spinetta submit --follow -- echo hello      run something and watch it
      spinetta submit --cpus 4 --memory 8GiB --time 2h -- bowtie2 …
      spinetta list --state running
      spinetta log -f ID
    """


def run(arguments: Sequence[str]) -> int:
    """Run a command line; the exit code. Never a traceback for a user's mistake."""
    as_json = "--json" in _options(arguments)
    try:
        _call(arguments)
        code = exits.OK
    except Finished as e:
        code = e.code
    except SpinettaError as e:
        code = _ours(exits.code_of(e), arguments)
        with contextlib.suppress(BrokenPipeError):
            show_error(e, as_json=as_json, code=code, asks=list(arguments[:2]) != ["node", "join"])
    except click.exceptions.NoArgsIsHelpError as e:
        output.tell(e.ctx.get_help() if e.ctx else e.format_message())
        code = exits.USAGE
    except click.UsageError as e:
        code = _ours(exits.USAGE, arguments)
        _show_usage_error(e, as_json=as_json, code=code)
    except (click.Abort, KeyboardInterrupt):
        output.tell("")
        code = exits.INTERRUPTED
    except click.exceptions.Exit as e:
        code = e.exit_code
    except BrokenPipeError:
        return _broken_pipe()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _broken_pipe()
    return code


def _call(arguments: Sequence[str]) -> None:
    """Call the command; of several errors at once raise the first of ours, which is what a user can act upon."""
    out = sys.stdout
    try:
        root.main(list(arguments), prog_name="spinetta", standalone_mode=False)
    except SystemExit as e:
        if sys.stdout is not out:  # click's answer to a broken pipe; its exit code 1 would be that of a failed task
            sys.stdout = out
            raise BrokenPipeError from e
        raise
    except BaseExceptionGroup as group:
        ours, others = group.split((SpinettaError, KeyboardInterrupt, BrokenPipeError, Finished))
        if ours is None or others is not None:
            raise  # there is a bug among them
        first: BaseException = ours
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from group


def _broken_pipe() -> int:
    """Whoever read our output (``| head``) has had enough: end quietly, as other programs do."""
    # The interpreter flushes standard output at its end and would complain again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return exits.SIGNAL_BASE + signal.SIGPIPE


def _options(arguments: Sequence[str]) -> Sequence[str]:
    """What stands before ``--``: behind it is the task's own command."""
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def _ours(code: int, arguments: Sequence[str]) -> int:
    """The code, or 125 where a task's own code was to be expected."""
    given = list(_options(arguments))
    if given[:1] == ["exec"]:
        return exits.OURS
    if given[:1] == ["submit"] and any(o in ("--wait", "--follow", "-w", "-f") for o in given):
        return exits.OURS
    return code


def _show_usage_error(error: click.UsageError, *, as_json: bool, code: int) -> None:
    if as_json:
        detail = {"message": error.format_message(), "reason": "usage", "field": "", "hint": "see --help"}
        output.put_json({"error": {**detail, "exit_code": code}})
        return
    path = error.ctx.command_path if error.ctx else "spinetta"
    prefix = output.paint("error:", "red", on=output.in_colour(sys.stderr))
    output.tell(f"{prefix} {error.format_message()}\nSee: {path} --help")
