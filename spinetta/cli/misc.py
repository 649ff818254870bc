"""``spinetta completion``, ``version`` and ``shim``."""

from __future__ import annotations

import platform
from pathlib import Path

import click

from spinetta import __version__
from spinetta.cli import output
from spinetta.cli.base import config_option, json_option
from spinetta.errors import UserError


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that completes commands and options in a shell.

    \b
    Examples:
      spinetta completion bash > /etc/bash_completion.d/spinetta
      spinetta completion zsh > "${fpath[1]}/_spinetta"
      spinetta completion fish > ~/.config/fish/completions/spinetta.fish
    """
    from click.shell_completion import get_completion_class

    from spinetta.cli.app import root

    found = get_completion_class(shell)
    if found is None:
        raise UserError(f"there is no completion for {shell}", field="shell", hint="bash, zsh or fish")
    # Not source(): that of bash runs a bash to ask for its version, which is not there on every machine.
    made = found(root, {}, "spinetta", "_SPINETTA_COMPLETE")
    output.say(made.source_template % made.source_vars())


@click.command()
@json_option
def version(as_json: bool) -> None:
    """Print the version of this program."""
    if as_json:
        output.put_json({"version": __version__, "api": "spinetta.v1", "python": platform.python_version()})
    else:
        output.say(f"spinetta {__version__} (API spinetta.v1, Python {platform.python_version()})")


@click.command()
@click.option("--data-dir", metavar="PATH", help="Of the node [SPINETTA_DATA_DIR].")
@click.option("--name", metavar="NAME", help="Of the node [SPINETTA_NAME].")
@click.option("--kill-margin", metavar="TIME", help="How long killing may take [SPINETTA_KILL_MARGIN].")
@click.option("--no-isolate", is_flag=True, help="Do without a PID namespace of its own.")
@config_option
def shim(
    data_dir: str | None, name: str | None, kill_margin: str | None, no_isolate: bool, config_file: str | None
) -> None:
    """Start the shim of a node by hand; `spinetta node join` does so by itself.

    The shim is the parent of all tasks of a node and of its etcd. It goes on in the background and outlives daemons;
    `spinetta node stop` ends it. Starting it by hand helps to find out why it does not start.

    \b
    Example:
      spinetta shim --data-dir /tmp/n1 --name n1
    """
    import asyncio

    from spinetta.cli.node import resolved_node
    from spinetta.runtime.launch import launch

    settings = resolved_node({"data_dir": data_dir, "name": name, "kill_margin": kill_margin}, config_file).settings
    state = Path(settings.data_dir) / "shim"
    started = asyncio.run(
        launch(state, node=settings.name, kill_margin_s=settings.kill_margin_s, isolate=not no_isolate)
    )
    output.say(f"the shim of {state} {'has been started' if started else 'was running already'}")
