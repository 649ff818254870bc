"""Commands about trust without a node: what they refuse before anything is sent, and the audit log on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from spinetta import tokens
from spinetta.access import TokenRole, UserRole
from spinetta.cli import exits
from spinetta.cli.app import COMMANDS, root, run
from spinetta.cli.base import show_error
from spinetta.cli.trust import _mapping
from spinetta.cli.who import labels, words
from spinetta.config import DEFAULT_ADDRESS
from spinetta.errors import Denied, StoreUnavailable, UserError
from spinetta.trust.audit import open_log

TOKEN = tokens.format(tokens.create(TokenRole.CLIENT, bytes(32), bytes(tokens.CHANCE_BYTES)))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No settings of the machine's, no variables of the caller's, a directory of our own, nobody to ask."""
    for name in list(os.environ):
        if name.startswith("SPINETTA_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("spinetta.cli.base.ETC_FILE", tmp_path / "etc.toml")
    monkeypatch.chdir(tmp_path)
    with Path(os.devnull).open() as nobody:
        monkeypatch.setattr("sys.stdin", nobody)
        yield tmp_path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("token create --role king", "'king' is not one of 'voter', 'worker', 'client'"),
        ("token create", "Missing option '--role'"),
        ("token create --role client", "a client token is for one user"),
        ("token create --role client --user a --clearance phi", "are for nodes"),
        ("token create --role worker --user a", "--user is for client tokens"),
        ("token create --role worker --ttl soon", "not a duration: 'soon'"),
        ("token create --role worker --ttl 0", "good for no time"),
        ("token create --role worker --uses 0", "0 is not in the range"),
        ("token create --role worker --clearance PHI", "not a clearance label: 'PHI'"),
        ("token revoke spinetta1_client_x_y", "join token"),
        ("login --token x --token-file y", "more than one token is given"),
        ("login --bearer-file x --token y", "more than one token is given"),
        ("login --keep-bearer", "--keep-bearer is for a --bearer-file"),
        ("login --bearer-file - --keep-bearer", "--keep-bearer is for a --bearer-file"),
        ("login", "there is no token"),
        ("login --token-file absent", "there is no file absent"),
        ("login --token hello", "not a join token"),
        ("login --bearer-file absent", "/absent"),
        ("login --bearer-file /dev/null", "holds no bearer token"),
        ("login --node 127.0.0.1:0 --token x", "not a port"),
        ("user add", "Missing argument 'NAME'"),
        ("user add ann --role king", "'king' is not one of"),
        ("user add a/b", "not a name for a user: 'a/b'"),
        ("user add ann --clearance a,b,C", "not a clearance label: 'C'"),
        ("user add ann --tasks-per-s -1", "-1.0 is not in the range"),
        ("user revoke ann", "Nobody is here to say so"),
        ("user remove ann --json", ""),
        ("user revoke-certificates ann", "--yes"),
        ("node approve N9", "not a name for a node"),
        ("node revoke n9", "Nobody is here to say so"),
        ("node grant n9", "nothing is granted"),
        ("node withdraw n9", "nothing is withdrawn"),
        ("node grant n9 --clearance ''", "nothing is granted"),
        ("group set g", "Missing option '--clearance'"),
        ("policy issuer add ftp://x --audience a --prefix p- --map a=user", "begins with https://"),
        ("policy issuer add https://x --audience a --prefix p- --map a", "not GROUP=ROLE: 'a'"),
        ("policy issuer add https://x --audience a --prefix p- --map a=king", "not GROUP=ROLE"),
        ("policy issuer add https://x --audience a --prefix p- --map a=user::PHI", "not a clearance label"),
        ("policy issuer add https://x --audience a --prefix p- --map a=user --ca-file absent", "absent cannot be read"),
        ("policy issuer add https://x --audience a --prefix p- --map a=user --ca-file /dev/null", "no certificate"),
        ("cluster rotate-ca --kind mine", "'mine' is not one of"),
        ("cluster rotate-ca --overlap 1d --retire-now", "give one of the two"),
        ("cluster rotate-ca --retire-now", "Nobody is here to say so"),
        ("cluster rotate-ca --yes", "--yes is for --retire-now"),
        ("secret set s3", "the secret is empty"),
        ("secret set s3 --file absent", "there is no file absent"),
        ("secret set s3 --file /dev/zero", "more than 64 KiB"),
        ("secret set s3 hello", "Got unexpected extra argument (hello)"),
        ("secret remove s3", "Nobody is here to say so"),
        ("submit --clearance PHI -- true", "not a clearance label: 'PHI'"),
        ("submit --secret a/b -- true", "not a name for a secret"),
        ("submit --secret a=../b -- true", "not a name for"),
        ("list --bearer-file absent", "does not tell which authorities to believe"),
        ("audit show --since x", "not a duration"),
        ("audit show --call cancle", "there is no call 'cancle' (one of status, payload,"),
        ("audit verify --head 1:abc", "not NUMBER:HASH"),
    ],
)
def test_refused(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [word if word != "''" else "" for word in line.split(" ")]
    assert run(argv) == exits.USAGE
    out, err = capsys.readouterr()
    if "--json" in argv:
        assert json.loads(out)["error"]["hint"] == "add --yes"
        return
    assert err.startswith("error: ")
    assert message in err
    assert (out, "Traceback" in err) == ("", False)


def test_missing_credentials_are_a_matter_of_logging_in(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "--credentials", "absent.pem"]) == exits.UNAUTHENTICATED
    assert "spinetta login" in capsys.readouterr().err
    assert run(["list", "--node", "10.0.0.1:7220"]) == exits.UNAUTHENTICATED
    err = capsys.readouterr().err
    assert err.startswith("error: you have no credentials for the cluster at '10.0.0.1:7220'")
    assert "spinetta login --node 10.0.0.1:7220" in err
    assert run(["logout"]) == exits.NOT_FOUND


