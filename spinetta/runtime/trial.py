"""Real trials of what containers need, in namespaces of their own: a program run by path, see `detect`.

Standard library only. It starts with one argument, what to try as JSON, and prints one JSON object, what came of it.
All that it mounts and starts is in a mount and a pid namespace whose first process dies with it, so that nothing stays
whatever kills it; control groups are removed by who started it.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

NEWNS, NEWUSER, NEWPID = 0x0002_0000, 0x1000_0000, 0x2000_0000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 2, 4, 8, 16384, 1 << 18
_PR_SET_PDEATHSIG = 1
_AT_FDCWD, _AT_EMPTY_PATH, _OPEN_TREE_CLONE, _O_CLOEXEC = -100, 0x1000, 1, 0o2000000
_SYS_OPEN_TREE, _SYS_MOUNT_SETATTR = 428, 442  # the same on all machines of today
_MOUNT_ATTR_IDMAP = 0x0010_0000

COMMAND_S = 20.0  # of the programs; each takes some hundredths of a second, and a hundred times that on a busy machine
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
INIT = "/.spinetta/init"
WORD = "version"  # what an init says with --version has it
SAID_BYTES_MAX = 300
ELSEWHERE = "it puts containers into groups other than those it is told, where limits do not hold:"

_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count(1)
Facts = dict[str, Any]


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def _mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    data = options.encode() if options else None
    done = _libc.mount(source.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), data)
    _check(done, f"mount {kind}")


def _die_with_parent() -> None:
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def _words(error: OSError) -> str:
    where = f" ({error.filename})" if isinstance(error.filename, str) else ""
    return f"{error.strerror or error}{where}"


# --- the namespaces ----------------------------------------------------------------------------------------------


def in_namespaces(want: Facts, mode: str) -> Facts:
    """Fork into new namespaces, try everything there, and return what was found out.

    `mode`: ``root``; ``range``: a user namespace with our user as root and its range of ids behind it; ``user``: with
    our user alone.
    """
    ready_r, ready_w = os.pipe()
    go_r, go_w = os.pipe()
    facts_r, facts_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        _outer(want, mode, ready_w, go_r, facts_w)
    for fd in (ready_w, go_r, facts_w):
        os.close(fd)
    mapped = ""
    try:
        said = os.read(ready_r, 4096).decode()
        if said == "ready":
            mapped = _map_ids(pid, want, mode)
            os.write(go_w, b"stop" if mapped else b"go")
        chunks = []
        while chunk := os.read(facts_r, 1 << 16):
            chunks.append(chunk)
    finally:
        for fd in (ready_r, go_w, facts_r):
            os.close(fd)
        os.waitpid(pid, 0)
    if said != "ready":
        return {"mode": mode, "refused": said or "the trial ended without a word"}
    if mapped:
        return {"mode": mode, "refused": mapped}
    try:
        return {"mode": mode, **json.loads(b"".join(chunks))}
    except ValueError:
        return {"mode": mode, "refused": "the trial ended without a word"}


def _outer(want: Facts, mode: str, ready: int, go: int, facts: int) -> NoReturn:
    try:
        _die_with_parent()
        try:
            _check(_libc.unshare(NEWNS | NEWPID | (0 if mode == "root" else NEWUSER)), "unshare")
        except OSError as error:
            os.write(ready, f"namespaces: {error.strerror}".encode())
            os._exit(1)
        os.write(ready, b"ready")
        if os.read(go, 16) != b"go":
            os._exit(1)
        if mode != "root":
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            _die_with_parent()  # forgotten when a process changes its ids
        inner = os.fork()
        if inner == 0:
            _inner(want, mode, facts)
        os.waitpid(inner, 0)
    finally:
        os._exit(0)


def _inner(want: Facts, mode: str, facts: int) -> NoReturn:
    """PID 1 of the new namespace: all that it leaves running dies with it."""
    found: Facts = {}
    try:
        _die_with_parent()
        try:
            _check(
                _libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None), "mount --make-rprivate /"
            )
            _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
            _mount("tmpfs", want["bundle"], "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=711,size=16m")
        except OSError as error:
            found["refused"] = _words(error)
        else:
            found["overlay"] = try_overlay(Path(want["work"], mode), want["bundle"])
            found["programs"] = [_try_program(want, mode, p) for p in want["programs"]]
    except Exception as error:  # noqa: BLE001 - told to who asked, in a process that ends here
        found["refused"] = f"{type(error).__name__}: {error}"
    finally:
        data = json.dumps(found).encode()
        while data:
            data = data[os.write(facts, data) :]
        os._exit(0)


def _map_ids(pid: int, want: Facts, mode: str) -> str:
    """Give a child's user namespace its ids; why not, or nothing."""
    uid, gid = os.geteuid(), os.getegid()
    if mode == "root":
        return ""
    if mode == "user":
        try:
            Path(f"/proc/{pid}/setgroups").write_text("deny")
            Path(f"/proc/{pid}/uid_map").write_text(f"0 {uid} 1")
            Path(f"/proc/{pid}/gid_map").write_text(f"0 {gid} 1")
        except OSError as error:
            return f"a map of ids: {_words(error)}"
        return ""
    for name, own, first in (("newuidmap", uid, want["uids"]), ("newgidmap", gid, want["gids"])):
        ids = [0, own, 1, 1, first, want["count"]]
        done = run([want[name], str(pid), *map(str, ids)])
        if done:
            return f"{name}: {done}"
    return ""


