"""What is written down of an attempt's network: before it is made, so that whatever there is of it can be removed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spinetta import cni


def intend(folder: Path, config: dict[str, object]) -> None:
    """Write down what is about to be made. OSError: there is no room, or it is there."""
    folder.mkdir(mode=0o711)
    (folder / "network.json").write_text(json.dumps(config))


def make_places(netns: Path, sysfs: Path) -> None:
    """What a namespace and its /sys are mounted on. OSError: there is no room."""
    netns.touch(mode=0o444)
    sysfs.mkdir(mode=0o755)


def write_names(folder: Path, hosts: str, resolv: str) -> None:
    """Files for /etc. OSError: there is no room."""
    for name, text in (("hosts", hosts), ("resolv.conf", resolv)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o644)


def recorded(folder: Path) -> tuple[dict[str, object] | None, dict[str, Any] | None]:
    """The configuration that an attempt's network was made with, and the result if there is one."""
    found: list[dict[str, Any] | None] = []
    for name in ("network.json", "result.json"):
        try:
            told = json.loads((folder / name).read_text())
        except (OSError, ValueError):
            told = None
        found.append(told if isinstance(told, dict) else None)
    return found[0], found[1]


def cable(folder: Path) -> str:
    """The machine's end of an attempt's cable; empty: it has none."""
    result = recorded(folder)[1]
    try:
        return "" if result is None else cni.attached(result).host_interface
    except cni.PluginError:
        return ""
