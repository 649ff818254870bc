"""`Client.exec` and `Client.copy_out`: what the asynchronous client has, for programs without asyncio. Real shims."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spinetta.client import AsyncClient, Client, CopiedEntry, CopySkipped, ExecEnd
from spinetta.client.execs import Execution as AsyncExecution
from spinetta.client.syncexecs import Execution
from spinetta.errors import NotFound, StoreUnavailable, UserError
from spinetta.events import attempt_key
from spinetta.model import TaskId
from spinetta.runtime.shim import proctable
from tests.contract.api_world import Etcd, etcd, etcd_member, node, run, spec
from tests.contract.shims import clean_up, name_of, runtime, shell

pytestmark = pytest.mark.contract
_ = (etcd, etcd_member)  # fixtures
GUIDE = Path(__file__).resolve().parents[2] / "docs" / "tasks.md"


@pytest.fixture
def shims() -> Iterator[list[Path]]:
    """State directories whose shims are ended."""
    used: list[Path] = []
    yield used
    for state_dir in used:
        clean_up(state_dir)


def beside(etcd: Etcd, tmp_path: Path, shims: list[Path], script: str, use: Callable[[str, str], None]) -> None:
    """Let `use` have a node's address and a task that runs there, in a thread without asyncio."""

    async def story() -> None:
        async with node(etcd, tmp_path) as a:
            shims.append(a.port.shim_dir)
            async with runtime(a.port.shim_dir) as rt:
                task_id = (await a.submit(spec()))[0]
                assert await a.claim(task_id)
                assert await rt.start(shell(attempt_key(TaskId(task_id), 1), script)) is None
                await asyncio.to_thread(use, a.address, task_id)

    run(story())


def test_a_command_beside_a_task_and_files_out_of_it(etcd: Etcd, tmp_path: Path, shims: list[Path]) -> None:
    script = "echo first > a; mkdir d; echo second > d/b; mkfifo d/pipe; touch ready; exec sleep 100"

    def use(address: str, task_id: str) -> None:
        with Client(address) as client:
            wait = "while [ ! -e ready ]; do sleep 0.05; done; "
            with client.exec(task_id[-8:], ["sh", "-c", wait + "cat; echo oops >&2; exit 3"], takes_input=True) as e:
                assert (e.task, e.attempt, e.end) == (task_id, 1, None)
                e.send(b"hello ")
                e.send(b"there")
                e.end_input()
                parts = list(e.outputs())
                assert b"".join(p.data for p in parts if not p.is_error) == b"hello there"
                assert b"".join(p.data for p in parts if p.is_error) == b"oops\n"
                assert e.end == ExecEnd(3)
            task = client.task(task_id)
            with task.exec(["sleep", "100"]) as e:
                e.signal(15)
                assert list(e.outputs()) == []
                assert e.end is not None
                assert e.end.signal == 15
            with task.exec(["sh", "-c", "read x; stty size"], terminal=(24, 80), takes_input=True) as e:
                e.resize(30, 99)
                e.send(b"\n")
                assert b"30 99" in b"".join(p.data for p in e.outputs())

            entry, *data = client.copy_out(task_id, "a")
            assert isinstance(entry, CopiedEntry)
            assert (entry.name, entry.is_directory, entry.size_bytes) == ("a", False, 6)
            assert data == [b"first\n"]
            entry, *rest = task.copy_out("d")
            assert isinstance(entry, CopiedEntry)
            assert entry.is_directory
            whole = io.BytesIO(b"".join(p for p in rest if isinstance(p, bytes)))
            with tarfile.open(fileobj=whole) as archive:
                assert [m.name for m in archive.getmembers() if m.isfile()] == ["b"]
            assert [p.names for p in rest if isinstance(p, CopySkipped)] == [("pipe",)]

            with pytest.raises(UserError) as cannot, client.exec(task_id, ["no-such-program"]):
                raise AssertionError("it was started")
            assert cannot.value.reason == "cannot-start"
            with pytest.raises(NotFound):
                next(client.copy_out(task_id, "nothing"))
            with pytest.raises(ZeroDivisionError), client.exec(task_id, ["sleep", "100"]):
                _ = 1 // 0  # what goes wrong in the block is what is told

    beside(etcd, tmp_path, shims, script, use)


