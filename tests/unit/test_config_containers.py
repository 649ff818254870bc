"""Settings of containers: what each takes, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from spinetta.config import Settings, resolve
from spinetta.container import ALLOWS_MAX
from spinetta.errors import UserError
from spinetta.options import CONTAINER_IDS_LAST, DEVICES_MAX
from tests.unit.test_config import DEFAULTS, ETC, node

GPU = (("gpu", ("/dev/nvidia0", "/dev/nvidiactl")),)


def settings(**flags: str) -> Settings:
    return resolve(flags, {}, [], DEFAULTS).settings


def test_defaults() -> None:
    s = settings()
    assert (s.runtimes, s.allow, s.devices, s.container_program) == (("process", "container"), (), (), "auto")
    assert (s.container_ids, s.tmp_bytes, s.log_max_bytes, s.scratch_keep_bytes) == (0, 1 << 30, 1 << 30, 10 << 30)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("process", ("process",)),
        ("container", ("container",)),
        ("container,process", ("process", "container")),
        ("process,runc", ("process", "container")),  # as settings said before there were containers
        ("runc,container", ("container",)),
    ],
)
def test_runtimes(text: str, found: tuple[str, ...]) -> None:
    assert settings(runtimes=text).runtimes == found


def test_what_is_allowed_is_a_sorted_set_of_words() -> None:
    text = "network:host, mount:/data,network:host,capability:SYS_PTRACE,user:root,mount-rw:/out,image:/srv/i"
    words = ("capability:SYS_PTRACE", "image:/srv/i", "mount-rw:/out", "mount:/data", "network:host", "user:root")
    assert settings(allow=text).allow == words
    assert node({}, {}, {"allow": list(words)}).settings.allow == words
    assert node({}, {"SPINETTA_ALLOW": text}).settings.allow == words


@pytest.mark.parametrize(
    "table",
    [
        {"gpu": "/dev/nvidia0,/dev/nvidiactl"},
        {"gpu": ["/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia0"]},
        "gpu=/dev/nvidia0,/dev/nvidiactl",
        "gpu=/dev/nvidia0, gpu=/dev/nvidiactl",
    ],
)
def test_devices_of_a_countable(table: Any) -> None:
    assert node({}, {}, {"devices": table}).settings.devices == GPU


def test_devices_of_several_countables() -> None:
    both = settings(devices="gpu=/dev/nvidia0,/dev/nvidiactl,fpga=/dev/a=b").devices
    assert both == (("fpga", ("/dev/a=b",)), *GPU)


@pytest.mark.parametrize("program", ["auto", "runc", "crun", "/opt/runc"])
def test_programs(program: str) -> None:
    assert settings(container_program=program).container_program == program


@pytest.mark.parametrize("first", [0, 65536, 1_000_000, CONTAINER_IDS_LAST])
def test_ids(first: int) -> None:
    assert settings(container_ids=str(first)).container_ids == first


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"runtimes": "docker"}, "--runtimes: unknown runtime 'docker'"),
        ({"runtimes": ","}, "--runtimes: names no runtime"),
        ({"allow": "network:none"}, "--allow: not an allowance: 'network:none'"),
        ({"allow": "network"}, "not an allowance: 'network'"),
        ({"allow": "everything"}, "not an allowance: 'everything'"),
        ({"allow": "container"}, "not an allowance: 'container'"),
        ({"allow": "user:1000"}, "not an allowance: 'user:1000'"),
        ({"allow": "capability:CAP_KILL"}, "no capability is called 'CAP_KILL'"),
        ({"allow": "mount:data"}, "not a plain absolute path: 'data'"),
        ({"allow": "mount:/data/../etc"}, "not a plain absolute path: '/data/../etc'"),
        ({"allow": "mount:/"}, "not a plain absolute path: '/'"),
        ({"allow": "mount-rw:"}, "not a plain absolute path: ''"),
        ({"allow": "mount-rw:/srv,image:/srv"}, "tasks may write to /srv"),
        ({"allow": ",".join(f"mount:/d{i}" for i in range(ALLOWS_MAX + 1))}, f"{ALLOWS_MAX + 1} items, at most"),
        ({"allow": ",".join(f"mount:/{'x' * 1000}{i}" for i in range(9))}, "9072 bytes of allowances"),
        ({"container_program": "docker"}, "no program for containers: 'docker'"),
        ({"container_program": ""}, "no program for containers: ''"),
        ({"container_ids": "1000"}, "1000 is among the ids that the machine's own users have"),
        ({"container_ids": "65535"}, "65535 is among the ids"),
        ({"container_ids": str(CONTAINER_IDS_LAST + 1)}, "is out of range"),
        ({"container_ids": "-1"}, "-1 is out of range"),
        ({"tmp_size": "0"}, "0B is out of range"),
        ({"tmp_size": "lots"}, "not a size: 'lots'"),
        ({"log_max": "-1"}, "must not be negative"),
        ({"scratch_keep": "-1"}, "must not be negative"),
        ({"devices": "/dev/nvidia0"}, "not NAME=PATH: '/dev/nvidia0'"),
        ({"devices": "gpu"}, "not NAME=PATH: 'gpu'"),
        ({"devices": "gpu=/dev/a,fpga"}, "not NAME=PATH: 'fpga'"),
        ({"devices": "gpu="}, "not a plain absolute path: ''"),
        ({"devices": "gpu=nvidia0"}, "not a plain absolute path: 'nvidia0'"),
        ({"devices": "gpu=/dev/../etc/passwd"}, "not a plain absolute path"),
        ({"devices": "gpu=/etc/passwd"}, "not a device: '/etc/passwd'"),
        ({"devices": "GPU=/dev/a"}, "not a name for a countable: 'GPU'"),
        ({"devices": "memory=/dev/a"}, "'memory' is no countable"),
        ({"devices": ",".join(f"gpu=/dev/{i}" for i in range(DEVICES_MAX + 1))}, f"{DEVICES_MAX + 1} devices of gpu"),
    ],
)
def test_refused(flags: dict[str, str], message: str) -> None:
    (key,) = flags
    with pytest.raises(UserError) as caught:
        node(flags)
    assert message in caught.value.message
    assert caught.value.field == f"node.{key}"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"allow": {"network": "host"}}, "allow: must be a list, not a table"),
        ({"allow": [1]}, "allow: must be text, not a number"),
        ({"devices": {"gpu": 1}}, "devices: must be a list, not a number"),
        ({"devices": {"gpu": []}}, "devices: 0 devices of gpu"),
        ({"devices": {f"c{i}": "/dev/a" for i in range(33)}}, "devices: 33 countables, at most 32"),
        ({"container_ids": 1.5}, "container_ids: must be a whole number"),
    ],
)
def test_files_are_refused_with_their_path(table: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        node({}, {}, table)
    assert str(caught.value).startswith(ETC)
    assert message in str(caught.value)