def test_who_has_said_nothing_is_told_of_logging_in(capsys: pytest.CaptureFixture[str]) -> None:
    for address, says in ((DEFAULT_ADDRESS, True), ("127.0.0.9:1", False)):
        show_error(StoreUnavailable(f"no node answers at {address}"), as_json=False, code=exits.UNAVAILABLE)
        err = capsys.readouterr().err
        assert "Is a node running here?" in err
        assert ("for a cluster elsewhere: spinetta login" in err) == says


def test_no_secret_in_what_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for spoiled in (TOKEN[:-3], TOKEN[:-1] + "7", TOKEN.replace("client", "worker"), TOKEN + "x"):
        for argv in (["login", "--token", spoiled], ["login", "--token", spoiled, "--json"]):
            assert run(argv) == exits.USAGE
            out, err = capsys.readouterr()
            assert not any(part in out + err for part in TOKEN.split("_")[2:])


def test_exit_codes_of_refusals() -> None:
    assert exits.code_of(Denied("no")) == exits.DENIED == 7
    assert exits.code_of(Denied("who?", reason="unauthenticated")) == exits.UNAUTHENTICATED == 8
    assert (exits.word_of(Denied("no")), exits.word_of(Denied("who?", reason="unauthenticated"))) == (
        "denied", "unauthenticated",
    )  # fmt: skip


