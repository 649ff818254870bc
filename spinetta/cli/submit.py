"""``spinetta submit``."""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from spinetta.cli import exits, output
from spinetta.cli.base import Finished, client_options, is_somebody, json_option, with_client
from spinetta.errors import UserError

if TYPE_CHECKING:
    from spinetta.client.aio import AsyncClient
    from spinetta.client.views import TaskInfo
    from spinetta.model import TaskSpec

F = TypeVar("F", bound=Callable[..., Any])

EPILOG = exits.HELP
NETWORKS = ("none", "host", "bridge")  # `container.NETWORKS`, without the import that --help would wait for


def _capability_names(_ctx: click.Context, _param: click.Parameter, begun: str) -> list[str]:
    from spinetta.container import CAPABILITIES

    return sorted(name for name in CAPABILITIES if name.startswith(begun.upper()))


def _paths(_ctx: click.Context, _param: click.Parameter, begun: str) -> list[CompletionItem]:
    return [CompletionItem(begun, type="file")]  # the shell completes it: nodes often have the same paths as we


def container_options(command: F) -> F:
    """How a task is contained. All but the last are refused without an image."""
    for decorate in (
        click.option("--keep-scratch", metavar="TIME", help="How long its scratch directory stays after its end."),
        click.option("--tmp", metavar="SIZE", help="Size of /tmp in the container; it is memory."),
        click.option(
            "--mount",
            "mounts",
            multiple=True,
            metavar="SOURCE[:TARGET][:rw]",
            shell_complete=_paths,
            help="A path of the node that it sees, read-only; may be repeated.",
        ),
        click.option(
            "--cap-add",
            "capabilities",
            multiple=True,
            metavar="NAME",
            shell_complete=_capability_names,
            help="A Linux capability, e.g. SYS_PTRACE; may be repeated.",
        ),
        click.option("--user", metavar="UID[:GID]|root", help="Who it is in the container."),
        click.option("--writable", is_flag=True, help="It may write to its root file system, too."),
        click.option(
            "--network",
            type=click.Choice(NETWORKS),
            help="bridge: to the outside, behind the node's address; host: the node's own. Else none: loopback only.",
        ),
        click.option(
            "--image",
            metavar="REF",
            shell_complete=_paths,
            help="Run it in a container: docker://HOST/NAME:TAG, a name, or a path of the node.",
        ),
    ):
        command = decorate(command)
    return command


