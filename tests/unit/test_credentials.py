"""Credentials on disk: they change as one, survive any crash, and nobody else may read them."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from spinetta.access import NodeRole
from spinetta.errors import UserError
from spinetta.trust import certificates as c
from spinetta.trust import generations, sealing
from spinetta.trust.credentials import EtcdPems, NodeCredentials, PendingKeys, UserCredentials
from tests.unit.trust_world import CLUSTER, OTHER, World

NOW_S = 1_800_000_000.0
WORLD = World(NOW_S)
ETCD = c.create_authority("etcd", CLUSTER, now_s=NOW_S)
NODE, USER = WORLD.node(), WORLD.user()
PRIVATE = sealing.new_sealing_key()


def etcd_pems(name: str = "n1") -> EtcdPems:
    key = c.new_key()
    pem = c.issue_etcd(ETCD, c.csr(key, name), name=name, address="127.0.0.1", now_s=NOW_S, lifetime_s=3600)
    return EtcdPems(ETCD.certificate_pem, pem, c.key_pem(key))


ETCD_PEMS = etcd_pems()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "data" / "trust"


def create(directory: Path, **other: Any) -> NodeCredentials:
    parts: dict[str, Any] = {
        "ca_pem": WORLD.ca,
        "node_pem": NODE[0],
        "node_key_pem": NODE[1],
        "sealing_private": PRIVATE,
        "etcd": ETCD_PEMS,
    }
    return NodeCredentials.create(directory, **(parts | other))


def load(directory: Path) -> NodeCredentials:
    found = NodeCredentials.load(directory)
    assert found is not None
    return found


def contents(credentials: NodeCredentials) -> tuple[Any, ...]:
    return (*credentials.pems(), credentials.sealing_private, credentials.etcd_pems)


def modes(directory: Path) -> set[int]:
    return {stat.S_IMODE(p.stat().st_mode) for p in directory.rglob("*") if p.is_file()}


# --- nodes


def test_a_node_without_credentials_is_of_an_open_cluster(directory: Path) -> None:
    assert NodeCredentials.load(directory) is None
    directory.mkdir(parents=True)
    assert NodeCredentials.load(directory) is None
    (directory / "founding.json").write_text("{}")
    assert NodeCredentials.load(directory) is None


def test_credentials_are_as_they_were_saved(directory: Path) -> None:
    made, found = create(directory), load(directory)
    assert contents(made) == contents(found) == (WORLD.ca, *NODE, PRIVATE, ETCD_PEMS)
    assert (found.name, found.cluster, found.role, found.serial) == ("n1", CLUSTER, NodeRole.VOTER, 1)
    assert found.etcd is not None
    assert found.etcd.key.read_bytes() == ETCD_PEMS.key_pem
    assert found.etcd.ca.read_bytes() == ETCD.certificate_pem


def test_a_worker_has_nothing_of_etcds(directory: Path) -> None:
    worker = WORLD.node("w1", NodeRole.WORKER)
    create(directory, node_pem=worker[0], node_key_pem=worker[1], etcd=None)
    found = load(directory)
    assert (found.role, found.etcd, found.etcd_pems) == (NodeRole.WORKER, None, None)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_only_the_owner_may_read_them(directory: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        create(directory).update(etcd=etcd_pems())
        PendingKeys.load_or_create(directory)
    finally:
        os.umask(before)
    assert modes(directory) == {0o600}
    assert {stat.S_IMODE(d.stat().st_mode) for d in (directory, *directory.iterdir()) if d.is_dir()} == {0o700}


def test_an_update_is_seen_here_and_on_disk(directory: Path) -> None:
    credentials = create(directory)
    renewed, bundle = WORLD.node(), c.create_authority("cluster", CLUSTER, now_s=NOW_S).certificate_pem + WORLD.ca
    assert credentials.update(node_pem=renewed[0], node_key_pem=renewed[1], ca_pem=bundle)
    assert credentials.pems() == (bundle, *renewed)
    assert contents(load(directory)) == contents(credentials)
    assert load(directory).serial == credentials.serial == 2
    assert sorted(p.name for p in directory.iterdir()) == ["2", "current"]  # the old key is gone


def test_an_update_to_the_same_writes_nothing(directory: Path) -> None:
    credentials = create(directory)
    before = (directory / "1").stat().st_mtime_ns
    assert not credentials.update(ca_pem=WORLD.ca, node_pem=NODE[0], etcd=ETCD_PEMS)
    assert credentials.serial == 1
    assert (directory / "1").stat().st_mtime_ns == before


def test_etcds_paths_stay_the_same(directory: Path) -> None:
    credentials = create(directory)
    paths, renewed = credentials.etcd, etcd_pems()
    credentials.update(etcd=renewed)
    assert credentials.etcd == paths
    assert paths is not None
    assert paths.certificate.read_bytes() == renewed.cert_pem


def test_a_worker_may_become_a_voter(directory: Path) -> None:
    key = c.new_key()
    worker, voter = (
        c.issue_node(
            WORLD.authority, c.csr(key, "n1"), cluster=CLUSTER, name="n1", role=role, now_s=NOW_S, lifetime_s=60
        )
        for role in (NodeRole.WORKER, NodeRole.VOTER)
    )
    credentials = create(directory, node_pem=worker, node_key_pem=c.key_pem(key), etcd=None)
    assert credentials.update(node_pem=voter, etcd=ETCD_PEMS)
    assert load(directory).role is NodeRole.VOTER


OTHER_WORLD = World(NOW_S, OTHER)
MISFITS: dict[str, dict[str, Any]] = {
    "another key": {"node_key_pem": USER[1]},
    "another certificate": {"node_pem": WORLD.node()[0]},
    "another node's": {"node_pem": WORLD.node("n2")[0]},
    "a user's": {"node_pem": USER[0], "node_key_pem": USER[1]},
    "another cluster's authority": {"ca_pem": OTHER_WORLD.ca},
    "one authority too many": {"ca_pem": WORLD.ca + OTHER_WORLD.ca},
    "etcd's authority": {"ca_pem": ETCD.certificate_pem},
    "no authority": {"ca_pem": b""},
    "no certificate": {"node_pem": b"x"},
    "no key": {"node_key_pem": b""},
    "etcd of another key": {"etcd": EtcdPems(ETCD.certificate_pem, ETCD_PEMS.cert_pem, NODE[1])},
    "etcd of the cluster's authority": {"etcd": EtcdPems(WORLD.ca, ETCD_PEMS.cert_pem, ETCD_PEMS.key_pem)},
}


@pytest.mark.parametrize("change", MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_together_is_not_saved(directory: Path, change: dict[str, Any]) -> None:
    credentials = create(directory)
    with pytest.raises(UserError):
        credentials.update(**change)
    assert contents(load(directory)) == contents(credentials) == (WORLD.ca, *NODE, PRIVATE, ETCD_PEMS)
    with pytest.raises(UserError):
        create(directory.with_name("new"), **change)
    assert NodeCredentials.load(directory.with_name("new")) is None


def test_another_nodes_whole_credentials_are_no_update(directory: Path) -> None:
    credentials, other = create(directory), WORLD.node("n2")
    with pytest.raises(UserError, match="another node"):
        credentials.update(node_pem=other[0], node_key_pem=other[1])


@pytest.mark.parametrize(
    "name", ["ca.pem", "node.pem", "node.key", "sealing.key", "etcd-ca.pem", "etcd.pem", "etcd.key"]
)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "garbage", "huge", "a directory"])
def test_damage_is_told_with_what_to_do(directory: Path, name: str, damage: str) -> None:
    create(directory)
    path = directory / "1" / name
    data = path.read_bytes()
    path.unlink()
    if damage == "a directory":
        path.mkdir()
    elif damage != "missing":
        new = {"empty": b"", "cut short": data[: len(data) // 2], "garbage": os.urandom(300), "huge": data * 5000}
        path.write_bytes(new[damage])
        path.chmod(0o600)
    with pytest.raises(UserError) as caught:
        NodeCredentials.load(directory)
    assert caught.value.reason == "bad-credentials"
    assert str(directory) in str(caught.value)
    assert damage == "a directory" or "restore" in caught.value.hint


def test_a_link_that_is_lost_does_not_open_the_cluster(directory: Path) -> None:
    create(directory)
    (directory / "current").unlink()
    assert contents(load(directory)) == (WORLD.ca, *NODE, PRIVATE, ETCD_PEMS)
    assert (directory / "current" / "node.pem").exists()


@pytest.mark.parametrize("target", ["../elsewhere", "/etc", "9", "0", "x", "1/../1"])
def test_a_link_that_points_elsewhere_is_damage(directory: Path, target: str) -> None:
    create(directory)
    (directory / "current").unlink()
    (directory / "current").symlink_to(target)
    with pytest.raises(UserError) as caught:
        NodeCredentials.load(directory)
    assert caught.value.reason == "bad-credentials"


def test_a_file_in_place_of_the_link_is_damage(directory: Path) -> None:
    create(directory)
    (directory / "current").unlink()
    (directory / "current").write_text("1")
    with pytest.raises(UserError, match="no link"):
        NodeCredentials.load(directory)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o666, 0o604])
def test_files_that_others_may_read_are_closed_to_them(directory: Path, mode: int) -> None:
    create(directory)
    for path in (directory / "1").iterdir():
        path.chmod(mode)
    directory.chmod(0o755)
    load(directory)
    assert modes(directory) == {0o600}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_readers_never_see_half_of_a_change(directory: Path) -> None:
    """Neither in memory nor on disk, while certificates and keys are replaced as fast as can be."""
    credentials = create(directory)
    pairs = [WORLD.node() for _ in range(20)]
    lawful = {NODE, *pairs}
    wrong: list[Any] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen = (credentials.pems()[1:], load(directory).pems()[1:])
            wrong.extend(pair for pair in seen if pair not in lawful)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for pem, key in pairs:
            credentials.update(node_pem=pem, node_key_pem=key)
    finally:
        done.set()
        reader.join(30)
    assert not wrong
    assert credentials.serial == 21


def test_updates_of_several_threads_are_all_kept(directory: Path) -> None:
    credentials = create(directory)
    bundles = [c.create_authority("cluster", CLUSTER, now_s=NOW_S).certificate_pem for _ in range(4)]
    threads = [threading.Thread(target=lambda b=b: credentials.update(ca_pem=b)) for b in bundles]
    threads.append(threading.Thread(target=lambda: credentials.update(etcd=etcd_pems())))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert credentials.serial == 6
    assert contents(load(directory)) == contents(credentials)
    assert credentials.etcd_pems != ETCD_PEMS
    assert credentials.ca_pem in bundles


CRASHING = """
import os, sys
from pathlib import Path
from spinetta.trust.credentials import NodeCredentials, EtcdPems