def run(argv: list[str], *, stdout: int = subprocess.DEVNULL) -> str:
    """Run a program; what it complained of when it failed, else nothing."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, env=ENVIRONMENT, timeout=COMMAND_S,
            check=False,
        )  # fmt: skip
    except OSError as error:
        return str(error.strerror)
    except subprocess.TimeoutExpired:
        return f"did not end within {COMMAND_S:g} s"
    if done.returncode == 0:
        return ""
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return said[-1][-SAID_BYTES_MAX:] if said else f"ended with {done.returncode}"


# --- overlay -----------------------------------------------------------------------------------------------------


def try_overlay(work: Path, mounted: str) -> dict[str, str]:
    """What is wrong with overlays over folders in `work`, read-only ones and writable ones; empty texts: nothing."""
    target = f"{mounted}/overlay"
    os.mkdir(target)  # noqa: PTH102 - as little of a start as there can be
    for name in ("a", "b", "upper", "index"):
        (work / name).mkdir(parents=True)
    (work / "a" / "from-a").write_text("a")
    (work / "b" / "from-b").write_text("b")
    a, b, upper, index = (work / name for name in ("a", "b", "upper", "index"))
    found = {}
    for name, options in (
        ("read_only", f"lowerdir={a}:{b}"),
        ("writable", f"lowerdir={a}:{b},upperdir={upper},workdir={index}"),
    ):
        found[name] = ""
        try:
            _mount("overlay", target, "overlay", _MS_NOSUID | _MS_NODEV, options)
        except OSError as error:
            found[name] = _words(error)
            continue
        try:
            names = set(os.listdir(target))  # noqa: PTH208 - only names
            if names != {"from-a", "from-b"}:
                found[name] = f"it shows {sorted(names)}"
            elif name == "writable":
                Path(target, "new").write_text("new")
                Path(target, "from-a").unlink()  # takes a whiteout in the upper layer
        except OSError as error:
            found[name] = _words(error)
        finally:
            _libc.umount2(os.fsencode(target), 2)
    return found


# --- a container -------------------------------------------------------------------------------------------------


def container_config(
    maps: list[list[int]], *, rootfs: str, user: int, group_path: str, group_maps: list[list[int]] | None = None
) -> Facts:
    """The smallest container there is: an init that runs itself and has nobody else around."""
    ids, group_ids = (
        [{"containerID": inside, "hostID": outside, "size": count} for inside, outside, count in each]
        for each in (maps, group_maps or maps)
    )
    kinds = ["user", "pid", "mount", "ipc", "uts", "network"]
    if os.path.exists("/proc/self/ns/cgroup"):  # noqa: PTH110
        kinds.append("cgroup")
    linux: Facts = {"namespaces": [{"type": kind} for kind in kinds], "uidMappings": ids, "gidMappings": group_ids}
    if group_path:
        linux["cgroupsPath"] = group_path
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": user, "gid": user},
            "args": [INIT, "-g", "--", INIT, "--version"],
            "env": ["PATH=/"],
            "cwd": "/",
            "noNewPrivileges": True,
        },
        "root": {"path": rootfs, "readonly": True},
        "hostname": "trial",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]},
        ],
        "linux": linux,
    }


def _try_program(want: Facts, mode: str, program: str) -> Facts:
    """Run one container with each init until one works; then whether it joins control groups as well."""
    found: Facts = {"program": program, "init": "", "problem": "there is no init to run", "groups": "", "seconds": 0.0}
    for init in want["inits"]:
        found["problem"] = ""
        begun_s = time.monotonic()
        problem = _try_container(want, mode, program, init, want["group_path"])
        found["seconds"] = round(time.monotonic() - begun_s, 4)
        if problem and want["group_path"] and not problem.startswith(ELSEWHERE):
            found["groups"] = problem
            problem = _try_container(want, mode, program, init, "")
        if not problem:
            found["init"] = init
            return found
        found["problem"] = problem
        if want["group_path"]:
            found["groups"] = ""
    return found


def _maps(want: Facts, mode: str, kind: str) -> list[list[int]]:
    if mode == "root":
        return [[0, want[kind], want["count"]]]
    return [[0, 1, want["count"]]] if mode == "range" else [[0, 0, 1]]


def _try_container(want: Facts, mode: str, program: str, init: str, group_path: str) -> str:
    bundle = Path(want["bundle"], str(next(_numbers)))
    rootfs, state, key = bundle / "rootfs", bundle / "state", f"{want['name']}-{bundle.name}"
    for folder in (rootfs / ".spinetta", rootfs / "proc", rootfs / "dev", state):
        folder.mkdir(parents=True)
    copied = rootfs / INIT.lstrip("/")
    try:
        copied.write_bytes(Path(init).read_bytes())
    except OSError as error:
        return f"{init}: {error.strerror}"
    copied.chmod(0o755)
    user = 0 if mode == "user" else 1000
    uids, gids = (_maps(want, mode, kind) for kind in ("uids", "gids"))
    config = container_config(uids, rootfs=str(rootfs), user=user, group_path=group_path, group_maps=gids)
    (bundle / "config.json").write_text(json.dumps(config))
    pid_file, said = bundle / "pid", bundle / "said"
    ours = [program, "--root", str(state)]
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # Its init keeps the runtime's outputs, so errors go to a file: a pipe would end with the container only.
        problem = _create([*ours, "create", "--bundle", str(bundle), "--pid-file", str(pid_file), key], out, bundle)
    finally:
        os.close(out)
    if problem:
        run([*ours, "delete", "--force", key])
        return f"create: {problem}"
    problem = _elsewhere(pid_file, Path(group_path).name, want["controllers"]) if group_path else ""
    if not problem:
        refused = run([*ours, "start", key])
        problem = f"start: {refused}" if refused else _ended_well(pid_file, said)
    removed = run([*ours, "delete", *(["--force"] if problem else []), key])
    return problem or (f"delete: {removed}" if removed else "")


def _create(argv: list[str], out: int, bundle: Path) -> str:
    errors = bundle / "errors"
    with errors.open("wb") as err:
        try:
            # Not /dev/null as input: crun 1.8 makes the user of the container its owner, on the machine.
            code = subprocess.run(
                argv, input=b"", stdout=out, stderr=err, env=ENVIRONMENT, timeout=COMMAND_S, check=False
            ).returncode
        except OSError as error:
            return str(error.strerror)
        except subprocess.TimeoutExpired:
            return f"did not end within {COMMAND_S:g} s"
    if code == 0:
        return ""
    lines = errors.read_text(errors="replace").strip().splitlines()
    return lines[-1][-SAID_BYTES_MAX:] if lines else f"ended with {code}"


def _elsewhere(pid_file: Path, name: str, controllers: list[str]) -> str:
    """Whether the container is in other groups than in ours of `name`; empty when it is not.

    crun takes a relative path for one from the top of each hierarchy of version 1, where no limit of ours holds.
    """
    try:
        texts = [Path(f"/proc/{who}/cgroup").read_text() for who in ("self", pid_file.read_text().strip())]
    except OSError as error:
        return f"its init is not there: {error.strerror}"
    ours, its = ({line.split(":", 2)[1]: line.split(":", 2)[2] for line in text.splitlines()} for text in texts)
    for names, path in its.items():
        if not names:  # version 2, where the path was absolute
            wrong = bool(controllers) and set(its) == {""} and not path.endswith(f"/{name}")
        else:
            wrong = not {*controllers}.isdisjoint(names.split(",")) and path != f"{ours[names].rstrip('/')}/{name}"
        if wrong:
            return f"{ELSEWHERE} {path} of {names or 'version 2'}"
    return ""


def _ended_well(pid_file: Path, said: Path) -> str:
    """Wait for the container's init, which is our child now; what is wrong with its end, or nothing."""
    try:
        pid = int(pid_file.read_text())
        fd = os.pidfd_open(pid)
    except ValueError:
        return "it did not say what its init is"
    except OSError as error:
        return f"its init is not there: {error.strerror}"
    try:
        if not select.select([fd], [], [], COMMAND_S)[0]:
            return f"it did not end within {COMMAND_S:g} s"
    finally:
        os.close(fd)
    try:
        _, status = os.waitpid(pid, 0)
    except ChildProcessError:
        return "its init is the child of somebody else"
    code = os.waitstatus_to_exitcode(status)
    if code:
        return f"its init ended with {code}"
    return "" if WORD in said.read_text(errors="replace") else "its init said nothing"


