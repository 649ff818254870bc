"""`spinetta doctor` on this machine as it is, and as it would be with less: its findings are what was really seen."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spinetta.checkup import Finding, Level
from spinetta.cli import exits
from spinetta.cli.app import run
from spinetta.config import Settings
from spinetta.node.doctor.examine import CHECKS, Patient, examine
from tests.cluster.harness import eventually, free_base
from tests.contract.machines import UID, machine

pytestmark = pytest.mark.contract

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to mount or to be other users")
COMMAND = [sys.executable, "-m", "spinetta.cli", "doctor"]
LIMIT_S = 90.0


def environment(**changes: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SPINETTA_")}
    return {**clean, "XDG_CONFIG_HOME": "/nonexistent", **changes}


def doctor(*arguments: str, env: Mapping[str, str] | None = None, before: Sequence[str] = ()) -> tuple[int, Any]:
    """Exit code and document. `before`: commands in a mount namespace of its own."""
    argv: list[str] = [*COMMAND, "--json", *arguments]
    if before:
        argv = ["unshare", "--mount", "sh", "-c", " && ".join([*before, 'exec "$@"']), "sh", *argv]
    done = subprocess.run(
        argv, env=env or environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S,
        check=False,
    )  # fmt: skip
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def of(document: Any, check: str) -> list[Any]:
    return [f for f in document["findings"] if f["check"] == check]


def test_everything_is_looked_at_and_nothing_stays(tmp_path: Path) -> None:
    data_dir, address = tmp_path / "data", f"{free_base(1)}1:7220"
    data_dir.mkdir(mode=0o700)
    code, found = doctor("--data-dir", str(data_dir), "--address", address, env=environment(TMPDIR=str(tmp_path)))
    assert list(dict.fromkeys(f["check"] for f in found["findings"])) == list(CHECKS)
    assert code == (exits.TASK_FAILED if found["worst"] == "problem" else exits.OK)
    assert list(tmp_path.iterdir()) == [data_dir]
    assert list(data_dir.iterdir()) == []
    for finding in found["findings"]:
        assert finding["seen"]
        if finding["level"] in ("warning", "problem"):
            assert finding["weakens"], finding
            assert finding["mend"], finding
    said = subprocess.run(["etcd", "--version"], capture_output=True, text=True, check=True).stdout
    [etcd, *_] = of(found, "etcd")
    assert said.split()[2] in etcd["seen"]
    assert [f["seen"] for f in of(found, "ports")] == [
        f"{address} is free for the API", f"{address[:-1]}1 is free for etcd's clients",
        f"{address[:-1]}2 is free for etcd's peers",
    ]  # fmt: skip
    assert "none has been on" in of(found, "node")[0]["seen"]
    [speed] = of(found, "disk-speed")
    assert "a write of 2 KiB lasts after" in speed["seen"]


def path_of(folder: Path, *programs: str) -> str:
    """A PATH with some of this machine's programs only."""
    folder.mkdir()
    for program in programs:
        found = shutil.which(program)
        assert found is not None
        (folder / program).symlink_to(found)
    return str(folder)


def test_programs_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", path_of(tmp_path / "bin", "umoci"))
    settings = Settings("n1", "127.0.0.1:7220", str(tmp_path))
    etcd, runtime, skopeo, umoci = examined(settings, "etcd", "runtime", "images")
    assert (etcd.level, etcd.seen) == (Level.PROBLEM, "there is no program 'etcd'")
    assert "apt install etcd-server" in etcd.mend
    assert (runtime.level, runtime.mend) == (Level.WARNING, "apt install runc (or crun)")
    assert (skopeo.level, skopeo.mend, umoci.level) == (Level.WARNING, "apt install skopeo", Level.OK)


def test_a_command_line_with_no_programs_at_all(tmp_path: Path) -> None:
    """A node that is no candidate needs no etcd, and one without containers none of their programs."""
    only = ("--only", "etcd,runtime,images,python", "--data-dir", str(tmp_path))
    code, found = doctor(*only, "--candidate", "no", "--runtimes", "process", env=environment(PATH="/nonexistent"))
    assert (code, found["worst"]) == (exits.OK, "note")
    assert of(found, "python")[0]["level"] == "ok"


def test_a_node_for_containers_alone_is_nothing_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    settings = Settings("n1", "127.0.0.1:7220", str(tmp_path), runtimes=("container",))
    assert [f.level for f in examined(settings, "runtime")] == [Level.PROBLEM]
    assert [f.level for f in examined(replace(settings, runtimes=("process",)), "runtime")] == [Level.NOTE]


def examined(settings: Settings, *only: str) -> list[Finding]:
    async def all_of_them() -> list[Finding]:
        return [f async for f in examine(Patient(settings), only, lambda _: None)]

    return asyncio.run(all_of_them())


