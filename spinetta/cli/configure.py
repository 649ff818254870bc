"""``spinetta config``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from spinetta.cli import output
from spinetta.cli.base import ETC_FILE, config_files, config_option, json_option
from spinetta.cli.node import resolved_node, setting_options

if TYPE_CHECKING:
    from spinetta.config import Origin
    from spinetta.options import Option

HIDDEN = "(hidden)"


@click.group()
def config() -> None:
    """Show settings and where they come from."""


@config.command()
@setting_options
@json_option
@config_option
def show(as_json: bool, config_file: str | None, **flags: str | None) -> None:
    """Show each setting with its value and where it comes from.

    Flags come first, then SPINETTA_* variables, then files: --config (or SPINETTA_CONFIG), else
    ~/.config/spinetta/spinetta.toml and /etc/spinetta/spinetta.toml; then the defaults. In a file, settings of
    `spinetta node join` stand under [node], those of all other commands under [client].

    \b
    Example of a file:
      [node]
      address = "127.0.0.1:7220"
      memory = "32GiB"
      tags = ["ssd", "site-a"]
      countables = { gpu = 2 }
      [client]
      node = ["127.0.0.1:7220", "127.0.0.2:7220"]
    """
    from spinetta.config import resolve_client
    from spinetta.options import CLIENT_OPTIONS, NODE_OPTIONS

    node = resolved_node(flags, config_file)
    files = config_files(config_file)
    client = resolve_client({}, os.environ, files)
    if as_json:
        output.put_json(
            {
                "node": _documents(NODE_OPTIONS, node.settings, node.origins),
                "client": _documents(CLIENT_OPTIONS, client.settings, client.origins),
                "files": [f.path for f in files],
                "warnings": list(node.warnings),
            }
        )
        return
    rows = [("node", *row) for row in _rows(NODE_OPTIONS, node.settings, node.origins)]
    rows += [("client", *row) for row in _rows(CLIENT_OPTIONS, client.settings, client.origins)]
    output.table(("FOR", "SETTING", "VALUE", "FROM"), rows)
    if not files:
        output.tell(f"no settings file was found; one could be {ETC_FILE}")
    for warning in node.warnings:
        output.tell(f"warning: {warning}")


def _documents(options: Sequence[Option], settings: object, origins: Mapping[str, Origin]) -> dict[str, Any]:
    found = {}
    for option in options:
        value = getattr(settings, option.attribute)
        if option.secret and value:
            value = HIDDEN
        origin = origins[option.attribute]
        found[option.attribute] = {
            "value": dict(value) if option.key in ("countables", "devices") else value,
            "origin": origin.kind,
            "from": origin.where,
        }
    return found


def _rows(options: Sequence[Option], settings: object, origins: Mapping[str, Origin]) -> list[tuple[str, str, str]]:
    return [
        (option.key, _text(option, getattr(settings, option.attribute)), str(origins[option.attribute]))
        for option in options
    ]


def _text(option: Option, value: Any) -> str:
    """A value as one could write it in a file or a flag."""
    from spinetta import units

    if option.secret and value:
        return HIDDEN
    if option.attribute == "cpu_millis":
        return units.format_cpus(value) if value else "0 (detected)"
    if option.attribute in ("memory_bytes", "disk_bytes"):
        return units.format_bytes_exact(value) if value else "0 (detected)"
    if option.attribute.endswith("_bytes"):
        return units.format_bytes_exact(value)
    if option.attribute.endswith("_s"):
        return units.format_duration_exact(value)
    if option.key == "countables":
        return ",".join(f"{name}={n}" for name, n in value)
    if option.key == "devices":
        return ",".join(f"{name}={','.join(paths)}" for name, paths in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value)
