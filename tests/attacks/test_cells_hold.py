"""What a container of ours can do, what it is given, and that neither images nor paths lead its making astray."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spinetta.container import Mount
from spinetta.ocirequest import Device, Hardening, Host, IdRange, paths_to_check
from tests.attacks.cells import FIRST_ID, PIDS, PYTHON, RUNC, SECRET, Yard, missing, numbers_of, yard

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "all is there")

AS_ROOT: dict[str, Any] = {"uid": 0, "gid": 0, "rules": Hardening(root_inside=True)}
ORDINARY = {
    "pipeline": "1000",
    "redirect": "ok",
    "threads": 8,
    "tcp": "hello",
    "unix": "hello",
    "shared memory": 3,
    "tmp": 2,
    "program in tmp": "ran",
    "terminal": 2,
    "random": 8,
    "fifo": None,
    "spawn": 0,
    "debugger": 0,
    "home": "/work",
    "secret": SECRET,
    "hosts": "127.0.0.1",
    "hostname": "task",
    "zombies": "reaped",
    "own signal": -signal.SIGTERM,
}


@pytest.fixture(scope="module")
def cells() -> Iterator[Yard]:
    with yard() as made:
        yield made


@pytest.mark.parametrize("changes", [{}, {"network": "host"}, {"writable": True}, AS_ROOT], ids=str)
def test_ordinary_programs_work(cells: Yard, changes: dict[str, Any]) -> None:
    assert cells.told("ordinary", arguments={"numbers": numbers_of("ptrace")}, **changes) == ORDINARY


def test_exit_codes_and_signals_come_through_the_init(cells: Yard) -> None:
    assert cells.run(["sh", "-c", "exit 7"]).code == 7
    assert cells.run(["sh", "-c", "kill -KILL $$"]).code == 128 + signal.SIGKILL
    assert cells.run(["no-such-program"]).code == 127


def test_a_fork_bomb_ends_at_the_limit_of_its_group(cells: Yard) -> None:
    bomb = (
        "import os, signal\n"
        "n = 0\n"
        "try:\n"
        "    while pid := os.fork():\n"
        "        n += 1\n"
        "    signal.pause()\n"
        "except OSError as error:\n"
        "    print(n, error.errno, flush=True)\n"
    )
    ended = cells.run([PYTHON, "-I", "-c", bomb])
    count, code = map(int, ended.out.split())
    assert code == 11
    assert PIDS - 5 <= count < PIDS


def test_tmp_has_a_size(cells: Yard) -> None:
    ended = cells.run(["dd", "if=/dev/zero", "of=/tmp/x", "bs=64k", "count=64"], tmp_bytes=1 << 20)
    assert ended.code != 0
    assert "No space left" in ended.err


# --- the program that makes containers ---------------------------------------------------------------------------


def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_the_runtime_cannot_be_overwritten_from_within(cells: Yard) -> None:
    assert RUNC
    before = digest(RUNC)
    # The runtime itself as the command, with libraries of the image.
    cells.run(["/proc/self/exe", "--version"], init_path="", **AS_ROOT)
    # And another one that comes in while somebody waits for it.
    lurker = """
import glob, json, os, sys
seen, opened = set(), []
print("ready", flush=True)
while not os.path.exists("/work/stop"):
    for exe in glob.glob("/proc/[0-9]*/exe"):
        try:
            name = os.readlink(exe)
            seen.add(name)
            if "python" not in name and "init" not in name and "busybox" not in name:
                opened.append(os.open(exe, os.O_WRONLY))
        except OSError:
            pass