def every_command(group: click.Group, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    found: list[tuple[tuple[str, ...], click.Command]] = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found.append(((*path, name), command))
        if isinstance(command, click.Group):
            found += every_command(command, (*path, name))
    return found


def test_every_command_has_help_and_every_option_its_line() -> None:
    assert isinstance(root, click.Group)
    for path, command in every_command(root, ()):
        assert command.help, path
        for parameter in command.params:
            if isinstance(parameter, click.Option) and path[-1] != "rotate-ca":
                assert parameter.help, (path, parameter.name)
    for name in ("login", "whoami", "secret", "token", "user", "group", "policy", "cluster", "audit"):
        assert name in COMMANDS


def test_words_and_labels() -> None:
    assert words(["b,a", "", "a", " c "]) == ("a", "b", "c")
    assert labels([""]) == ()
    with pytest.raises(UserError) as caught:
        labels(["phi,No"])
    assert caught.value.field == "clearance"


def test_mappings_of_groups() -> None:
    m = _mapping("/ops=a=operator:p1,p2:eu,phi")
    assert (m.group, m.role, m.projects, m.clearances) == ("/ops=a", UserRole.OPERATOR, ("p1", "p2"), ("eu", "phi"))
    m = _mapping("staff=viewer")
    assert (m.group, m.role, m.projects, m.clearances) == ("staff", UserRole.VIEWER, (), ())


def test_a_submit_takes_labels_and_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["submit", "--dry-run", "-c", "phi,eu", "--secret", "key", "--secret", "pw=pgpass", "--", "true"]
    assert run(argv) == 0
    [spec] = json.loads(capsys.readouterr().out)["tasks"]
    assert spec["clearance"] == ["eu", "phi"]
    assert spec["secrets"] == [{"name": "key", "file": "key"}, {"name": "pw", "file": "pgpass"}]


# --- the audit log ------------------------------------------------------------------------------------------------


@pytest.fixture
def log_dir(tmp_path: Path) -> Path:
    log = open_log(tmp_path / "audit", "n1")
    log.record("submit", "user ann", "task 1", "ok", 7)
    log.record("cancel", "user bob", "task 1", "denied: user bob may not cancel tasks of ann's")
    log.record("tokens", "user ann", "token x", "ok", 9, "made\x1b[31m")
    log.close()
    return tmp_path


def test_audit_show(log_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*options: str) -> list[str]:
        assert run(["audit", "show", "--data-dir", str(log_dir), *options]) == 0
        return capsys.readouterr().out.splitlines()

    assert len(shown()) == 4
    assert "made\\x1b[31m" in shown()[-1]  # an object's name moves no cursor
    assert len(shown("--identity", "ann")) == len(shown("--identity", "user ann")) == 3
    assert len(shown("--call", "cancel")) == len(shown("--refused")) == 2
    assert len(shown("--since", "1h")) == 4
    header, _, refused, last = shown()
    assert refused[header.index("OUTCOME") :].startswith("denied   ")
    assert refused[header.index("WHAT") :] == "task 1 (user bob may not cancel tasks of ann's)"
    assert last[header.index("WHAT") :].startswith("token x")
    lines = [json.loads(line) for line in shown("--json")]
    assert [(e["seq"], e["revision"]) for e in lines] == [(1, 7), (2, 0), (3, 9)]


def test_audit_verify(log_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["audit", "verify", "--data-dir", str(log_dir)]
    assert run([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["whole"], found["entries"], found["head"]["number"]) == (True, 3, 3)
    head = f"3:{found['head']['hash']}"
    assert run([*argv, "--head", head]) == 0
    assert f"head {head}" in capsys.readouterr().out
    [file] = (log_dir / "audit").glob("*.jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"bob", b"eve"))
    assert run(argv) == 1
    assert "altered" in capsys.readouterr().err
    file.write_bytes(b"\n".join(whole.split(b"\n")[:2]) + b"\n")
    assert run(argv) == 0
    capsys.readouterr()
    assert run([*argv, "--head", head]) == 1
    assert "cut off" in capsys.readouterr().err
    assert run([*argv, "--head", f"9999:{'0' * 64}"]) == 1
    assert "line 9999 of a given head is not there, the last one is 2" in capsys.readouterr().err


def test_no_audit_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("show", "verify"):
        assert run(["audit", command, "--data-dir", str(tmp_path)]) == exits.USAGE
        out, err = capsys.readouterr()
        assert (out, "there is no audit log" in err) == ("", True)


def test_audit_follow(log_dir: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "spinetta.cli", "audit", "show", "-f", "--json", "--data-dir", str(log_dir)],
        stdout=subprocess.PIPE,
    )
    limit = threading.Timer(30, process.kill)
    limit.start()
    try:
        assert process.stdout is not None
        assert [json.loads(process.stdout.readline())["seq"] for _ in range(3)] == [1, 2, 3]
        log = open_log(log_dir / "audit", "n1", file_bytes_max=1)  # each line begins a new file
        for n in range(2):
            log.record("submit", "user ann", f"more {n}", "ok")
        log.close()
        found = [json.loads(process.stdout.readline()) for _ in range(2)]
        assert [(e["seq"], e["object"]) for e in found] == [(4, "more 0"), (5, "more 1")]
    finally:
        limit.cancel()
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_completion_of_names_is_quiet_without_a_cluster(elsewhere: Path) -> None:
    started_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "spinetta.cli"],
        env={
            **os.environ,
            "_SPINETTA_COMPLETE": "bash_complete",
            "COMP_WORDS": "spinetta user set ",
            "COMP_CWORD": "3",
        },
        capture_output=True,
        check=False,
        timeout=30,
    )
    assert (done.stdout.strip(), done.stderr) == (b"", b"")
    assert time.monotonic() - started_s < 15