def test_leaving_the_block_or_closing_the_client_ends_the_command(
    etcd: Etcd, tmp_path: Path, shims: list[Path]
) -> None:
    def use(address: str, task_id: str) -> None:
        client = Client(address)
        one, other = f"471{os.getpid()}", f"472{os.getpid()}"  # nobody else's
        with client.exec(task_id, ["sleep", one]):
            until(lambda: bool(running(one)))
        until(lambda: not running(one))
        with client.exec(task_id, ["sleep", other]) as execution:
            outputs = execution.outputs()
            client.close()
            with pytest.raises(RuntimeError, match="closed"):
                next(outputs)
        until(lambda: not running(other))

    beside(etcd, tmp_path, shims, "exec sleep 100", use)


def test_leaving_the_block_ends_the_command_while_another_thread_reads(
    etcd: Etcd, tmp_path: Path, shims: list[Path]
) -> None:
    one = f"473{os.getpid()}"

    def use(address: str, task_id: str) -> None:
        told: list[BaseException] = []

        def read(execution: Execution) -> None:
            try:
                for _ in execution.outputs():
                    heard.set()
            except StoreUnavailable as e:
                told.append(e)

        heard = threading.Event()
        with Client(address) as client:
            command = ["sh", "-c", f"echo begun; exec sleep {one}"]
            mine = contextlib.suppress(ZeroDivisionError)  # and nothing that would be told in its place
            with mine, client.exec(task_id, command, takes_input=True) as execution:
                reader = threading.Thread(target=read, args=(execution,))
                reader.start()
                assert heard.wait(20)
                until(lambda: bool(running(one)))
                _ = 1 // 0
            until_ended(one)
            reader.join(20)
            assert not reader.is_alive()
        assert ["the block of the command was left" in str(e) for e in told] == [True]

    beside(etcd, tmp_path, shims, "exec sleep 100", use)


def test_so_it_does_while_another_task_of_asyncio_reads(etcd: Etcd, tmp_path: Path, shims: list[Path]) -> None:
    one, other = f"474{os.getpid()}", f"475{os.getpid()}"

    async def read(execution: AsyncExecution, heard: asyncio.Event) -> None:
        async for _ in execution.outputs():
            heard.set()

    async def story(address: str, task_id: str) -> None:
        async with AsyncClient(address) as client:
            for argument, is_cancelled in ((one, False), (other, True)):
                heard = asyncio.Event()
                command = ["sh", "-c", f"echo begun; exec sleep {argument}"]
                with contextlib.suppress(ZeroDivisionError):
                    async with client.exec(task_id, command) as execution:
                        reader = asyncio.create_task(read(execution, heard))
                        await asyncio.wait_for(heard.wait(), 20)
                        if is_cancelled:  # that is not told as anything else
                            reader.cancel()
                        _ = 1 // 0
                await asyncio.to_thread(until_ended, argument)
                with pytest.raises(asyncio.CancelledError if is_cancelled else StoreUnavailable):
                    await asyncio.wait_for(reader, 20)

    beside(etcd, tmp_path, shims, "exec sleep 100", lambda address, task_id: asyncio.run(story(address, task_id)))


def test_what_the_guide_shows(
    etcd: Etcd, tmp_path: Path, shims: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = GUIDE.read_text().split("A command runs beside a running task", 1)[1]
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    monkeypatch.chdir(tmp_path)

    def use(address: str, task_id: str) -> None:
        with Client(address) as client, client.exec(task_id, ["sh", "-c", "printf 'a\\nb\\n' > progress.txt"]) as e:
            assert list(e.outputs()) == []
        shown = found[1].replace("127.0.0.1:7220", address)
        exec(compile(shown, str(GUIDE), "exec"), {"Client": Client, "task_id": task_id})  # noqa: S102 - our own text
        with Client(address) as client:
            assert list(client.copy_out(task_id, "more.txt"))[1:] == [b"more\n"]

    beside(etcd, tmp_path, shims, "exec sleep 100", use)
    assert capsys.readouterr().out.split()[0::2][:2] == ["0", "2"]
    assert (tmp_path / "progress.txt").read_bytes() == b"a\nb\n"


def running(argument: str) -> list[int]:
    """Programs named sleep with this argument."""
    wanted = f"sleep\0{argument}\0".encode()
    return [p.pid for p in proctable.read_all() if name_of(p.pid) == "sleep" and _argv(p.pid) == wanted]


def until(condition: Callable[[], bool]) -> None:
    """In a thread without asyncio."""
    gone = threading.Event()
    for _ in range(400):
        if condition():
            return
        gone.wait(0.05)
    raise AssertionError("it goes on")


def until_ended(argument: str) -> None:
    """See `running`."""
    until(lambda: not running(argument))


def _argv(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended meanwhile
        return b""