@click.command(epilog=EPILOG, context_settings={"ignore_unknown_options": False})
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--name", metavar="NAME", help="For people; need not be unique.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="To filter by; may be repeated.")
@click.option("--cpus", metavar="N", help="Cores, e.g. 2, 0.5 or 1500m (1).")
@click.option("--memory", metavar="SIZE", help="E.g. 2GiB. A task that uses more is ended as out of memory.")
@click.option("--disk", metavar="SIZE", help="Scratch space.")
@click.option("--gpu", metavar="N", type=int, help="Short for --countable gpu=N.")
@click.option("--countable", "countables", multiple=True, metavar="NAME=N", help="Other things that nodes offer.")
@click.option("--open-files", metavar="N", type=int, help="Files that each of its processes may have open at once.")
@click.option("--time", metavar="TIME", help="The longest it may run, e.g. 1h30m.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="The node must have it; may be repeated.")
@click.option("--not-tag", "not_tags", multiple=True, metavar="TAG", help="The node must not have it.")
@click.option("--env", "-e", multiple=True, metavar="NAME[=VALUE]", help="Without a value: as it is here.")
@click.option("--workdir", metavar="PATH", help="Where it runs; else a fresh directory, removed afterwards.")
@click.option("--priority", metavar="N", type=int, help="-1000 to 1000, higher first.")
@click.option("--retries", metavar="N", type=int, help="Further attempts after it has failed.")
@click.option("--backoff", metavar="TIME", help="Before the first retry; doubles with each.")
@click.option("--no-restart", is_flag=True, help="Do not start it again when its node is lost.")
@click.option("--grace", metavar="TIME", help="How long it may run on without contact to the cluster.")
@click.option("--overlap", is_flag=True, help="Two attempts at once do no harm: do not wait for proof of a death.")
@click.option("--losses-allowed", metavar="N", type=int, help="Nodes that may be lost under it.")
@click.option("--owner", metavar="NAME", help="Default: your login name; in a secured cluster the user you are.")
@click.option(
    "--clearance", "-c", multiple=True, metavar="LABEL,…", help="Only nodes cleared for it may see and run it."
)
@click.option("--secret", "secrets", multiple=True, metavar="NAME[=FILE]", help="Given as a file in $SPINETTA_SECRETS.")
@container_options
@click.option("--id", "task_id", metavar="UUID", help="A UUID of version 7; the same again changes nothing.")
@click.option(
    "--file", "file", metavar="FILE", help="Tasks from a YAML, JSON or JSON lines file; - for standard input."
)
@click.option(
    "--format", "format_", type=click.Choice(["yaml", "json", "jsonl"]), help="Of --file, when its name does not tell."
)
@click.option("--wait", "-w", is_flag=True, help="Wait for the end; exit as the task does.")
@click.option("--follow", "-f", is_flag=True, help="Show what it writes, until its end; exit as it does.")
@click.option("--dry-run", is_flag=True, help="Check and print as JSON, submit nothing.")
@json_option
@client_options
def submit(
    command: tuple[str, ...],
    file: str | None,
    format_: str | None,
    wait: bool,
    follow: bool,
    dry_run: bool,
    as_json: bool,
    node: str | None,
    timeout: str | None,
    config_file: str | None,
    **options: Any,
) -> None:
    """Submit COMMAND as a task, or many tasks from a file; prints their ids.

    Write -- before the command, so that its options are not taken for ours. It is run without a shell; for pipes and
    the like write: -- sh -c '…'. Its environment holds what --env says and little else.

    With --file, the other options are defaults for entries that do not say otherwise; docs/tasks.md tells the keys.

    \b
    Examples:
      spinetta submit -- sleep 10
      spinetta submit --follow --cpus 2 --memory 4GiB --time 1h -- samtools sort -@2 /data/a.bam -o /data/b.bam
      spinetta submit --wait --env HOME --workdir "$PWD" -- make test
      spinetta submit --image docker://registry.example/tools:1.2 --mount /data -- samtools flagstat /data/a.bam
      spinetta submit --file tasks.yaml --label run=7 --wait
      for i in 1 2 3; do echo "{\\"command\\": [\\"echo\\", \\"$i\\"]}"; done | spinetta submit --file - --format jsonl
    """
    from spinetta.client.specs import make_spec

    given = _given(options)
    if "owner" not in given and not is_somebody(node, timeout, config_file):
        given["owner"] = login_name()
    if file is None:
        if format_:
            raise UserError("--format is for --file", field="format", hint="name a file, or leave it away")
        if not command:
            raise UserError(
                "there is no command", field="command", hint="spinetta submit [options] -- COMMAND ARGUMENTS…"
            )
        specs = [make_spec(command, **given)]
    else:
        if command:
            raise UserError(
                "a command and --file are given",
                field="command",
                hint="the commands are in the file; give one of the two",
            )
        if "id" in given:
            raise UserError("--id and --file are given", field="id", hint="write ids into the file")
        from spinetta.cli.taskfile import read_specs

        specs = read_specs(file, format_, given)
    if follow and len(specs) > 1:
        raise UserError(
            f"--follow shows one task, not {len(specs)}", field="follow", hint="--wait, then spinetta log ID"
        )
    if dry_run:
        from spinetta.cli.show import spec_document

        output.put_json({"tasks": [spec_document(s) for s in specs]})
        return
    raise Finished(_submit(specs, wait, follow, as_json, (node, timeout, config_file)))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """What `make_spec` takes, without what was not given."""
    found: dict[str, Any] = {
        name: options[name]
        for name in (
            "name",
            "cpus",
            "memory",
            "disk",
            "gpu",
            "time",
            "workdir",
            "priority",
            "retries",
            "backoff",
            "grace",
            "losses_allowed",
            "image",
            "network",
            "user",
            "tmp",
            "keep_scratch",
            "open_files",
        )
        if options[name] is not None
    }
    if options["labels"]:
        found["labels"] = dict(pair(text, "label") for text in options["labels"])
    if options["env"]:
        found["env"] = dict(_variable(text) for text in options["env"])
    if options["countables"]:
        found["countables"] = ",".join(options["countables"])
    if options["clearance"]:
        found["clearance"] = [w.strip() for text in options["clearance"] for w in text.split(",") if w.strip()]
    if options["secrets"]:
        found["secrets"] = dict(_secret(text) for text in options["secrets"])
    for name in ("tags", "not_tags", "capabilities", "mounts"):
        if options[name]:
            found[name] = list(options[name])
    if options["no_restart"]:
        found["restart"] = False
    if options["overlap"]:
        found["overlap"] = True
    if options["writable"]:
        found["writable"] = True
    if options["task_id"] is not None:
        found["id"] = options["task_id"]
    if options["owner"] is not None:
        found["owner"] = options["owner"]
    return found


def pair(text: str, option: str) -> tuple[str, str]:
    """KEY=VALUE in two."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"not KEY=VALUE: {text!r}", field=option, hint=f"--{option} run=7")
    return key, value


def _secret(text: str) -> tuple[str, str]:
    name, _, file = text.partition("=")
    return name, file or name


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if equals:
        return name, value
    if name not in os.environ:
        raise UserError(
            f"environment variable {name!r} is not set here", field="env", hint=f"set it, or write --env {name}=VALUE"
        )
    return name, os.environ[name]


def login_name() -> str:
    """Who is asking; empty when the system does not know or the name is none that we take."""
    from spinetta.names import check_owner

    try:
        name = getpass.getuser()
        check_owner(name)
    except (OSError, KeyError, UserError):  # a user id without an entry, as in some containers
        return ""
    return name


def own_name(node: str | None, timeout: str | None, config_file: str | None) -> str:
    """Whose the tasks are that we submit: in a secured cluster the user's that it takes us for.

    Raises:
        UserError: nobody knows, and a filter without an owner would be everybody's tasks.
    """

    async def ask(client: AsyncClient) -> str:
        return (await client.admin.whoami()).name

    found = with_client(ask, node, timeout, config_file) if is_somebody(node, timeout, config_file) else login_name()
    if not found:
        raise UserError("this system does not know your login name", field="mine", hint="name one with --owner")
    return found


def _submit(
    specs: Sequence[TaskSpec], wait: bool, follow: bool, as_json: bool, where: tuple[str | None, str | None, str | None]
) -> int:
    submitted = False

    async def work(client: AsyncClient) -> int:
        nonlocal submitted
        done = await client.submit_many(specs)
        submitted = True
        if not (wait or follow):
            if as_json:
                output.put_json({"tasks": [{"id": s.id, "existed": s.existed} for s in done]})
            else:
                for s in done:
                    output.say(s.id)
            return exits.OK
        if follow:
            from spinetta.cli.log import follow_to_end

            info = await follow_to_end(client, done[0].id, as_json=as_json)
            if not as_json and info.task.outcome.name != "SUCCEEDED":
                _tell_end(info)
            return exit_code_of(info)
        from spinetta.cli.waiting import wait_for_end

        found = (await wait_for_end(client, [s.id for s in done], tells=not as_json)).tasks
        return _report(found, as_json=as_json)

    try:
        return with_client(work, *where)
    except KeyboardInterrupt:
        _tell_detached([s.id for s in specs], submitted=submitted)
        return exits.INTERRUPTED


def _report(found: Sequence[TaskInfo], *, as_json: bool) -> int:
    from spinetta.cli import show

    if as_json:
        output.put_json({"tasks": [show.task_document(i) for i in found], "timed_out": False})
    elif len(found) > 1:
        from spinetta.cli.tasks import task_table

        task_table(found)
    else:
        output.say(found[0].id)
        if not found[0].succeeded:
            _tell_end(found[0])
    if len(found) == 1:
        return exit_code_of(found[0])
    return exits.OK if all(i.succeeded for i in found) else exits.TASK_FAILED


def _tell_end(info: TaskInfo) -> None:
    from spinetta.cli import show

    message = f": {info.task.message}" if info.task.message else ""
    node = f" on {info.node}" if info.node else ""
    output.tell(f"task {info.id} {show.state_word(info)} ({show.exit_word(info)}){node}{message}")


def _tell_detached(ids: Sequence[str], *, submitted: bool) -> None:
    one = len(ids) == 1
    which = f"task {ids[0]}" if one else f"the {len(ids)} tasks"
    name = ids[0] if one else "ID…"
    if submitted:
        output.tell(f"\ndetached; {which} {'goes' if one else 'go'} on. To see: spinetta status {name}")
    else:
        output.tell(f"\ninterrupted; {which} may have been submitted. To see: spinetta status {name}")
    output.tell(f"To cancel: spinetta cancel {name}")


def exit_code_of(info: TaskInfo) -> int:
    """The code with which to end after one task; see `exits.HELP`."""
    from spinetta.cli.show import last_attempt
    from spinetta.model import Outcome, Reason

    t, last = info.task, last_attempt(info.task)
    if t.outcome is Outcome.SUCCEEDED:
        return exits.OK
    if t.reason == Reason.WALLTIME:
        return exits.WALLTIME
    if t.reason == Reason.SPAWN_FAILED:
        return exits.NOT_STARTED
    if t.reason == Reason.OUT_OF_MEMORY:
        return exits.SIGNAL_BASE + 9
    if t.reason == Reason.DISK_LIMIT:
        return exits.DISK_LIMIT
    if t.outcome is Outcome.FAILED and last is not None:
        if last.exit_code:
            return last.exit_code & 0xFF
        if last.signal:
            return exits.SIGNAL_BASE + last.signal
    return exits.ENDED_OTHERWISE
