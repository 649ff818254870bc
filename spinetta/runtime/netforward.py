"""What a machine forwarded before its nodes had it forward for containers; and that it does so again afterwards.

To turn `net.ipv4.ip_forward` on or off sets `forwarding` of each interface as well, and `accept_redirects` of all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from spinetta import network
from spinetta.runtime.netcommands import Commands

FORWARD = "/proc/sys/net/ipv4/ip_forward"
_SETTINGS = "/proc/sys/net/ipv4/conf"
_READ = f"cd {_SETTINGS} && grep -H . ./*/forwarding ./all/accept_redirects"
_WRITE = f'cd {_SETTINGS} && while read -r name value; do test ! -e "$name" || echo "$value" > "$name"; done'


@dataclass(frozen=True, slots=True)
class Before:
    """Of a machine that forwarded nothing, or only what came in by some interfaces.

    Attributes:
        there: its interfaces.
        forwarding: those by which it came in, and ``default``, which stands for new ones.
        redirects: whether routers may tell it of others (`accept_redirects` of ``all``).
    """

    there: tuple[str, ...]
    forwarding: tuple[str, ...]
    redirects: bool

    @property
    def shut(self) -> tuple[str, ...]:
        """Interfaces of which nothing was forwarded."""
        return tuple(sorted(set(self.there) - set(self.forwarding)))


async def seen(commands: Commands, there: Iterable[str]) -> Before:
    """As it is now. CommandFailed: it cannot be read."""
    told = (await commands.well(("/bin/sh", "-c", _READ))).decode(errors="replace")
    on = {name for line in told.splitlines() for name, _, value in [line.rpartition(":")] if value.strip() == "1"}
    forwarding = (path.split("/")[1] for path in on if path.endswith("/forwarding"))
    return Before(
        tuple(network.uplinks(there)),
        tuple(network.uplinks(name for name in forwarding if name != "all")),
        "./all/accept_redirects" in on,
    )


async def turn_on(commands: Commands) -> None:
    """Have it forward. CommandFailed: it refuses."""
    await commands.well(("/bin/sh", "-c", f"echo 1 > {FORWARD}"))


async def turn_off(commands: Commands, before: Before) -> None:
    """As it was before. CommandFailed: it refuses."""
    lines = [
        f"./all/accept_redirects {int(before.redirects)}",
        *(f"./{name}/forwarding 1" for name in before.forwarding),
    ]
    data = "".join(f"{line}\n" for line in lines).encode()
    await commands.well(("/bin/sh", "-c", f"echo 0 > {FORWARD} && {_WRITE}"), data=data)


def write(path: Path, before: Before) -> None:
    """Keep it. OSError: there is no room."""
    replace(path, json.dumps(asdict(before)))


def read(path: Path) -> Before | None:
    """What was kept; None: the machine forwarded anyway."""
    try:
        told = json.loads(path.read_text())
        return Before(_names(told["there"]), _names(told["forwarding"]), told["redirects"] is True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def replace(path: Path, text: str) -> None:
    """Write a file that is there as a whole or as it was. OSError: there is no room."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    new.replace(path)


def _names(told: Sequence[object]) -> tuple[str, ...]:
    return tuple(network.uplinks(map(str, told)))
