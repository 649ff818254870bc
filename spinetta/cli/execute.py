"""``spinetta exec``: a command beside a running task, with a terminal if there is one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from spinetta.cli import exits, output
from spinetta.cli.base import Finished, client_options, json_option, show_error, with_client
from spinetta.cli.log import data_document
from spinetta.errors import UserError

if TYPE_CHECKING:
    from spinetta.client.aio import AsyncClient
    from spinetta.client.execs import ExecOutput, Execution

SIGNALS_MAX = 16  # that were not passed on yet
READ_BYTES = 32 << 10
MESSAGE_BYTES = 1000  # of a runtime's complaint; the shim cuts it sooner
END_OF_INPUT = b"\x04"  # as a user of a terminal types it
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)  # to the command, once; the second ends us


@click.command("exec", epilog=exits.HELP_EXEC)
@click.argument("task_id", metavar="ID")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--interactive", "-i", is_flag=True, help="Pass our standard input on; implied by a terminal.")
@click.option(
    "--tty/--no-tty", "-t/-T", "tty", default=None, help="With a terminal; default: if input and output are one."
)
@click.option("--workdir", "-w", metavar="PATH", default="", help="Relative to the task's own directory.")
@click.option("--env", "-e", multiple=True, metavar="NAME[=VALUE]", help="Without a value: as it is here.")
@json_option
@client_options
def exec_(
    task_id: str,
    command: tuple[str, ...],
    interactive: bool,
    tty: bool | None,
    workdir: str,
    env: tuple[str, ...],
    as_json: bool,
    node: str | None,
    timeout: str | None,
    config_file: str | None,
) -> None:
    """Run COMMAND beside a running task: on its node, with its environment, directory and limits.

    Write -- before the command. It ends when the task does, or when we do; the task goes on. It shares what the task
    may use: if memory runs out, the task may be ended.

    \b
    Examples:
      spinetta exec ID -- bash
      spinetta exec ID -- tail -f progress.txt
      spinetta exec -i ID -- sh -c 'cat > more.txt' < more.txt
    """
    with_terminal = (sys.stdin.isatty() and sys.stdout.isatty()) if tty is None else tty
    if with_terminal and as_json:
        raise UserError("--json and a terminal", field="json", hint="add --no-tty")
    options: dict[str, Any] = {
        "terminal": _size() if with_terminal else None,
        "takes_input": interactive or with_terminal,
        "working_directory": workdir,
        "env": _environment(env, with_terminal=with_terminal),
    }

    async def work(client: AsyncClient) -> int:
        async with client.exec(task_id, command, **options) as execution:
            with _raw_terminal() if with_terminal else contextlib.nullcontext():
                last = await _attend(execution, options, as_json=as_json)
            end = execution.end
        assert end is not None  # noqa: S101 - outputs has come to its end
        if as_json:
            output.put_json_line({"exit_code": end.exit_code, "signal": end.signal, "message": end.message})
        elif end.message:
            output.tell(f"exec: {_not_twice(end.message, last)}")
        return exits.SIGNAL_BASE + end.signal if end.signal else end.exit_code

    try:
        raise Finished(with_client(work, node, timeout, config_file))
    except UserError as e:
        if e.reason != "cannot-start":
            raise
        show_error(e, as_json=as_json, code=exits.NOT_STARTED)
        raise Finished(exits.NOT_STARTED) from None


def _not_twice(message: str, last: bytes) -> str:
    """Without what a container's runtime has said already, as if the command had."""
    said = output.printable(last.decode(errors="replace").strip())
    return message.removesuffix(said).rstrip(": ") or message


async def _attend(execution: Execution, options: dict[str, Any], *, as_json: bool) -> bytes:
    """Pass everything on, both ways, until the command has ended; the end of what it wrote."""
    last = b""
    with_terminal = options["terminal"] is not None
    async with asyncio.TaskGroup() as group:
        helpers = [group.create_task(_pass_signals(execution, with_terminal=with_terminal))]
        if options["takes_input"]:
            helpers.append(group.create_task(_pass_input(execution, with_terminal=with_terminal)))
        async for part in execution.outputs():
            _show(part, as_json=as_json)
            last = (last + part.data)[-MESSAGE_BYTES:]
        for helper in helpers:
            helper.cancel()
    return last


def _show(part: ExecOutput, *, as_json: bool) -> None:
    if as_json:
        stream = "stderr" if part.is_error else "stdout"
        output.put_json_line({"stream": stream, **data_document(part.data)})
        return
    out = sys.stderr.buffer if part.is_error else sys.stdout.buffer
    out.write(part.data)
    out.flush()


async def _pass_input(execution: Execution, *, with_terminal: bool) -> None:
    """Our standard input, as it comes. Read by a thread: it may be a file, which no loop can wait for."""
    loop = asyncio.get_running_loop()
    read: asyncio.Queue[bytes] = asyncio.Queue(1)

    def reading() -> None:
        with contextlib.suppress(RuntimeError, asyncio.CancelledError):  # the loop has ended, and we with it
            while True:
                try:
                    data = os.read(0, READ_BYTES)
                except OSError:
                    data = b""
                asyncio.run_coroutine_threadsafe(read.put(data), loop).result()
                if not data:
                    return

    # Not one of the loop's own threads: nothing ends a read, and the program would wait for it at its end.
    threading.Thread(target=reading, name="standard input", daemon=True).start()
    while data := await read.get():
        await execution.send(data)
    if with_terminal:
        await execution.send(END_OF_INPUT)
    else:
        await execution.end_input()


async def _pass_signals(execution: Execution, *, with_terminal: bool) -> None:
    """With a terminal: that its size has changed. Without: the first of each signal that would end us."""
    loop = asyncio.get_running_loop()
    came: asyncio.Queue[int] = asyncio.Queue(SIGNALS_MAX)
    wanted = (signal.SIGWINCH,) if with_terminal else _PASSED_ON
    for each in wanted:
        loop.add_signal_handler(each, _note, came, int(each))
    if with_terminal:  # what ends us is to leave the terminal as it was
        for each in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(each, _interrupt)
    try:
        while True:
            number = await came.get()
            if number == signal.SIGWINCH:
                await execution.resize(*_size())
            else:
                loop.remove_signal_handler(number)
                await execution.signal(number)
    finally:
        for each in {*wanted, signal.SIGTERM, signal.SIGHUP}:
            loop.remove_signal_handler(each)


def _note(came: asyncio.Queue[int], number: int) -> None:
    with contextlib.suppress(asyncio.QueueFull):  # the size is looked at when its turn comes, and that is the latest
        came.put_nowait(number)


def _interrupt() -> None:
    raise KeyboardInterrupt


def _size() -> tuple[int, int]:
    """Rows and columns of our terminal."""
    for fd in (1, 0, 2):
        with contextlib.suppress(OSError):
            columns, rows = os.get_terminal_size(fd)
            if rows and columns:
                return rows, columns
    return 24, 80


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Each key goes to the command at once, Ctrl-C too; afterwards all is as before."""
    import termios
    import tty

    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0, termios.TCSADRAIN)  # what has been typed already is for the command
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _environment(given: tuple[str, ...], *, with_terminal: bool) -> dict[str, str]:
    env = {"TERM": os.environ.get("TERM", "xterm")} if with_terminal else {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals and name not in os.environ:
            raise UserError(f"{name} is not set here", field="env", hint="give it a value: NAME=VALUE")
        env[name] = value if equals else os.environ[name]
    return env