@pytest.mark.parametrize(
    ("text", "level", "said"),
    [
        ("echo etcd Version: 3.5.1", "problem", "etcd 3.5.1 corrupts data when it is killed"),
        ("echo etcd Version: 3.4.20", "problem", "etcd 3.4.20 is too old"),
        ("echo etcd Version: 3.5.33", "ok", "etcd 3.5.33 ("),
        ("echo etcd Version: 3.6.13", "warning", "etcd 3.6.13 ("),
        ("echo hello", "problem", "this is not etcd"),
        ("exit 3", "problem", "ended with 3"),
    ],
)
def test_versions_of_etcd(tmp_path: Path, text: str, level: str, said: str) -> None:
    program = tmp_path / "etcd"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    settings = Settings("n1", "127.0.0.1:7220", str(tmp_path), etcd_program=str(program))
    [etcd] = examined(settings, "etcd")
    assert etcd.level.word == level
    assert said in etcd.seen


def test_a_port_that_somebody_has(tmp_path: Path) -> None:
    base = free_base(1)
    with socket.create_server((f"{base}1", 7221)):
        api, client, peer = examined(Settings("n1", f"{base}1:7220", str(tmp_path)), "ports")
    assert (api.level, client.level, peer.level) == (Level.OK, Level.PROBLEM, Level.OK)
    assert f"(process {os.getpid()})" in client.seen
    elsewhere, *_ = examined(Settings("n1", "203.0.113.7:7220", str(tmp_path)), "ports")
    assert elsewhere.level is Level.PROBLEM
    assert "no address of this machine" in elsewhere.seen


@ROOT
def test_file_systems_that_do_not_serve(tmp_path: Path) -> None:
    only = ("--data-dir", str(tmp_path), "--only", "data-dir,disk,disk-speed,overlay")
    code, found = doctor(*only, before=[f"mount -t tmpfs -o ro none {tmp_path}"])
    assert code == exits.TASK_FAILED
    assert "Read-only file system" in of(found, "data-dir")[0]["seen"]
    assert "mounted read-only" in of(found, "disk")[0]["seen"]
    assert of(found, "disk-speed")[0]["level"] == "warning"
    code, found = doctor(*only, before=[f"mount -t tmpfs -o noexec,size=64m none {tmp_path}"])
    assert [f["level"] for f in of(found, "data-dir")] == ["problem", "warning"]  # a tmpfs is everybody's
    assert "chmod go-w" in of(found, "data-dir")[0]["mend"]
    assert "mount -o remount,exec" in of(found, "data-dir")[1]["mend"]
    assert of(found, "disk")[0]["level"] == "problem"
    assert "tmpfs: that is memory" in of(found, "disk-speed")[0]["seen"]


@ROOT
def test_a_user_without_rights() -> None:
    with machine(uid=UID) as here:
        command = ("/usr/bin/python3", "-m", "spinetta.cli", "doctor", "--json")
        checks = "runtime,namespaces,ids,cgroups,data-dir,ports,node"
        address = f"{free_base(1)}1:7220"
        done = here.run(*command, "--only", checks, "--data-dir", f"{here.home}/data", "--address", address)
        if "ModuleNotFoundError" in done.stderr:
            pytest.skip("another user cannot read the packages of this Python")
        assert done.stderr == ""
        found = json.loads(done.stdout)
        assert done.returncode == exits.OK
        assert of(found, "runtime")[0]["level"] == "ok"
        assert "ran a container without root" in of(found, "runtime")[0]["seen"]
        assert of(found, "ids")[0]["level"] == "warning"
        [cgroups] = of(found, "cgroups")
        assert "limits of cpu, memory, pids are not enforced" in cgroups["weakens"]
        assert "walltime" in cgroups["weakens"], "what holds all the same is told as well"
        assert any("pid namespace" in f["seen"] for f in of(found, "namespaces"))
        (here.home / "roots").mkdir(mode=0o700)
        done = here.run(*command, "--only", "data-dir,node,disk", "--data-dir", f"{here.home}/roots/n1")
        found = json.loads(done.stdout)
        assert (done.returncode, done.stderr) == (exits.TASK_FAILED, "")
        assert "cannot be written to: Permission denied" in of(found, "data-dir")[0]["seen"]


def test_names_of_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--only", "dsik"]) == exits.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert "there is no check 'dsik'" in err
    assert "did you mean 'disk'?" in err
    assert run(["doctor", "--only", "list"]) == exits.OK
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == list(CHECKS)


def test_ctrl_c_on_a_terminal(tmp_path: Path) -> None:
    """While the disk is measured: it ends at once, says nothing ugly and takes its file along."""
    main, terminal = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "--only", "swap,disk-speed", "--data-dir", str(tmp_path)],
        env=environment(TERM="xterm", COLUMNS="80"), stdin=terminal, stdout=terminal, stderr=terminal,
    ) as process:  # fmt: skip
        os.close(terminal)
        eventually(lambda: list(tmp_path.iterdir()), within_s=60, what="the disk is being measured")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == exits.INTERRUPTED
    shown = b""
    try:
        while chunk := os.read(main, 4096):
            shown += chunk
    except OSError:
        pass  # how a terminal says that nobody writes to it any more
    os.close(main)
    assert b"Traceback" not in shown
    assert "looking at how long a small write takes to last" in shown.decode()
    assert list(tmp_path.iterdir()) == []