print(json.dumps([sorted(seen), len(opened)]))
"""
    scratch = cells.folder_of("scratch", 0)
    with cells.started([PYTHON, "-I", "-c", lurker], scratch_path=scratch, **AS_ROOT) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        runc = [RUNC, "--root", str(cells.state)]
        key = json.loads(subprocess.run([*runc, "list", "--format", "json"], capture_output=True, check=True).stdout)
        for _ in range(5):
            subprocess.run([*runc, "exec", key[0]["id"], "/bin/true"], capture_output=True, check=True, timeout=60)
        Path(scratch, "stop").touch()
        out, err = process.communicate(timeout=60)
        seen, opened = json.loads(out)
    assert opened == 0, f"{seen} {err}"
    assert digest(RUNC) == before


@pytest.mark.parametrize("link", [False, True], ids=["given", "by a link of the image"])
def test_a_working_directory_that_is_an_open_file_of_the_runtime_leads_nowhere(cells: Yard, link: bool) -> None:
    key = cells.folder / "key-of-the-node"
    key.write_text("a private key")
    read = f"cat {'/'.join(['..'] * 20)}{key} ; ls -a"
    for number in range(3, 14):
        cwd = f"/proc/self/fd/{number}"
        if link:
            (cells.rootfs / f"link{number}").symlink_to(cwd)
            cwd = f"/link{number}"

        def change(config: dict[str, Any], cwd: str = cwd) -> None:
            config["process"]["cwd"] = cwd

        ended = cells.run(["sh", "-c", read], change=change)
        assert "a private key" not in ended.out
        assert not {"var", "boot", "home"} & set(ended.out.split()), "the root of the machine"


def test_variables_meant_for_the_runtime_or_the_init_do_nothing(cells: Yard) -> None:
    env = {
        "_LIBCONTAINER_INITPIPE": "0",
        "_LIBCONTAINER_FIFOFD": "1",
        "_LIBCONTAINER_LOGPIPE": "2",
        "_LIBCONTAINER_STATEDIR": "/work",
        "_LIBCONTAINER_INITTYPE": "setns",
        "LISTEN_FDS": "10",
        "NOTIFY_SOCKET": "/run/systemd/notify",
        "GODEBUG": "all=1",
        "GOTRACEBACK": "crash",
        "LD_PRELOAD": "/work/evil.so",
        "LD_LIBRARY_PATH": "/work",
        "TINI_SUBREAPER": "1",
        "HOME": "/proc/self/fd/7",
    }
    names = ("capabilities_it_has", "paths_of_the_host", "write_outside")
    told = cells.attack(*names, arguments={"host_files": ["/etc/shadow"], "numbers": {}}, env=env)
    assert told == {name: [] for name in names}


# --- images that lie -----------------------------------------------------------------------------------------------

MOUNT_POINTS = ("proc", "dev", "sys", "tmp", "work", "run/secrets/spinetta", "run", ".spinetta", "etc/hosts")


@pytest.mark.parametrize("upwards", [True, False], ids=["upwards", "absolute"])
def test_mount_points_that_are_links_lead_to_nothing_of_the_host(cells: Yard, upwards: bool) -> None:
    for i, point in enumerate(MOUNT_POINTS):
        name = f"{upwards}-{i}"
        bait = cells.folder / f"bait-{name}"
        bait.mkdir()
        bait.chmod(0o777)
        false = cells.folder / f"rootfs-{name}"
        shutil.copytree(cells.rootfs, false, symlinks=True)
        for path in (false, *false.rglob("*")):
            os.lchown(path, FIRST_ID, FIRST_ID)
        where = false / point
        shutil.rmtree(where) if where.is_dir() else where.unlink()
        where.symlink_to(f"{'../' * 12}{bait}" if upwards else bait)

        def change(config: dict[str, Any], false: Path = false) -> None:
            config["root"]["path"] = str(false)

        ended = cells.run(["sh", "-c", f"echo x > {bait}/out; touch /work/ok; echo {point}"], change=change)
        assert str(bait) not in Path("/proc/self/mountinfo").read_text()
        assert f"/{point}" in paths_to_check()
        if list(bait.iterdir()):
            # So it is with runc 1.1.5 and /dev, in which it makes links before it changes its root directory: why such
            # an image is refused before runc sees it.
            assert point == "dev", f"{point}: {ended}"
            assert {path.name for path in bait.iterdir()} <= {"fd", "stdin", "stdout", "stderr", "ptmx", "core"}
        shutil.rmtree(false)


# --- what is granted -----------------------------------------------------------------------------------------------


def test_a_device_is_there_only_when_it_was_granted(cells: Yard) -> None:
    if not Path("/dev/fuse").exists():
        pytest.skip("this machine has no /dev/fuse to grant")
    number = Path("/dev/fuse").stat().st_rdev
    path = cells.folder / "granted"  # its own node, since the machine's may be root's only
    os.mknod(path, stat.S_IFCHR | 0o600, number)
    path.chmod(0o666)
    device = Device(str(path), "c", os.major(number), os.minor(number))
    use = ["sh", "-c", f"exec 3<> {path} && echo opened"]
    assert cells.run(use).code != 0
    assert cells.run(use, devices=(device,)).out == "opened\n"

    def ungranted(config: dict[str, Any]) -> None:  # there, but the group of the container forbids it
        config["linux"]["resources"]["devices"] = [{"allow": False, "access": "rwm"}]

    assert cells.run(use, devices=(device,), change=ungranted).code != 0


def test_a_folder_to_be_read_is_not_written_to_nor_what_is_mounted_below_it(cells: Yard) -> None:
    data = cells.folder / "data"
    (data / "below").mkdir(parents=True)
    data.chmod(0o777)
    mounting = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
    mounting += ['mount -t tmpfs -o mode=777 none "$0" && echo deep > "$0/deep" && exec "$@"', str(data / "below")]
    (cells.rootfs / "data").mkdir()
    mounts = (Mount(str(data), "/data"),)
    write = ["sh", "-c", "cat /data/below/deep; echo x > /data/x; echo x > /data/below/x; true"]
    ended = cells.run(write, mounts=mounts, wrapper=mounting)
    assert ended.out == "deep\n"
    assert ended.err.count("Read-only file system") == 2
    # Where the runtime cannot do that, it is refused rather than half done.
    ended = cells.run(write, mounts=mounts, wrapper=mounting, host=Host(recursive_read_only=False))
    assert "deep" not in ended.out
    ended = cells.run(["sh", "-c", "echo x > /data/x"], mounts=(Mount(str(data), "/data", writable=True),))
    assert ended.code == 0, ended
    assert (data / "x").stat().st_uid == FIRST_ID + 1000


def test_a_network_that_was_made_for_it(cells: Yard) -> None:
    with subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo made && exec sleep 300"], stdout=subprocess.PIPE
    ) as made:
        assert made.stdout
        made.stdout.readline()
        path = f"/proc/{made.pid}/ns/net"
        try:
            ended = cells.run(["readlink", "/proc/self/ns/net"], network="bridge", netns_path=path)
            assert ended.out.strip() == str(Path(path).readlink()), ended
            names = ("capabilities_it_has", "write_outside", "write_to_the_kernel", "new_name_spaces")
            arguments = {"numbers": numbers_of("unshare", "clone")}
            told = cells.attack(*names, arguments=arguments, network="bridge", netns_path=path)
            assert told == {name: [] for name in names}
        finally:
            made.kill()


def test_a_capability_that_was_asked_for_is_had_by_an_ordinary_user(cells: Yard) -> None:
    ended = cells.run(["grep", "Cap", "/proc/self/status"], capabilities=("SYS_NICE",))
    assert {line.split()[1] for line in ended.out.splitlines()} == {f"{1 << 23:016x}"}
    assert cells.run(["nice", "-n", "-5", "true"]).err


def test_without_root_a_container_of_one_user(cells: Yard) -> None:
    user = 23456
    folder = cells.folder / "of-user"
    shutil.copytree(cells.rootfs, folder / "rootfs", symlinks=True)
    (folder / "scratch").mkdir()
    (folder / "secrets").mkdir()
    (folder / "secrets/token").write_text("x")
    for path in (folder, *folder.rglob("*")):
        os.lchown(path, user, user)

    def change(config: dict[str, Any]) -> None:
        config["root"]["path"] = str(folder / "rootfs")
        del config["linux"]["resources"], config["linux"]["cgroupsPath"]

    ids = (IdRange(0, user, 1),)
    ended = cells.run(
        ["sh", "-c", "id -u; echo x > /work/x; echo x > /etc/x; cat /proc/1/cmdline"],
        wrapper=("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"),
        owner=user,
        mounts=(),
        change=change,
        scratch_path=str(folder / "scratch"),
        secrets_path=str(folder / "secrets"),
        uids=ids,
        gids=ids,
        uid=0,
        gid=0,
        rules=Hardening(root_inside=True),
        host=Host(arch=os.uname().machine, rootless=True),
    )
    assert ended.out.startswith("0\n"), ended
    assert "/.spinetta/init" in ended.out
    assert (folder / "scratch/x").stat().st_uid == user