directory, first, new = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])

def parts(where):
    read = lambda n: (where / n).read_bytes()
    return dict(ca_pem=read("ca.pem"), node_pem=read("node.pem"), node_key_pem=read("node.key"),
                etcd=EtcdPems(read("etcd-ca.pem"), read("etcd.pem"), read("etcd.key")))

founding = not any(directory.glob("*/"))
new_parts, private = parts(new), (new / "sealing.key").read_bytes()
credentials = None if founding else NodeCredentials.load(directory)
steps = 0
CHANGES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.chmod", "shutil.rmtree"}

def crash(event, args):
    global steps
    if event in CHANGES and str(directory) in repr(args):
        steps += 1
        if steps == crash_at:
            os._exit(7)

# One process tries every step: each in a child of its own, on a copy of the directory as it was before.
import shutil
before, outcome = directory.with_name("before"), directory.with_name("outcome")
shutil.copytree(directory, before, symlinks=True) if directory.exists() else None
crash_at = 0
while True:
    crash_at += 1
    shutil.rmtree(directory, ignore_errors=True)
    if before.exists():
        shutil.copytree(before, directory, symlinks=True)
    pid = os.fork()
    if pid == 0:
        sys.addaudithook(crash)
        try:
            if founding:
                NodeCredentials.create(directory, sealing_private=private, **new_parts)
            else:
                credentials.update(**new_parts)
        except BaseException as e:
            print(repr(e), flush=True)
            os._exit(9)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    found = NodeCredentials.load(directory)
    if found is None:
        seen = "none"
    else:
        seen = "new" if found.node_pem == new_parts["node_pem"] else "old"
        assert seen == "old" or (found.node_key_pem, found.etcd_pems) == (new_parts["node_key_pem"], new_parts["etcd"])
    if code == 7:  # and the next try must come through, whatever is lying about
        if found is None:
            NodeCredentials.create(directory, sealing_private=private, **new_parts)
        else:
            found.update(**new_parts)
        again = NodeCredentials.load(directory)
        assert again.node_pem == new_parts["node_pem"]
        left = sorted(p.name for p in directory.iterdir())
        assert left == [str(again.serial), "current"] or seen == "new", left  # "new": the next change tidies up
    print(crash_at, code, seen, flush=True)
    if code != 7:
        break
