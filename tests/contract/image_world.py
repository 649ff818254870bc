"""What the tests of images stand on: a store in a directory, and a real registry."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from spinetta.imageref import parse
from spinetta.runtime.images.limits import Limits
from spinetta.runtime.images.records import ImageRecord
from spinetta.runtime.images.store import ImageStore, StoreSettings
from tests.contract import imagefiles as files

T = TypeVar("T")
LIMIT_S = 60.0
BASE = 1_000_000
MIB = 1 << 20
LIMITS = Limits(bytes_max=200 * MIB, file_bytes_max=100 * MIB, files_max=5000, free_min_bytes=MIB)


def run(scenario: Coroutine[Any, Any, T]) -> T:
    """Run a scenario, with a limit."""

    async def limited() -> T:
        async with asyncio.timeout(LIMIT_S):
            return await scenario

    return asyncio.run(limited())


def settings(**changes: Any) -> StoreSettings:
    """Small limits; shifted when we are root."""
    base = BASE if os.geteuid() == 0 else None
    return StoreSettings(**{"base": base, "limits": LIMITS, "keep_bytes": 0, "keep_s": 0.0, **changes})


@asynccontextmanager
async def opened(directory: Path, **changes: Any) -> AsyncIterator[ImageStore]:
    """A store."""
    async with ImageStore.open(directory / "images", settings(**changes)) as store:
        yield store


async def had(store: ImageStore, text: str, **options: Any) -> ImageRecord:
    """Pull it."""
    return await store.pull(parse(text), **options)


def rootfs(directory: Path, record: ImageRecord) -> Path:
    """Where an image is."""
    return directory / "images" / "unpacked" / record.directory / "rootfs"


def left_over(directory: Path) -> list[str]:
    """What is being staged, or unpacked."""
    images = directory / "images"
    return [p.name for part in ("staging", "unpacked") for p in (images / part).iterdir()]


async def until(condition: Callable[[], Any], what: str, within_s: float = 30.0) -> None:
    """Wait for a condition, with a limit."""
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.01)


def children_of(word: str) -> list[str]:
    """Command lines of processes that mention a word, such as a directory of the test's own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            cwd = os.readlink(path.parent / "cwd")  # noqa: PTH115
            if (word in line or cwd.startswith(word)) and path.parent.name != str(os.getpid()):
                found.append(line)
    return found


def quiet_port() -> int:
    """A free one of the machine's own address, below those that outgoing connections get meanwhile."""
    for _ in range(100):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", random.randrange(20_000, 32_000)))
            return int(sock.getsockname()[1])
    raise AssertionError("no free port")


class Registry:
    """Debian's docker-registry on a free port."""

    def __init__(self, directory: Path) -> None:
        self.host = f"127.0.0.1:{quiet_port()}"
        self.requests = directory / "registry.log"
        config = directory / "registry.yml"
        config.write_text(
            f"version: 0.1\nlog: {{level: info, accesslog: {{disabled: false}}}}\n"
            f"storage: {{filesystem: {{rootdirectory: {directory}/data}}, delete: {{enabled: true}}}}\n"
            f"http: {{addr: '{self.host}'}}\n"
        )
        self._log = self.requests.open("wb")
        environment = {"PATH": os.environ["PATH"], "OTEL_TRACES_EXPORTER": "none"}
        self.process = subprocess.Popen(
            ["docker-registry", "serve", str(config)], stdout=self._log, stderr=self._log, env=environment
        )
        end_s = time.monotonic() + 20
        while True:
            try:
                urllib.request.urlopen(f"http://{self.host}/v2/", timeout=2).close()
                return
            except (urllib.error.URLError, OSError):
                assert self.process.poll() is None, self.requests.read_text()[-2000:]
                assert time.monotonic() < end_s, "the registry did not start"
                time.sleep(0.05)

    def push(self, layout: Path, name: str, *options: str, tag: str = "latest") -> None:
        """Put an image of a layout into it."""
        policy = layout.parent / "policy.json"
        policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        subprocess.run(
            ["skopeo", "--policy", str(policy), "copy", "--quiet", "--dest-tls-verify=false", *options,
             f"oci:{layout}:{tag}", f"docker://{self.host}/{name}"],
            check=True, capture_output=True,
        )  # fmt: skip

    def asked(self, word: str) -> int:
        """How many requests mention it."""
        return sum(word in line for line in self.requests.read_text(errors="replace").splitlines())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()


@contextmanager
def registry(directory: Path) -> Iterator[Registry]:
    """One, for as long as the context lasts."""
    found = Registry(directory)
    try:
        yield found
    finally:
        found.stop()


CONFIG = {
    "Env": ["A=b", "PATH=/bin"],
    "Entrypoint": ["/bin/sh", "-c"],
    "Cmd": ["true"],
    "User": "ann",
    "WorkingDir": "/home/ann",
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image in every form, built once."""
    at = tmp_path_factory.mktemp("images")
    base = files.base()
    files.layout(at / "layout", [base], config=CONFIG)
    files.layout(at / "zipped", [base], config=CONFIG, how="gzip")
    files.oci_archive(at / "oci.tar", at / "layout")
    files.docker_archive(at / "docker.tar", [base], config=CONFIG)
    root = at / "root"
    root.mkdir()
    subprocess.run(["tar", "-xpf", "-", "-C", root], input=base, check=True)
    (at / "root.tar").write_bytes(base)
    for program, end in (("gzip", "gz"), ("xz", "xz"), ("zstd", "zst")):
        packed = subprocess.run([program, "-1", "-c"], input=base, check=True, capture_output=True).stdout
        (at / f"root.tar.{end}").write_bytes(packed)
    return at


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Iterator[Registry]:
    with registry(tmp_path_factory.mktemp("registry")) as found:
        found.push(shared / "layout", "lab/tool:1")
        yield found