# --- mounts with other ids, and the whole ------------------------------------------------------------------------


def try_user_namespace() -> str:
    """Why there is no user namespace to be had; empty when there is."""
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(w, b"" if _libc.unshare(NEWUSER) == 0 else os.strerror(ctypes.get_errno()).encode())
        finally:
            os._exit(0)
    os.close(w)
    said = os.read(r, 4096).decode()
    os.close(r)
    os.waitpid(pid, 0)
    return said


def try_idmapped(work: str, first: int, count: int) -> str:
    """Why the file system of `work` cannot be mounted with other ids; empty when it can. Takes root."""
    ready_r, ready_w = os.pipe()
    stay_r, stay_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(stay_w)
            _die_with_parent()
            os.write(ready_w, b"y" if _libc.unshare(NEWUSER) == 0 else b"n")
            os.read(stay_r, 1)
        finally:
            os._exit(0)
    os.close(ready_w)
    os.close(stay_r)
    tree = spaces = -1
    try:
        if os.read(ready_r, 1) != b"y":
            return "no user namespace"
        Path(f"/proc/{pid}/uid_map").write_text(f"0 {first} {count}")
        Path(f"/proc/{pid}/gid_map").write_text(f"0 {first} {count}")
        spaces = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        flags = _OPEN_TREE_CLONE | _O_CLOEXEC
        tree = _check(
            _libc.syscall(ctypes.c_long(_SYS_OPEN_TREE), _AT_FDCWD, os.fsencode(work), ctypes.c_uint(flags)),
            "open_tree",
        )
        attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_IDMAP, 0, 0, spaces)
        _check(
            _libc.syscall(
                ctypes.c_long(_SYS_MOUNT_SETATTR), tree, b"", _AT_EMPTY_PATH, attributes, ctypes.c_size_t(32)
            ),
            "mount_setattr",
        )
    except OSError as error:
        return _words(error)
    finally:
        for fd in (tree, spaces, ready_r, stay_w):
            if fd >= 0:
                os.close(fd)
        os.waitpid(pid, 0)
    return ""


def main(arguments: list[str]) -> int:
    """Try what the one argument asks for."""
    want: Facts = json.loads(arguments[0])
    _die_with_parent()
    found: Facts = {"user_namespace": try_user_namespace(), "idmapped": None, "tried": []}
    if os.geteuid() == 0:
        found["idmapped"] = try_idmapped(want["work"], want["uids"], want["count"])
    for mode in want["modes"]:
        tried = in_namespaces(want, mode)
        found["tried"].append(tried)
        if any(p["problem"] == "" for p in tried.get("programs", ())):
            break
    sys.stdout.write(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