"""


@pytest.mark.parametrize("founding", [True, False])
def test_a_crash_at_any_step_leaves_all_of_a_change_or_nothing(tmp_path: Path, founding: bool) -> None:
    directory, first, new = tmp_path / "trust", tmp_path / "first" / "trust", tmp_path / "new" / "trust"
    create(first)
    renewed = WORLD.node()
    create(new, node_pem=renewed[0], node_key_pem=renewed[1], etcd=etcd_pems())
    if not founding:
        create(directory)
    ran = subprocess.run(
        [sys.executable, "-c", CRASHING, directory, first / "1", new / "1"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    steps = [line.split() for line in ran.stdout.splitlines()]
    seen = [step[2] for step in steps]
    assert [step[1] for step in steps] == ["7"] * (len(steps) - 1) + ["0"]
    assert len(steps) > 15
    assert seen == sorted(seen, key=("none", "old", "new").index)  # never back
    assert seen[0] == ("none" if founding else "old")
    assert seen[-1] == "new"


def limited(directory: Path, code: str, file_bytes: int) -> subprocess.CompletedProcess[str]:
    """Run where no file may grow beyond so many bytes: as on a full disk, the kernel refuses in the middle."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    return subprocess.run(
        [sys.executable, "-B", "-c", code, directory],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=limit,
    )


