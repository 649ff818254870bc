"""A Docker engine for the tests: the one that is up, else Debian's dockerd with a place of its own, gone afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.harness import eventually

START_S = 30.0
STOP_S = 30.0  # it ends its containers first
CGROUPS = Path("/sys/fs/cgroup")


class NoDocker(Exception):
    """Docker cannot be had here; the text says why."""


@dataclass(frozen=True)
class Docker:
    """An engine that answers.

    Attributes:
        host: its socket, as in ``DOCKER_HOST``.
        ours: it was started for us.
    """

    host: str
    ours: bool
    env: dict[str, str] = field(repr=False)

    def __call__(self, *args: str, limit_s: float = 60.0, stdin: str | bytes = "", check: bool = True) -> str:
        """Run the client; what it printed."""
        done = subprocess.run(
            ["docker", *args], input=stdin.encode() if isinstance(stdin, str) else stdin, capture_output=True,
            timeout=limit_s, check=False, env=self.env,
        )  # fmt: skip
        if check and done.returncode != 0:
            said = (done.stdout + done.stderr).decode(errors="replace")
            raise AssertionError(f"docker {' '.join(args)} → {done.returncode}\n{said}")
        return done.stdout.decode(errors="replace")


def answering() -> Docker | None:
    """The engine that the environment names, if one is up."""
    if shutil.which("docker") is None:
        return None
    docker = Docker(os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock"), False, dict(os.environ))
    said = docker("version", "--format", "{{.Server.Version}}", check=False)
    return docker if said.strip() else None


@contextlib.contextmanager
def engine(*, own: bool = False) -> Iterator[Docker]:
    """Docker for the length of the block.

    Args:
        own: start one even when another is up.

    Raises:
        NoDocker: it is not installed, or we are not root.
        AssertionError: it does not come up.
    """
    if not own and (there := answering()) is not None:
        yield there
        return
    missing = [name for name in ("dockerd", "containerd", "docker") if shutil.which(name) is None]
    if missing:
        raise NoDocker(f"{', '.join(missing)}: not installed (scripts/setup.sh --dev does)")
    if os.geteuid() != 0:
        raise NoDocker("only root can start dockerd")
    before = {path for path in (Path("/run/docker"), Path("/run/containerd")) if path.exists()}
    with tempfile.TemporaryDirectory(prefix="sp-docker-", dir="/var/tmp", ignore_cleanup_errors=True) as folder:
        top = Path(folder)
        name = top.name  # of its control groups
        host = f"unix://{top}/docker.sock"
        docker = Docker(host, True, {**os.environ, "DOCKER_HOST": host, "DOCKER_CONFIG": folder})
        command = [
            "dockerd", "--config-file", f"{top}/none.json", "--host", host, "--pidfile", f"{top}/pid",
            "--data-root", f"{top}/data", "--exec-root", f"{top}/exec", "--cgroup-parent", f"/{name}",
            # Neither the machine's firewall nor its network is changed; a network that a test makes has no rules.
            "--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false",
            "--default-cgroupns-mode=private", "--exec-opt", "native.cgroupdriver=cgroupfs",
        ]  # fmt: skip
        (top / "none.json").write_text("{}")
        log = top / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        try:
            eventually(
                lambda: process.poll() is not None or docker("version", check=False).count("Version:") > 1,
                within_s=START_S,
                what="dockerd answers",
            )
            if process.poll() is not None:
                raise AssertionError(f"dockerd ended with {process.returncode}:\n{log.read_text()[-2000:]}")
            yield docker
        finally:
            process.terminate()  # it ends its containers and its containerd
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_S)
            _clean_up(top, name)
            for path in {Path("/run/docker"), Path("/run/containerd")} - before:
                _remove_empty(path)


def _clean_up(top: Path, name: str) -> None:
    """What dockerd leaves even when it ends in order: a mounted network namespace, empty control groups.

    And one that did not: its containerd, whose processes name our directory.
    """
    for pid in processes_naming(f"{top}/"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    # Its groups and mounts are busy until it has died.
    eventually(lambda: not processes_naming(f"{top}/"), within_s=STOP_S, what="what dockerd left is dead")
    mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for path in sorted((p for p in mounted if p.startswith(f"{top}/")), reverse=True):
        subprocess.run(["umount", "--lazy", path], check=False, capture_output=True)
    for group in (CGROUPS / name, *(folder / name for folder in CGROUPS.iterdir())):
        _remove_empty(group)


def processes_naming(text: str) -> list[int]:
    """Those with this in their command lines."""
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if os.fsencode(text) in (proc / "cmdline").read_bytes():
                found.append(int(proc.name))
    return found


def _remove_empty(top: Path) -> None:
    for folder, _, _ in os.walk(top, topdown=False):
        with contextlib.suppress(OSError):  # somebody else's, or not there
            Path(folder).rmdir()
