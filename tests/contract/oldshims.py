"""Shims of other code for tests: a copy of the real one that differs in nothing but a comment, or in what it says."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from spinetta.runtime import generations, launch
from spinetta.runtime.process import ProcessRuntime
from spinetta.runtime.protocol import Exited
from spinetta.runtime.shims import Shims
from tests.contract.shims import KILL_MARGIN_S, LIMIT_S, boottime_s, clean_up, shell, until

# What `hello` of a shim from before upgrades did not say, so that a copy without these lines speaks as that one did.
UNSAID = (
    '"code": self._identity.code,',
    '"release": self._identity.release,',
    '"started_ms": self._identity.started_ms,',
)


def copy_of_the_code(folder: Path, *, says_its_code: bool = True, remark: str = "an earlier version") -> Path:
    """Of the shim; another than the installed one, by a comment at least. Put into a new folder."""
    copy = Path(shutil.copytree(launch.SHIM_DIR, folder, ignore=shutil.ignore_patterns("__pycache__")))
    with (copy / "__init__.py").open("a") as file:
        file.write(f"# {remark}\n")
    if not says_its_code:
        server = copy / "server.py"
        text = server.read_text()
        for line in UNSAID:
            assert text.count(line) == 1, line
            text = text.replace(line, "")
        server.write_text(text)
    return copy


@contextlib.contextmanager
def installed(code: Path) -> Iterator[None]:
    """While it lasts this is the shim's code that daemons of this process find."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "SHIM_DIR", code)
        yield


@pytest.fixture
def home() -> Iterator[Path]:
    """The first shim's directory; all that is in it and below it is cleaned up."""
    with tempfile.TemporaryDirectory(prefix="spinetta-shims-") as folder:
        path = Path(folder) / "shim"
        Path(folder).chmod(0o755)
        try:
            yield path
        finally:
            for each in generations.folders(path):
                clean_up(each)


@pytest.fixture(params=["other", "silent"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Other code: one that says so, and one of before there was anything to say."""
    return copy_of_the_code(tmp_path / "code" / "shim", says_its_code=request.param == "other")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Other code."""
    return copy_of_the_code(tmp_path / "code" / "shim")


@asynccontextmanager
async def one_shim(home: Path, *, isolate: bool = True) -> AsyncIterator[ProcessRuntime]:
    """As a daemon of before upgrades connects: it knows one shim."""
    async with ProcessRuntime.connect(home, node="n1", kill_margin_s=KILL_MARGIN_S, isolate=isolate) as rt:
        await rt.renew(boottime_s())
        yield rt


@asynccontextmanager
async def shims(home: Path, *, renewed: bool = True, isolate: bool = True) -> AsyncIterator[Shims]:
    """As a daemon connects."""
    async with Shims.connect(home, node="n1", kill_margin_s=KILL_MARGIN_S, isolate=isolate) as rt:
        if renewed:
            await rt.renew(boottime_s())
        yield rt


# --- what tests do with them ---

WAITS = "echo begun; while [ ! -e go ]; do sleep 0.05; done; echo done"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def second(home: Path) -> Path:
    return home / "generations" / "2"


async def ends(rt: Shims, *keys: str) -> dict[str, list[Exited]]:
    """What is told of these, until there is an end of each."""
    told: dict[str, list[Exited]] = {}
    async with asyncio.timeout(LIMIT_S):
        async for event in rt.events():
            if isinstance(event, Exited):
                told.setdefault(event.key, []).append(event)
            if set(keys) <= set(told):
                return told
    raise AssertionError("the events ended")


async def one_is_left(rt: Shims) -> None:
    await until(lambda: len(rt.described()) == 1)


async def begin(code: Path, home: Path, *keys: str, isolate: bool = True, **changes: object) -> int:
    """A shim of this code with attempts that wait for a file ``go`` in their scratch directories; its pid."""
    with installed(code):
        async with one_shim(home, isolate=isolate) as rt:
            for key in keys:
                assert await rt.start(shell(key, WAITS, **changes)) is None
            return rt.shim_pid()


def go(folder: Path, key: str) -> None:
    (folder / "scratch" / key / "go").touch()
