"""The command line without a node: what it refuses, what it prints, how it ends."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from spinetta.cli import doctor, exits
from spinetta.cli.app import COMMANDS, root, run
from spinetta.cli.taskfile import read_specs
from spinetta.errors import RuntimeUnavailable, SpinettaError, StoreUnavailable, UserError
from tests.bad_input import CLI, FILES, Cli, File


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No settings of the machine's, no variables of the caller's, a directory of our own."""
    for name in list(os.environ):
        if name.startswith("SPINETTA_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("spinetta.cli.base.ETC_FILE", tmp_path / "etc.toml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def give(stdin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))


def name_of(case: Cli | File) -> str:
    return " ".join(case.argv)[:60] if isinstance(case, Cli) else case.message[:60]


def test_the_table_is_large_enough() -> None:
    assert len(CLI) + len(FILES) > 100


@pytest.mark.parametrize("case", [c for c in CLI if not c.online], ids=name_of)
def test_refused(
    case: Cli, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in case.files.items():
        (elsewhere / name).write_text(text)
    for name, value in case.env.items():
        monkeypatch.setenv(name, value)
    give(case.stdin, monkeypatch)
    code = run(case.argv)
    out, err = capsys.readouterr()
    assert case.message in err
    assert (code, out) == (case.code, "")
    assert "Traceback" not in err
    assert err.startswith("error: ")


@pytest.mark.parametrize("case", FILES, ids=name_of)
def test_task_files_refused(case: File, elsewhere: Path) -> None:
    path = elsewhere / f"tasks.{case.format_}"
    path.write_text(case.text)
    with pytest.raises(UserError) as caught:
        read_specs(str(path), None, {})
    assert str(caught.value).startswith(str(path))
    assert case.message in str(caught.value)
    assert caught.value.field == case.part
    assert caught.value.hint


def test_errors_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["submit", "--json", "--memory", "lots", "--", "true"]) == 2
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert (error["field"], error["reason"], error["exit_code"], err) == ("memory", "invalid", 2, "")
    assert error["message"] == "not a size: 'lots'"
    assert error["hint"].startswith("write a number with a unit")
    assert run(["list", "--json", "--nonsense"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["reason"] == "usage"


def test_json_of_the_tasks_own_command_is_not_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["submit", "--memory", "lots", "--", "aws", "--json", "--wait"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def dry(*argv: str) -> list[str]:
    return ["submit", "--dry-run", *argv]


def test_every_option_of_submit_arrives(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVEN", "from here")
    task_id = "01890a5d-ac96-774b-bcce-b302099a8057"
    assert run(dry(
        "--name", "n", "--label", "a=1", "--label", "b=x=y", "--cpus", "1.5", "--memory", "2GiB", "--disk", "1G",
        "--gpu", "2", "--countable", "fpga=1", "--time", "1h30m", "--tag", "ssd", "--not-tag", "old", "--env", "A=b",
        "--env", "GIVEN", "--workdir", "/tmp", "--priority", "-3", "--retries", "2", "--backoff", "5s", "--no-restart",
        "--grace", "30s", "--losses-allowed", "2", "--owner", "me", "--clearance", "phi", "--secret", "k=f",
        "--image", "docker://a.test/t:1", "--network", "host", "--writable", "--user", "7:8", "--cap-add", "CAP_KILL",
        "--cap-add", "CHOWN", "--mount", "/out/:/results:rw", "--mount", "/data", "--tmp", "1M", "--keep-scratch", "2h",
        "--open-files", "5000", "--id", task_id,
        "--", "echo", "--name", "--", "x",
    )) == 0  # fmt: skip
    [spec] = json.loads(capsys.readouterr().out)["tasks"]
    assert spec == {
        "id": task_id, "name": "n", "command": ["echo", "--name", "--", "x"], "labels": {"a": "1", "b": "x=y"},
        "env": {"A": "b", "GIVEN": "from here"}, "working_directory": "/tmp",
        "resources": {
            "cpu_millis": 1500, "memory_bytes": 2 << 30, "disk_bytes": 10**9, "countables": {"fpga": 1, "gpu": 2},
        },
        "walltime_s": 5400.0, "tags_required": ["ssd"], "tags_forbidden": ["old"], "priority": -3, "retries": 2,
        "retry_backoff_s": 5.0, "restart_on_node_failure": False, "owner": "me", "grace_s": 30.0,
        "clearance": ["phi"], "secrets": [{"name": "k", "file": "f"}], "sealed": False,
        "overlap": False, "losses_allowed": 2, "keep_scratch_s": 7200.0, "open_files_max": 5000,
        "container": {
            "image": "docker://a.test/t:1", "network": "host", "writable": True, "user": "7:8",
            "capabilities": ["CHOWN", "KILL"], "tmp_bytes": 10**6,
            "mounts": [
                {"source": "/data", "target": "/data", "writable": False},
                {"source": "/out", "target": "/results", "writable": True},
            ],
        },
    }  # fmt: skip


def test_overlap_arrives_and_excludes_a_grace(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(dry("--overlap", "--", "true")) == 0
    [spec] = json.loads(capsys.readouterr().out)["tasks"]
    assert (spec["overlap"], spec["losses_allowed"]) == (True, 5)
    assert run(dry("--overlap", "--grace", "1m", "--", "true")) == 2
    assert "leave one of the two away" in capsys.readouterr().err


def test_options_are_defaults_for_a_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    give('{"command": "echo a b", "cpus": 2, "labels": {"x": "1"}}\n{"command": ["b"]}\n', monkeypatch)
    assert run(dry("--file", "-", "--format", "jsonl", "--cpus", "1", "--label", "run=7", "--owner", "me")) == 0
    first, second = json.loads(capsys.readouterr().out)["tasks"]
    assert first["command"] == ["echo", "a", "b"]
    assert (first["resources"]["cpu_millis"], second["resources"]["cpu_millis"]) == (2000, 1000)
    assert (first["labels"], second["labels"]) == ({"run": "7", "x": "1"}, {"run": "7"})
    assert first["owner"] == second["owner"] == "me"
    assert first["id"] < second["id"]


def test_yaml_and_json_say_the_same(elsewhere: Path) -> None:
    entry = {
        "command": ["a", "b"],
        "memory": "1GiB",
        "time": 90,
        "tags": ["x"],
        "countables": {"gpu": 1},
        "restart": False,
    }
    (elsewhere / "t.json").write_text(json.dumps([entry]))
    (elsewhere / "t.yaml").write_text(
        "- command: [a, b]\n  memory: 1GiB\n  time: 90\n  tags: x\n  countables: {gpu: 1}\n  restart: no\n"
    )
    from dataclasses import replace

    [one], [two] = read_specs("t.json", None, {}), read_specs("t.yaml", None, {})
    assert replace(one, id=two.id) == two
    assert one.restart_on_node_failure is False


def test_help_of_every_command_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert run([name, "--help"]) == 0
        out = capsys.readouterr().out
        assert name in ("version", "config") or "Example" in out, name


def test_the_table_of_commands_tells_what_each_says_of_itself() -> None:
    import click

    with click.Context(root) as ctx:
        for name in COMMANDS:
            assert root.get_command(ctx, name) is not None


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    assert "_SPINETTA_COMPLETE" in capsys.readouterr().out


def test_completion_completes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spinetta.cli"],
        env={**os.environ, "_SPINETTA_COMPLETE": "bash_complete", "COMP_WORDS": "spinetta sub", "COMP_CWORD": "1"},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert "submit" in done.stdout


@pytest.mark.parametrize(
    ("begun", "names"),
    [("net", ["network"]), ("runtime,cg", ["runtime,cgroups"]), ("disk,disk", ["disk,disk-speed"]), ("x", [])],
)
def test_completion_of_checks(begun: str, names: list[str]) -> None:
    found = doctor.complete_checks(click.Context(doctor.doctor), doctor.doctor.params[0], begun)
    assert [item.value for item in found] == names


def test_config_show(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (elsewhere / "etc.toml").write_text('[node]\nmemory = "1GiB"\ntags = ["ssd"]\n[client]\nnode = "127.0.0.5:1"\n')
    monkeypatch.setenv("SPINETTA_CPUS", "2")
    monkeypatch.setenv("SPINETTA_MEMROY", "2")
    assert run(["config", "show", "--json", "--grace", "2m"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["node"]["memory_bytes"] == {
        "value": 1 << 30, "origin": "file", "from": f"{elsewhere}/etc.toml, [node] memory",
    }  # fmt: skip
    assert shown["node"]["cpu_millis"] == {"value": 2000, "origin": "environment", "from": "SPINETTA_CPUS"}
    assert shown["node"]["grace_s"] == {"value": 120.0, "origin": "flag", "from": "--grace"}
    assert shown["node"]["lease_ttl_s"] == {"value": 10, "origin": "default", "from": ""}
    assert shown["client"]["nodes"]["value"] == ["127.0.0.5:1"]
    assert shown["warnings"] == ["environment variable SPINETTA_MEMROY is no setting (did you mean SPINETTA_MEMORY?)"]
    assert run(["config", "show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["FOR", "SETTING", "VALUE", "FROM"]
    assert any(line.split() == ["node", "cpus", "2", "SPINETTA_CPUS"] for line in lines)


def test_own_file_before_the_machines(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (elsewhere / "etc.toml").write_text('[client]\ntimeout = "9s"\nnode = "127.0.0.5:1"\n')
    own = elsewhere / "config" / "spinetta" / "spinetta.toml"
    own.parent.mkdir(parents=True)
    own.write_text('[client]\ntimeout = "3s"\n')
    assert run(["config", "show", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["client"]["timeout_s"]["value"], shown["client"]["nodes"]["value"]) == (3.0, ["127.0.0.5:1"])


def test_decode(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import base64

    from spinetta import codec
    from spinetta.model import Holding, IncarnationId

    value = codec.encode_holding(Holding(2, IncarnationId("abc"), 60.0, True, "why"))
    key = b"/status/running/n1/01890a5d-ac96-774b-bcce-b302099a8057"
    wanted = {"attempt": 2, "incarnation": "abc", "grace_s": 60.0, "cancel_requested": True, "cancel_reason": "why"}

    def decoded(data: bytes, *options: str) -> str:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert run(["decode", *options]) == 0
        return capsys.readouterr().out

    assert json.loads(decoded(value, "--type", "running")) == wanted
    assert json.loads(decoded(value + b"\n", "--type", "running")) == wanted
    assert json.loads(decoded(key + b"\n" + value + b"\n")) == wanted
    assert json.loads(decoded(key + b"\n\n")) == {}
    kvs = [{"key": base64.b64encode(key).decode(), "value": base64.b64encode(value).decode()}] * 2
    lines = decoded(json.dumps({"header": {}, "kvs": kvs, "count": 2}).encode()).splitlines()
    assert [json.loads(line) for line in lines] == [{"key": key.decode(), "value": wanted}] * 2
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xff")))
    assert run(["decode", "--type", "task"]) == 2
    assert "the value of task cannot be read" in capsys.readouterr().err


def test_a_broken_pipe_is_quiet() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m spinetta.cli submit --help | true; echo ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "141")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from spinetta.cli.app import run; run(['--help']); run(['version']); "
        "heavy = ('grpc', 'rich', 'yaml', 'google.protobuf', 'asyncio', 'uuid6', 'psutil'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_other_peoples_text_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from spinetta.cli import output

    output.tell("a\x1b[2Jb\x07c\x1b[31mred\x1b[0m\x9b5m")
    assert capsys.readouterr().err == "a\\x1b[2Jb\\x07c\x1b[31mred\x1b[0m\\x9b5m\n"
    output.table(("A", "B"), [("x\x1b[2J", "y\nz"), ("日本", "w")], right=(0,))
    assert capsys.readouterr().out == "       A  B\nx\\x1b[2J  y\\x0az\n    日本  w\n"


def test_exit_codes_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["submit", "--help"]) == 0
    out = capsys.readouterr().out
    for code in (
        exits.OK,
        exits.NOT_FOUND,
        exits.UNAVAILABLE,
        exits.TIMED_OUT,
        exits.UNKNOWN,
        exits.OURS,
        exits.WALLTIME,
    ):
        assert f"  {code}  " in out


def test_ctrl_c_before_anything_is_loaded_is_no_traceback(tmp_path: Path) -> None:
    """The import of the command line takes a while on a busy machine; an interrupt that falls into it."""
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt\n")
    done = subprocess.run(
        [sys.executable, "-m", "spinetta.cli", "list"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (exits.INTERRUPTED, "", "")


def test_grpc_is_told_to_be_quiet_before_it_is_loaded() -> None:
    code = (
        "import os, sys; sys.argv = ['spinetta', 'version']\n"
        "from spinetta.cli import main\n"
        "try: main()\n"
        "finally: print(os.environ['GRPC_VERBOSITY'], 'grpc' in sys.modules)\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "GRPC_VERBOSITY"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "NONE False"


def test_every_command_that_asks_a_cluster_takes_credentials() -> None:
    import click

    def leaves(command: click.Command) -> list[click.Command]:
        if not isinstance(command, click.Group):
            return [command]
        with click.Context(command) as ctx:
            return [
                leaf
                for name in command.list_commands(ctx)
                if (found := command.get_command(ctx, name)) is not None
                for leaf in leaves(found)
            ]

    asking = [c for c in leaves(root) if "--node" in {o for p in c.params for o in p.opts}]
    assert len(asking) > 30
    assert [c.name for c in asking if "--credentials" not in {o for p in c.params for o in p.opts}] == []


def test_what_a_request_calls_a_field_is_not_shown_to_people(capsys: pytest.CaptureFixture[str]) -> None:
    from spinetta.cli.base import show_error

    show_error(UserError("the clocks are 4m apart", field="wall_ms"), as_json=False, code=2)
    show_error(UserError("too short", field="secrets[0].file"), as_json=False, code=2)
    assert capsys.readouterr().err == "error: the clocks are 4m apart\nerror: secrets[0].file: too short\n"


@pytest.mark.parametrize(
    ("address", "peers", "warned"),
    [
        ("127.0.0.1:7220", "10.0.0.5:7220", True),
        ("10.0.0.6:7220", "10.0.0.5:7220", False),
        ("127.0.0.1:7220", "127.0.0.2:7220", False),
        ("127.0.0.1:7220", "", False),
    ],
)
def test_a_node_that_nobody_could_reach_is_warned(
    address: str, peers: str, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    from spinetta.cli.node import resolved_node, warn_of_loopback

    warn_of_loopback(resolved_node({"address": address, **({"peers": peers} if peers else {})}, None))
    assert ("give --address" in capsys.readouterr().err) is warned


def test_mine_is_nobodys_when_the_system_knows_no_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be everybody's tasks otherwise."""
    monkeypatch.setenv("SPINETTA_CREDENTIALS", "none")
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "no name!")
    assert run(["cancel", "--all", "--mine", "--yes"]) == 2
    assert "does not know your login name" in capsys.readouterr().err


def test_ctrl_c_when_all_is_done_is_no_traceback() -> None:
    code = (
        "import sys, spinetta.cli.app as app\n"
        "class Out:\n"
        "    def __getattr__(self, name): return getattr(sys.__stdout__, name)\n"
        "    def flush(self):\n"
        "        sys.stdout = sys.__stdout__\n"
        "        raise KeyboardInterrupt\n"
        "app._call = lambda arguments: setattr(sys, 'stdout', Out())\n"
        "from spinetta.cli import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (exits.INTERRUPTED, "")


@pytest.mark.parametrize(
    ("error", "asks", "told"),
    [
        (StoreUnavailable("nothing answers"), True, True),
        (StoreUnavailable("nothing answers"), False, False),  # `node join` has --peers
        (RuntimeUnavailable("the shim could not be started"), True, False),
    ],
)
def test_other_nodes_are_named_to_who_asks_nodes(
    error: SpinettaError, asks: bool, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    from spinetta.cli.base import show_error

    show_error(error, as_json=False, code=exits.UNAVAILABLE, asks=asks)
    assert ("--node HOST:PORT" in capsys.readouterr().err) is told
