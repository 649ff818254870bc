"""Programs that a node starts: are they there, do they run, are their versions good?"""

from __future__ import annotations

import os
import platform
import re
import sys

from spinetta.checkup import Finding, Level, ok
from spinetta.config import Settings
from spinetta.container import CONTAINER
from spinetta.errors import UserError
from spinetta.runtime.detect import find_program, program_output
from spinetta.store.process import check_version, etcd_version, find_etcd, parse_version

PYTHON_LEAST = (3, 11)
NO_MEMBER = "this machine can run no etcd member: it can begin no cluster and hold no seat"


async def python() -> list[Finding]:
    """The interpreter, which shim and trials use as well."""
    seen = f"Python {platform.python_version()} ({sys.executable})"
    if sys.version_info < PYTHON_LEAST:
        return [Finding("python", Level.PROBLEM, seen, "Spinetta does not run on it", "apt install python3 (3.11)")]
    if not sys.executable or not os.access(sys.executable, os.X_OK):
        return [
            Finding(
                "python", Level.PROBLEM, f"{seen}: that is not to be run", "the shim cannot be started",
                "make the virtual environment anew: scripts/setup.sh",
            )
        ]  # fmt: skip
    return [ok("python", seen)]


async def etcd(settings: Settings) -> list[Finding]:
    """By the rules that a node itself starts etcd by."""
    level = Level.PROBLEM if settings.candidate else Level.NOTE
    weakens = NO_MEMBER if settings.candidate else "nothing: this node is no candidate for a seat"
    try:
        program = find_etcd(settings.etcd_program)
        text = await etcd_version(program)
        version = ".".join(map(str, parse_version(text)))
        warnings = check_version(text)
    except UserError as e:
        return [Finding("etcd", level, e.message, weakens, e.hint)]
    if not warnings:
        return [ok("etcd", f"etcd {version} ({program})")]
    return [
        Finding(
            "etcd", Level.WARNING if settings.candidate else Level.NOTE, f"etcd {version} ({program})", warning,
            "install a newer one and name it: spinetta node join --etcd-program /opt/etcd/etcd",
        )
        for warning in warnings
    ]  # fmt: skip


_VERSION = re.compile(r"\d+\.\d+(?:\.\d+)?")
_IMAGES = {
    "skopeo": "images of registries (docker://…), archives and layouts are not brought in",
    "umoci": "no image but root file systems is unpacked",
}


async def images(settings: Settings) -> list[Finding]:
    """What brings images in and unpacks them."""
    found = []
    for name, weakens in _IMAGES.items():
        level = Level.WARNING if CONTAINER in settings.runtimes else Level.NOTE
        path = find_program(name)
        if not path:
            found.append(Finding("images", level, f"there is no {name}", weakens, f"apt install {name}"))
            continue
        said = await program_output([path, "--version"])
        version = None if isinstance(said, OSError) else _VERSION.search(said)
        if version is not None:
            found.append(ok("images", f"{name} {version[0]} ({path})"))
            continue
        why = said.strerror if isinstance(said, OSError) else f"--version printed {said.strip()[:60]!r}"
        mend = f"apt install --reinstall {name}"
        found.append(Finding("images", level, f"{path} does not run: {why}", weakens, mend))
    return found
