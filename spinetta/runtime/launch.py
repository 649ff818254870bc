"""Starting a shim, and reaching one that runs."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

from spinetta import __version__
from spinetta.errors import RuntimeUnavailable
from spinetta.runtime.shim.wire import SOCKET_NAME

SHIM_DIR = Path(__file__).parent / "shim"
START_LIMIT_S = 40.0  # waiting for the remains of an earlier shim (15 s), killing leftovers (10 s), a slow disk
CONNECT_LIMIT_S = 5.0
CODE_CHARACTERS = 16  # of 64: told apart are a few versions, not the work of an enemy
IDLE_END_S = 60.0  # longer than a daemon takes to be upgraded and started again


async def open_socket(state_dir: Path) -> socket.socket:
    """A connection to the shim of `state_dir`. OSError when none listens there.

    An address holds 108 bytes only and data directories may be deep, so the way goes through a descriptor.
    """
    folder = os.open(state_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            async with asyncio.timeout(CONNECT_LIMIT_S):
                await asyncio.get_running_loop().sock_connect(sock, f"/proc/self/fd/{folder}/{SOCKET_NAME}")
        except BaseException:
            sock.close()
            raise
    finally:
        os.close(folder)
    return sock


def code_of(shim_dir: Path | None = None) -> str:
    """What a shim's code is called: a digest of its files, by default of those that are installed now.

    Raises:
        RuntimeUnavailable: they cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for path in sorted((shim_dir or SHIM_DIR).glob("*.py")):
            data = path.read_bytes()
            digest.update(f"{path.name}\0{len(data)}\0".encode() + data)
    except OSError as error:
        raise RuntimeUnavailable(f"the shim's code cannot be read: {error}") from None
    return digest.hexdigest()[:CODE_CHARACTERS]


async def launch(
    state_dir: Path,
    *,
    node: str,
    kill_margin_s: float,
    isolate: bool = True,
    idle_end_s: float = IDLE_END_S,
    home: Path | None = None,
) -> bool:
    """Start a shim for `state_dir`; False when there is one already (or another is just starting it).

    Without `isolate`, or where the kernel refuses a pid namespace, it runs as a child subreaper only and says so in its
    warnings. One that has nothing to hold and no client for `idle_end_s` ends. Logs and kept scratch directories go to
    `home`, by default the state directory itself. RuntimeUnavailable tells why none could be started.
    """
    shared = {name: str(home / name) for name in ("logs", "kept")} if home is not None and home != state_dir else {}
    code = await asyncio.to_thread(code_of)
    refused = "" if isolate else "switched off"
    while True:
        said = await _run_launcher(
            state_dir,
            {
                "state_dir": str(state_dir),
                "node": node,
                "kill_margin_s": kill_margin_s,
                "isolate": refused,
                "idle_end_s": idle_end_s,
                "code": code,
                "release": __version__,
                **shared,
            },
        )
        if "ready" in said:
            return True
        if "busy" in said:
            return False
        if "refused" in said and not refused:
            refused = f"the kernel refuses it: {said['refused']}"
            continue
        why = said.get("failed") or said.get("refused") or "it said nothing"
        raise RuntimeUnavailable(f"the shim for {state_dir} could not be started: {why}")


def _open_log(state_dir: Path) -> BinaryIO:
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        return (state_dir / "shim.log").open("ab")
    except OSError as error:
        raise RuntimeUnavailable(f"cannot use {state_dir}: {error.strerror}") from None


async def _run_launcher(state_dir: Path, config: dict[str, object]) -> dict[str, str]:
    """Run the program that becomes the shim until it has said what came of it."""
    # In a thread: what it says ends when the shim lets go of the pipe, and no transport is left half open should we
    # be cancelled.
    output = await asyncio.to_thread(_launcher_output, state_dir, json.dumps(config))
    try:
        said = json.loads(output)
    except ValueError:
        said = {}
    if not isinstance(said, dict) or not said:
        return {"failed": f"see {state_dir / 'shim.log'}"}
    return {str(name): str(value) for name, value in said.items()}


def _launcher_output(state_dir: Path, config: str) -> bytes:
    with _open_log(state_dir) as errors:
        try:
            return subprocess.run(
                [sys.executable, "-I", "-S", "-X", "utf8", str(SHIM_DIR), config],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
                start_new_session=True,
                timeout=START_LIMIT_S,
                check=False,
            ).stdout
        except subprocess.TimeoutExpired:
            raise RuntimeUnavailable(f"the shim for {state_dir} was not ready after {START_LIMIT_S:.0f} s") from None
        except OSError as error:
            raise RuntimeUnavailable(f"the shim for {state_dir} could not be started: {error}") from None
