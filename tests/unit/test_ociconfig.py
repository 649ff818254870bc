"""What a container's configuration says, and that the OCI's own schema takes it."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft4Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT4

from spinetta import container, ociconfig
from spinetta.container import Mount
from spinetta.errors import InvariantViolation
from spinetta.ociconfig import Device, Hardening, Host, IdRange, Request
from spinetta.ocirequest import MOUNT_POINT_DIRECTORIES, MOUNT_POINT_FILES, RESERVED
from spinetta.runtime.images import tree

SCHEMA = Path("/usr/share/gocode/src/github.com/opencontainers/runtime-spec/schema")
IDS = (IdRange(0, 1_000_000, 65536),)
PLAIN = Request(("true",), "/var/lib/spinetta/scratch/1", IDS, IDS, init_path="/usr/bin/tini-static")
ROOT_ALLOWED = Hardening(root_inside=True)


def made(request: Request = PLAIN, **changes: Any) -> dict[str, Any]:
    return ociconfig.runtime_config(dataclasses.replace(request, **changes))


def mounts(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {mount["destination"]: mount for mount in config["mounts"]}


def namespaces(config: dict[str, Any]) -> dict[str, str]:
    return {n["type"]: n.get("path", "") for n in config["linux"]["namespaces"]}


# --- isolated by default ---------------------------------------------------------------------------------------------


def test_all_name_spaces_are_its_own() -> None:
    assert set(namespaces(made())) == {"user", "pid", "mount", "ipc", "uts", "cgroup", "network"}
    assert set(namespaces(made(network="host"))) == {"user", "pid", "mount", "ipc", "uts", "cgroup"}
    bridged = made(network="bridge", netns_path="/run/netns/x")
    assert namespaces(bridged)["network"] == "/run/netns/x"
    seen = mounts(made(network="bridge", netns_path="/run/netns/x", sys_path="/run/sys/x"))["/sys"]
    assert (seen["source"], "ro" in seen["options"]) == ("/run/sys/x", True)


def test_nothing_is_had_that_was_not_asked_for() -> None:
    config = made()
    process = config["process"]
    assert process["noNewPrivileges"] is True
    assert process["terminal"] is False
    assert set(process["capabilities"]) == {"bounding", "effective", "permitted", "inheritable", "ambient"}
    assert not any(process["capabilities"].values())
    assert config["root"]["readonly"] is True
    assert config["linux"]["resources"]["devices"] == [{"allow": False, "access": "rwm"}]
    assert "devices" not in config["linux"]
    assert config["linux"]["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO"
    assert "rootfsPropagation" not in config["linux"], "by default nothing is mounted back, and all mounts are private"
    assert process["user"]["uid"] == process["user"]["gid"] == 1000
    assert {"type": "RLIMIT_CORE", "soft": 0, "hard": 0} in process["rlimits"]
    assert "sysctl" not in config["linux"], "writing them is what CVE-2025-52881 leads astray"
    assert "hooks" not in config


def test_at_least_what_others_hide_is_hidden() -> None:
    # The lists of container engines that are common, by their documentation.
    masked = {"acpi", "asound", "kcore", "keys", "latency_stats", "timer_list", "timer_stats", "sched_debug", "scsi"}
    masked = {f"/proc/{name}" for name in masked | {"interrupts"}} | {"/sys/firmware", "/sys/devices/virtual/powercap"}
    assert masked <= set(made()["linux"]["maskedPaths"])
    assert {"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"} <= set(
        made()["linux"]["readonlyPaths"]
    )


def test_the_init_is_first_and_the_command_follows_as_it_is() -> None:
    assert made(command=("-g", "--", "x y"))["process"]["args"] == ["/.spinetta/init", "-g", "--", "-g", "--", "x y"]


def test_what_was_asked_for_is_had() -> None:
    config = made(
        capabilities=("SYS_PTRACE", "NET_RAW"),
        writable=True,
        open_files=(1024, 4096),
        rlimits={"RLIMIT_MEMLOCK": (1, 2)},
        tmp_bytes=1 << 20,
        oom_score_adj=500,
        groups=(7, 5),
        env={"A": "b=c"},
        devices=(Device("/dev/gpu0", "c", 195, 0),),
        hostname="t-1",
        cwd="/work/sub",
    )
    process = config["process"]
    assert process["capabilities"]["ambient"] == ["CAP_NET_RAW", "CAP_SYS_PTRACE"]
    assert config["root"]["readonly"] is False
    assert {"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 4096} in process["rlimits"]
    assert {"type": "RLIMIT_MEMLOCK", "soft": 1, "hard": 2} in process["rlimits"]
    assert "size=1048576" in mounts(config)["/tmp"]["options"]
    assert process["oomScoreAdj"] == 500
    assert process["user"]["additionalGids"] == [5, 7]
    assert process["env"] == ["A=b=c", f"PATH={ociconfig.PATH_DEFAULT}"]
    assert config["linux"]["devices"][0]["path"] == "/dev/gpu0"
    assert {"allow": True, "type": "c", "major": 195, "minor": 0, "access": "rw"} in config["linux"]["resources"][
        "devices"
    ]
    assert config["hostname"] == "t-1"
    assert process["cwd"] == "/work/sub"


# --- mounts ----------------------------------------------------------------------------------------------------------


def test_mounts_come_parents_first_and_ours_last() -> None:
    config = made(
        mounts=(Mount("/srv/b", "/data/b/c"), Mount("/srv/a", "/data/a"), Mount("/srv/w", "/w", writable=True)),
        secrets_path="/run/s",
        hosts_path="/etc/hosts",
    )
    order = [mount["destination"] for mount in config["mounts"]]
    for i, path in enumerate(order):
        assert not any(parent.startswith(path + "/") for parent in order[:i]), f"{path} would hide what is below it"
    assert order[-2:] == ["/run/secrets/spinetta", "/.spinetta/init"]
    assert order.index("/w") < order.index("/data/a") < order.index("/data/b/c") < order.index("/run/secrets/spinetta")


def test_every_folder_of_the_host_is_without_devices_and_setuid() -> None:
    config = made(mounts=(Mount("/srv/a", "/a"), Mount("/srv/b", "/b", True)), secrets_path="/run/s", network="host")
    for mount in config["mounts"]:
        if mount["type"] == "bind":
            assert {"nosuid", "nodev", "rprivate"} <= set(mount["options"]), mount
    found = mounts(config)
    assert {"ro", "rro"} <= set(found["/a"]["options"])
    assert "ro" not in found["/b"]["options"]
    assert "ro" in found["/run/secrets/spinetta"]["options"]
    assert "ro" in found["/.spinetta/init"]["options"]
    assert {"ro", "rro"} <= set(found["/sys"]["options"])
    assert found["/sys"]["type"] == "bind"
    assert mounts(made())["/sys"]["type"] == "sysfs"


def test_where_read_only_cannot_go_down_only_one_file_system_is_seen() -> None:
    config = made(mounts=(Mount("/srv/a", "/a"),), host=Host(recursive_read_only=False))
    assert "bind" in mounts(config)["/a"]["options"]
    assert "rbind" not in mounts(config)["/a"]["options"]


@pytest.mark.parametrize(
    "target",
    [
        *RESERVED, "/", "", "data", "/run", "/etc", "/run/secrets", "/proc/sys", "/sys/fs", "/dev/shm", "/.spinetta/x",
        "/a/../proc", "/a/..", "/a/", "//proc", "//", "/a//b", "/./proc", "/work/x", "/tmp/x", "/data\0x",
    ],
)  # fmt: skip
def test_no_mount_hides_what_isolates(target: str) -> None:
    assert ociconfig.mount_refusals([Mount("/srv", target)])
    with pytest.raises(InvariantViolation):
        made(mounts=(Mount("/srv", target),))


@given(st.text("/.abcdevprosyn", min_size=1, max_size=14).map(lambda text: "/" + text))
@settings(max_examples=300, deadline=None)
def test_whatever_is_mounted_is_beside_what_is_reserved(target: str) -> None:
    if not ociconfig.mount_refusals([Mount("/srv", target)]):
        assert ".." not in target.split("/")
        assert "" not in target.split("/")[1:]
        for top in RESERVED:
            assert not f"{target}/".startswith(f"{top}/")
            assert not f"{top}/".startswith(f"{target}/")


def test_mounts_are_not_within_each_other() -> None:
    assert not ociconfig.mount_refusals([Mount("/srv", "/data"), Mount("/srv", "/data2")])
    assert ociconfig.mount_refusals([Mount("/srv", "/data"), Mount("/srv", "/data/x")])
    assert ociconfig.mount_refusals([Mount("/srv", "/data/x"), Mount("/srv", "/data")])
    assert ociconfig.mount_refusals([Mount("/srv", "/data"), Mount("/srv", "/data")])


@pytest.mark.parametrize("source", ["srv", "/srv/..", "/srv/../etc", "//srv", "/", ""])
def test_sources_are_plain(source: str) -> None:
    assert ociconfig.mount_refusals([Mount(source, "/data")])


# --- refused before it is made ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cwd", ["", "work", "/proc", "/proc/self/fd/7", "/sys", "/dev/fd/3", "/a/../proc", "//", "/a/."]
)
def test_working_directories_that_lead_out(cwd: str) -> None:
    assert ociconfig.cwd_refusal(cwd)


@pytest.mark.parametrize("cwd", ["/", "/work", "/work/a", "/process", "/data"])
def test_working_directories_that_do_not(cwd: str) -> None:
    assert not ociconfig.cwd_refusal(cwd)


@pytest.mark.parametrize(
    "changes",
    [
        {"command": ()},
        {"command": ("",)},
        {"command": ("a\0b",)},
        {"env": {"A=B": "c"}},
        {"env": {"": "c"}},
        {"env": {"A": "\0"}},
        {"uid": 0},
        {"uid": 70000},
        {"gid": -1},
        {"groups": (65536,)},
        {"uids": (IdRange(0, 0, 65536),)},
        {"gids": (IdRange(0, 0, 1), IdRange(1, 1_000_000, 65535))},
        {"uids": (IdRange(1000, 1_000_000, 1),)},
        {"uids": ()},
        {"capabilities": ("CAP_SYS_ADMIN",)},
        {"network": "bridge"},
        {"network": "host", "netns_path": "/run/netns/x"},
        {"network": "host", "sys_path": "/run/sys/x"},
        {"network": "bridge", "netns_path": "/run/netns/x", "sys_path": "run/sys/x"},
        {"network": "other"},
        {"scratch_path": ""},
        {"scratch_path": "relative"},
        {"secrets_path": "/a/../b"},
        {"init_path": "tini"},
        {"devices": (Device("dev/x", "c", 1, 1),)},
        {"cwd": "/proc/self/fd/7"},
    ],
    ids=str,
)
def test_what_would_not_be_isolated_is_not_made(changes: dict[str, Any]) -> None:
    assert ociconfig.refusals(dataclasses.replace(PLAIN, **changes))
    with pytest.raises(InvariantViolation):
        made(**changes)


def test_an_old_runtime_runs_nothing_as_root_of_the_container() -> None:
    old = ociconfig.hardening(lacks_fixes=True)
    assert "CVE-2025-31133" in old.warning
    assert ociconfig.refusals(dataclasses.replace(PLAIN, uid=0, gid=0, rules=old))
    new = ociconfig.hardening(lacks_fixes=False)
    assert not new.warning
    assert not ociconfig.refusals(dataclasses.replace(PLAIN, uid=0, gid=0, rules=new))
    assert ociconfig.hardening(lacks_fixes=True, rootless=True).root_inside, "no more than the user who runs it"


def test_every_place_where_something_is_mounted_is_checked_for_links() -> None:
    checked = ociconfig.paths_to_check([Mount("/srv", "/data/deep/down")])
    assert {*MOUNT_POINT_DIRECTORIES, *MOUNT_POINT_FILES} <= set(checked)
    assert {"/dev", "/proc", "/sys", "/dev/null", "/run", "/data", "/data/deep", "/data/deep/down"} <= set(checked)
    config = made(mounts=(Mount("/srv", "/data/deep/down"),), secrets_path="/s", hosts_path="/h", resolv_path="/n")
    assert set(mounts(config)) <= set(checked)
    assert checked.index("/data") < checked.index("/data/deep") < checked.index("/data/deep/down")


def test_unpacked_images_have_the_places_where_something_is_mounted() -> None:
    assert {f"/{name}": mode for name, mode in tree.DIRECTORIES}.items() >= MOUNT_POINT_DIRECTORIES.items()
    assert {f"/{name}" for name in (tree.INIT, *tree.NETWORK_FILES)} == set(MOUNT_POINT_FILES)


# --- the specification -----------------------------------------------------------------------------------------------


@functools.cache
def validator() -> Draft4Validator:
    if not SCHEMA.is_dir():
        pytest.skip("the schema is not installed: golang-github-opencontainers-specs-dev (scripts/setup.sh --dev)")
    files = {path.name: json.loads(path.read_bytes()) for path in SCHEMA.glob("*.json")}
    resources = [(name, Resource.from_contents(found, DRAFT4)) for name, found in files.items()]
    # Its files name each other without a folder, and themselves by an address.
    by_address = [(found.get("id", name), Resource.from_contents(found, DRAFT4)) for name, found in files.items()]
    base = files["config-schema.json"].get("id", "").rpartition("/")[0]
    beside = [(f"{base}/{name}", Resource.from_contents(found, DRAFT4)) for name, found in files.items()]
    registry: Registry[Any] = Registry().with_resources([*resources, *by_address, *beside])
    return Draft4Validator(files["config-schema.json"], registry=registry)


def test_the_schema_finds_mistakes() -> None:
    for path, value in ((("process", "cwd"), 7), (("linux", "seccomp", "defaultAction"), "ALLOW"), (("mounts",), {})):
        config: Any = made()
        part = config
        for name in path[:-1]:
            part = part[name]
        part[path[-1]] = value
        assert not validator().is_valid(config), path


words = st.text(
    st.characters(min_codepoint=32, max_codepoint=0x2FFF, exclude_characters="=/\0"), min_size=1, max_size=8
)
paths = st.lists(st.text("abcdexyz09_-", min_size=1, max_size=6), min_size=1, max_size=4).map(
    lambda p: "/" + "/".join(p)
)
requests = st.builds(
    Request,
    command=st.lists(words, min_size=1, max_size=4).map(tuple),
    scratch_path=paths,
    uids=st.just(IDS),
    gids=st.sampled_from([IDS, (IdRange(0, 5000, 1), IdRange(1000, 6000, 10))]),
    env=st.dictionaries(words, words, max_size=4),
    uid=st.integers(1, 65535),
    gid=st.just(1000),
    init_path=st.sampled_from(["", "/usr/bin/tini-static"]),
    secrets_path=st.one_of(st.just(""), paths),
    hosts_path=st.one_of(st.just(""), paths),
    hostname=words,
    network=st.sampled_from(["none", "host"]),
    writable=st.booleans(),
    capabilities=st.lists(st.sampled_from(sorted(container.CAPABILITIES)), max_size=6).map(tuple),
    mounts=st.lists(st.builds(Mount, paths, paths, st.booleans()), max_size=4).map(tuple),
    devices=st.lists(
        st.builds(Device, paths, st.sampled_from("cb"), st.integers(0, 511), st.integers(0, 255)), max_size=3
    ).map(tuple),
    tmp_bytes=st.integers(0, 1 << 50),
    open_files=st.integers(0, 1 << 20).map(lambda n: (n, n)),
    rlimits=st.dictionaries(
        st.sampled_from(["RLIMIT_MEMLOCK", "RLIMIT_STACK"]), st.tuples(st.integers(0, 9), st.integers(9, 1 << 60))
    ),
    programs_32=st.booleans(),
    oom_score_adj=st.one_of(st.none(), st.integers(-1000, 1000)),
    host=st.builds(
        Host,
        arch=st.sampled_from(["x86_64", "aarch64", "riscv64", "s390x", "ppc64le"]),
        cgroup_namespace=st.booleans(),
        recursive_read_only=st.booleans(),
        seccomp=st.booleans(),
        rootless=st.booleans(),
    ),
)


@given(requests)
@settings(max_examples=100, deadline=None)
def test_the_specifications_schema_takes_whatever_we_make(request: Request) -> None:
    if ociconfig.refusals(request):
        with pytest.raises(InvariantViolation):
            ociconfig.runtime_config(request)
        return
    config = ociconfig.runtime_config(request)
    assert [error.message for error in validator().iter_errors(config)] == []
    assert json.loads(json.dumps(config)) == config
    assert config == ociconfig.runtime_config(request)