FULL = """
import sys
from pathlib import Path
from spinetta.errors import UserError
from spinetta.trust.credentials import NodeCredentials, PendingKeys
directory = Path(sys.argv[1])
credentials = NodeCredentials.load(directory)
before = credentials.pems()
try:
    credentials.update(ca_pem=credentials.ca_pem * 3)
except UserError as e:
    assert e.reason == "disk", e.reason
    print(e)
assert credentials.pems() == before and credentials.serial == 1
try:
    PendingKeys.load_or_create(directory)
except UserError as e:
    assert e.reason == "disk", e.reason
"""


@pytest.mark.parametrize("file_bytes", [0, 100, 700])
def test_a_full_disk_changes_nothing(directory: Path, file_bytes: int) -> None:
    create(directory)
    ran = limited(directory, FULL, file_bytes)
    assert ran.returncode == 0, ran.stderr
    assert "disk with room" in ran.stdout
    assert contents(load(directory)) == (WORLD.ca, *NODE, PRIVATE, ETCD_PEMS)
    assert {p.name for p in directory.iterdir()} <= {"1", "current", "pending.pem"}


def test_a_place_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("x")
    assert NodeCredentials.load(tmp_path / "data" / "trust") is None
    with pytest.raises(UserError) as caught:
        create(tmp_path / "data" / "trust")
    assert caught.value.reason == "disk"


def test_no_secret_in_a_repr(directory: Path) -> None:
    credentials = create(directory)
    pending = PendingKeys.load_or_create(directory)
    user = UserCredentials.create(WORLD.ca, *USER)
    for thing in (credentials, credentials.etcd_pems, pending, user):
        assert "PRIVATE" not in repr(thing)
        assert repr(PRIVATE) not in repr(thing)


# --- keys that wait


def test_keys_that_wait_are_the_same_after_a_restart(directory: Path) -> None:
    first = PendingKeys.load_or_create(directory)
    assert PendingKeys.load_or_create(directory) == first
    assert NodeCredentials.load(directory) is None
    PendingKeys.forget(directory)
    PendingKeys.forget(directory)
    assert PendingKeys.load_or_create(directory) != first


