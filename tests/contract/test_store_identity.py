"""What a node remembers of its place in the cluster, and when etcd must not be started."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spinetta.cli.clusterdata import _join_command
from spinetta.errors import UserError
from spinetta.store.identity import Identity, check_data_dir, load, save
from spinetta.store.wal import wal_owner

pytestmark = pytest.mark.contract

WHOLE = Identity(
    node="a",
    cluster_id="cdf818194e3a8c32",
    member_id="8e9e05c52164694d",
    has_joined=True,
    initial_cluster="a=http://127.0.0.1:7222",
    address="127.0.0.1:7220",
    etcd_client_port=7221,
    etcd_peer_port=7222,
    endpoints=("127.0.0.1:7221", "127.0.0.2:7221"),
    incarnation_id="0193",
)


@pytest.mark.parametrize("identity", [Identity("a"), WHOLE])
def test_what_is_saved_is_loaded(tmp_path: Path, identity: Identity) -> None:
    path = tmp_path / "identity.json"
    assert load(path) is None
    save(path, WHOLE)
    save(path, identity)
    assert load(path) == identity
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["identity.json"]


def document(**changes: Any) -> bytes:
    return json.dumps({"format": 1, "node": "a", **changes}).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged"),
        (b"\0" * 300, "damaged"),
        (b"[]", "not an object"),
        (b'{"node": "a"}', "format"),
        (b'{"format": 1}', "node"),
        (document(format=2), "format 2 is not known"),
        (document(more=1), "unknown fields: more"),
        (document(has_joined="yes"), "has_joined is 'yes'"),
        (document(etcd_client_port=1.5), "etcd_client_port is 1.5"),
        (document(etcd_client_port=True), "etcd_client_port is True"),
        (document(endpoints="x"), "endpoints is 'x'"),
        (document(node="x" * 70_000), "too large"),
        (b"\xff" + document(), "damaged"),
    ],
)
def test_a_damaged_file_is_refused_and_left_alone(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "identity.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        load(path)
    assert caught.value.hint
    assert path.read_bytes() == data


def test_what_is_no_identity_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "identity.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged: it has no format") as caught:
        load(tmp_path / "identity.json")
    assert "confirm-dead" in caught.value.hint


def test_how_a_node_is_started_again_names_it(tmp_path: Path) -> None:
    """What the commands that make a cluster from data say at their end must work as it stands."""
    assert _join_command(tmp_path) == f"spinetta node join --data-dir {tmp_path}"
    save(tmp_path / "identity.json", Identity("a", address="127.0.0.1:7220"))
    assert _join_command(tmp_path) == f"spinetta node join --name a --address 127.0.0.1:7220 --data-dir {tmp_path}"


def test_damage_anywhere_is_found(tmp_path: Path) -> None:
    path = tmp_path / "identity.json"
    save(path, WHOLE)
    whole = path.read_bytes()
    for at in range(len(whole) - 1):  # the last one is the end of the line
        for damaged in (
            whole[:at],
            *(whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :] for bits in (1, 4, 32, 255)),
        ):
            path.write_bytes(damaged)
            try:
                found = load(path)
            except UserError as error:
                refused = error.message
                assert refused.startswith(f"{path} is damaged: "), at
            else:
                assert found == WHOLE, (at, damaged)  # white space


def test_what_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        save(tmp_path / "none" / "identity.json", WHOLE)
    (tmp_path / "identity.json").mkdir()
    with pytest.raises(UserError, match="cannot be"):
        load(tmp_path / "identity.json")
    with pytest.raises(UserError, match="cannot be written"):
        save(tmp_path / "identity.json", WHOLE)
    assert [each.name for each in tmp_path.iterdir()] == ["identity.json"]


def test_a_wiped_member_is_not_started(tmp_path: Path) -> None:
    check_data_dir(None, tmp_path / "none")
    check_data_dir(Identity("a"), tmp_path / "none")
    for made in ("none", "empty", "half/member/wal"):
        if made != "none":
            (tmp_path / made).mkdir(parents=True)
        data_dir = tmp_path / made.partition("/")[0]
        with pytest.raises(UserError, match="its data is gone") as caught:
            check_data_dir(WHOLE, data_dir)
        assert "etcdctl member remove 8e9e05c52164694d" in caught.value.hint


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: b"",
        lambda data: b"\0" * len(data),
        lambda data: data[:20],
        lambda data: b"\xff" * len(data),
        lambda _: b"not the log of an etcd, but something of the same name",
        lambda data: data[8:],
    ],
)
def test_a_damaged_log_is_refused(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    # The head of a log as etcd writes it: a checksum record, then the metadata.
    metadata = bytes.fromhex("08cdd291ab c5c0 8fcf8e01 10b294 eaf1 9983 86fc cd01".replace(" ", ""))
    record = bytes([0x08, 1, 0x10, 0, 0x1A, len(metadata)]) + metadata
    head = (4).to_bytes(8, "little") + bytes([0x08, 4, 0x10, 0]) + len(record).to_bytes(8, "little") + record
    wal = tmp_path / "member" / "wal"
    wal.mkdir(parents=True)
    log = wal / "0000000000000000-0000000000000000.wal"
    log.write_bytes(head + b"\0" * 100)
    assert wal_owner(tmp_path) is not None
    log.write_bytes(spoil(head))
    with pytest.raises(UserError, match="cannot be read"):
        wal_owner(tmp_path)