DAMAGED_KEYS = {"empty": b"", "x": b"x", "one": NODE[1], "no sealing key": NODE[1] * 3, "four": NODE[1] * 4}


@pytest.mark.parametrize("data", DAMAGED_KEYS.values(), ids=DAMAGED_KEYS)
def test_damaged_keys_that_wait_are_told(directory: Path, data: bytes) -> None:
    directory.mkdir(parents=True)
    (directory / "pending.pem").write_bytes(data)
    with pytest.raises(UserError, match="damaged") as caught:
        PendingKeys.load_or_create(directory)
    assert "remove it" in caught.value.hint


# --- people


def test_a_persons_credentials_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "credentials.pem"
    made = UserCredentials.create(WORLD.ca, *USER)
    made.to_file(path)
    assert UserCredentials.from_file(path) == made
    assert (made.name, made.cluster) == ("ann", CLUSTER)
    assert modes(path.parent) == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    again = UserCredentials.create(WORLD.ca, *WORLD.user())
    again.to_file(path)
    assert UserCredentials.from_file(path) == again
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_remarks_and_order_in_the_file_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "c.pem"
    path.write_bytes(b"# mine\n" + WORLD.ca + b"\n\n" + USER[0] + b"# key\n" + USER[1])
    path.chmod(0o600)
    assert UserCredentials.from_file(path).cert_pem == USER[0]


def test_a_chain_and_a_bundle_are_told_apart(tmp_path: Path) -> None:
    new = c.create_authority("cluster", CLUSTER, now_s=NOW_S)
    crossed = c.cross_sign(WORLD.authority, new.certificate_pem, now_s=NOW_S)
    made = UserCredentials.create(new.certificate_pem + WORLD.ca, USER[0] + crossed, USER[1])
    made.to_file(tmp_path / "c.pem")
    found = UserCredentials.from_file(tmp_path / "c.pem")
    assert found.cert_pem == USER[0] + crossed
    assert found.ca_pem == new.certificate_pem + WORLD.ca


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o666])
def test_a_persons_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "c.pem"
    UserCredentials.create(WORLD.ca, *USER).to_file(path)
    path.chmod(mode)
    with pytest.raises(UserError, match="others may read") as caught:
        UserCredentials.from_file(path)
    assert caught.value.reason == "readable-key"
    assert "chmod 600" in caught.value.hint


def test_no_file_means_log_in(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file") as caught:
        UserCredentials.from_file(tmp_path / "c.pem")
    assert caught.value.reason == "no-credentials"
    assert "spinetta login" in caught.value.hint


BAD_FILES = {
    "empty": b"",
    "no key": WORLD.ca + USER[0],
    "two keys": WORLD.ca + USER[0] + USER[1] + NODE[1],
    "another key": WORLD.ca + USER[0] + NODE[1],
    "no authority": USER[0] + USER[1],
    "no certificate": WORLD.ca + USER[1],
    "another cluster": OTHER_WORLD.ca + USER[0] + USER[1],
    "a node's": WORLD.ca + NODE[0] + NODE[1],
    "garbage": bytes(range(256)),
    "huge": b"#" * 100_000,
}


@pytest.mark.parametrize("data", BAD_FILES.values(), ids=BAD_FILES)
def test_a_damaged_file_means_log_in_anew(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "c.pem"
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(UserError) as caught:
        UserCredentials.from_file(path)
    assert caught.value.reason == "bad-credentials"
    assert "spinetta login" in caught.value.hint
    assert "PRIVATE" not in str(caught.value)


def test_a_generation_is_never_overwritten(directory: Path) -> None:
    """A directory that an earlier, failed try has left behind is not written into."""
    credentials = create(directory)
    (directory / "7").mkdir()
    (directory / ".new-8").mkdir()
    (directory / ".new-8" / "ca.pem").write_text("left over")
    assert credentials.update(etcd=etcd_pems())
    assert credentials.serial == 8
    assert generations.current(directory) == 8
    assert contents(load(directory)) == contents(credentials)
    assert sorted(p.name for p in directory.iterdir()) == ["8", "current"]
