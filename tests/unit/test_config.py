from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinetta import config, names
from spinetta.config import FileTable, Resolved, resolve, resolve_client
from spinetta.errors import UserError
from spinetta.options import CLIENT_OPTIONS, NODE_OPTIONS, variable

DEFAULTS = {"name": "host", "data_dir": "/var/lib/spinetta"}
ETC = "/etc/spinetta/spinetta.toml"


def node(
    flags: dict[str, Any] | None = None, environ: dict[str, str] | None = None, table: dict[str, Any] | None = None
) -> Resolved:
    files = [FileTable(ETC, {"node": table})] if table is not None else []
    return resolve(flags or {}, environ or {}, files, DEFAULTS)


def test_defaults() -> None:
    resolved = node()
    s = resolved.settings
    assert (s.name, s.data_dir, s.address) == ("host", "/var/lib/spinetta", "127.0.0.1:7220")
    assert (s.etcd_client_port, s.etcd_peer_port, s.voters_wanted, s.candidate) == (7221, 7222, 3, True)
    assert (s.lease_ttl_s, s.grace_s, s.kill_margin_s, s.clock_rate_error) == (10, 60.0, 5.0, 0.01)
    assert (s.host, s.port) == ("127.0.0.1", 7220)
    assert {str(o) for o in resolved.origins.values()} == {"default"}
    assert set(resolved.origins) == {o.attribute for o in NODE_OPTIONS} == set(config.Settings.__dataclass_fields__)
    assert set(config.ClientSettings.__dataclass_fields__) == {o.attribute for o in CLIENT_OPTIONS}


def test_when_a_lost_voter_is_replaced() -> None:
    assert node().settings.voter_replace_after_s == 300.0
    assert node({"voter_replace_after": "90s"}).settings.voter_replace_after_s == 90.0
    for never in ("never", "0"):
        assert node({"voter_replace_after": never}).settings.voter_replace_after_s == 0.0
    assert node({}, {}, {"voter_replace_after": 0}).settings.voter_replace_after_s == 0.0


def test_flags_beat_environment_beats_file_beats_default() -> None:
    given_by = {
        "flag": node({"memory": "1GiB"}, {"SPINETTA_MEMORY": "2GiB"}, {"memory": "3GiB"}),
        "environment": node({}, {"SPINETTA_MEMORY": "2GiB"}, {"memory": "3GiB"}),
        "file": node({}, {"SPINETTA_MEMORY": ""}, {"memory": "3GiB"}),
        "default": node({}, {}, {}),
    }
    for n, (kind, resolved) in enumerate(given_by.items(), 1):
        assert resolved.settings.memory_bytes == (n << 30 if n < 4 else 0)
        assert resolved.origins["memory_bytes"].kind == kind
    assert str(given_by["flag"].origins["memory_bytes"]) == "--memory"
    assert str(given_by["environment"].origins["memory_bytes"]) == "SPINETTA_MEMORY"
    assert str(given_by["file"].origins["memory_bytes"]) == f"{ETC}, [node] memory"


def test_the_first_file_wins() -> None:
    files = [
        FileTable("/home/me/x.toml", {"node": {"tags": ["a"]}}),
        FileTable(ETC, {"node": {"tags": ["b"], "cpus": 2}}),
    ]
    resolved = resolve({}, {}, files, DEFAULTS)
    assert resolved.settings.tags == ("a",)
    assert resolved.settings.cpu_millis == 2000


def test_each_kind_of_value_reads_the_same_from_text_and_from_toml() -> None:
    text = {
        "tags": "ssd,big",
        "peers": "127.0.0.2:7220, 127.0.0.3:7220",
        "countables": "gpu=2,fpga=1",
        "candidate": "no",
        "grace": "2m",
        "cpus": "1.5",
        "etcd_client_port": "0",
        "clock_rate_error": "0.02",
    }
    toml = {
        "tags": ["big", "ssd"],
        "peers": ["127.0.0.2:7220", "127.0.0.3:7220"],
        "countables": {"gpu": 2, "fpga": 1},
        "candidate": False,
        "grace": 120,
        "cpus": 1.5,
        "etcd_client_port": 0,
        "clock_rate_error": 0.02,
    }
    by_variable = node({}, {f"SPINETTA_{k.upper()}": v for k, v in text.items()}).settings
    assert by_variable == node({}, {}, toml).settings == node(text).settings
    assert by_variable.tags == ("big", "ssd")
    assert by_variable.countables == (("fpga", 1), ("gpu", 2))


@pytest.mark.parametrize(
    ("flags", "field", "message"),
    [
        ({"name": "Node_1"}, "node.name", "--name: not a name for a node: 'Node_1'"),
        ({"name": "a/b"}, "node.name", "--name: not a name for a node: 'a/b'"),
        ({"name": "x" * 64}, "node.name", "not a name for a node"),
        ({"name": "-a"}, "node.name", "not a name for a node"),
        ({"name": "a\n"}, "node.name", "not a name for a node"),
        ({"address": "10.0.0.1:7220", "tls": "off"}, "node.tls", "is off loopback, where plain text is not spoken"),
        ({"address": "[::1]:7220", "tls": "off"}, "node.tls", "is off loopback"),
        ({"address": "0.0.0.0:7220"}, "node.address", "is of no machine"),
        ({"address": "[::]:7220"}, "node.address", "is of no machine"),
        ({"address": "::1:7220"}, "node.address", "not an address: '::1:7220'"),
        ({"address": "example.org:7220"}, "node.address", "is a name"),
        ({"address": "1.2.3:7220"}, "node.address", "not a host"),
        ({"peers": "a_b:7220"}, "node.peers", "not a host: 'a_b'"),
        ({"token": "x", "tls": "off"}, "node.tls", "a token is of no use with tls off"),
        ({"token": "x", "token_file": "/t"}, "node.token", "a token is given twice, by --token and --token-file"),
        ({"address": "127.0.0.1"}, "node.address", "not an address: '127.0.0.1'"),
        ({"address": "127.0.0.1:0"}, "node.address", "not a port: '0'"),
        ({"address": "127.0.0.1:65536"}, "node.address", "not a port: '65536'"),
        ({"address": "127.0.0.1:http"}, "node.address", "not a port: 'http'"),
        ({"data_dir": "here"}, "node.data_dir", "--data-dir: not an absolute path: 'here'"),
        ({"peers": "127.0.0.1:7220"}, "node.peers", "name this node's own address"),
        ({"peers": "192.168.1.1:7220", "tls": "off"}, "node.tls", "'192.168.1.1:7220' is off loopback"),
        ({"peers": ",".join(f"127.0.1.{i}:1" for i in range(65))}, "node.peers", "65 items, at most 64"),
        ({"tags": "a b"}, "node.tags", "--tags: not a tag: 'a b'"),
        ({"tags": "-a"}, "node.tags", "not a tag: '-a'"),
        ({"memory": "lots"}, "node.memory", "--memory: not a size: 'lots'"),
        ({"cpus": "-1"}, "node.cpus", "must not be negative"),
        ({"countables": "gpu"}, "node.countables", "not NAME=NUMBER: 'gpu'"),
        ({"countables": "gpu=x"}, "node.countables", "not a whole number: 'x'"),
        ({"countables": "gpu=1,gpu=2"}, "node.countables", "countable 'gpu' is given twice"),
        ({"countables": "memory=1"}, "node.countables", "'memory' is no countable"),
        ({"voters_wanted": "2"}, "node.voters_wanted", "an even number survives no more failures"),
        ({"voters_wanted": "7"}, "node.voters_wanted", "7 is out of range"),
        ({"voter_replace_after": "0.5s"}, "node.voter_replace_after", "is out of range"),
        ({"voter_replace_after": "8d"}, "node.voter_replace_after", "8d00h is out of range"),
        ({"voter_replace_after": "soon"}, "node.voter_replace_after", "not a duration: 'soon'"),
        ({"candidate": "maybe"}, "node.candidate", "not yes or no: 'maybe'"),
        ({"lease_ttl": "1s"}, "node.lease_ttl", "1s is out of range"),
        ({"lease_ttl": "2.5s"}, "node.lease_ttl", "whole seconds"),
        ({"grace": "15s"}, "node.grace", "grace of 15s (from --grace) is not longer than lease_ttl 10s (from default)"),
        ({"clock_rate_error": "half"}, "node.clock_rate_error", "not a number: 'half'"),
        ({"clock_rate_error": "0.5"}, "node.clock_rate_error", "0.5 is out of range"),
        ({"clock_rate_error": "nan"}, "node.clock_rate_error", "nan is out of range"),
        ({"on_terminate": "drop"}, "node.on_terminate", "'drop' is none of the choices"),
        ({"log_level": "loud"}, "node.log_level", "'loud' is none of the choices"),
        ({"etcd_peer_port": "7221"}, "node.etcd_peer_port", "is also the port of etcd_client_port"),
        ({"etcd_client_port": "7220"}, "node.etcd_client_port", "is also the port of address"),
        ({"etcd_client_port": "70000"}, "node.etcd_client_port", "70000 is out of range"),
        ({"etcd_program": " "}, "node.etcd_program", "names no program"),
        ({"pids_max": "-1"}, "node.pids_max", "-1 is out of range"),
    ],
)
def test_refused(flags: dict[str, str], field: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        node(flags)
    assert message in caught.value.message
    assert caught.value.field == field
    assert caught.value.hint or "whole number" in message or "not a number" in message


@pytest.mark.parametrize(
    ("table", "field", "message"),
    [
        ({"memroy": "1G"}, "node.memroy", "unknown setting 'memroy' in [node] (did you mean 'memory'?)"),
        ({"quux": 1}, "node.quux", "unknown setting 'quux' in [node] (known: address, allow, archive_keep"),
        ({"memory": ["1G"]}, "node.memory", "[node] memory: a size must be text or a number, not list"),
        ({"name": 3}, "node.name", "[node] name: must be text, not a number"),
        ({"voters_wanted": True}, "node.voters_wanted", "must be a whole number, not a boolean"),
        ({"voter_replace_after": False}, "node.voter_replace_after", "a duration must be text or a number, not bool"),
        ({"voters_wanted": 3.0}, "node.voters_wanted", "must be a whole number, not a number"),
        ({"tags": {"a": 1}}, "node.tags", "must be a list, not a table"),
        ({"tags": [1]}, "node.tags", "must be text, not a number"),
        ({"grace": "soon"}, "node.grace", "[node] grace: not a duration: 'soon'"),
    ],
)
def test_files_are_refused_with_their_path(table: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        node({}, {}, table)
    assert str(caught.value).startswith(ETC)
    assert message in str(caught.value)
    assert caught.value.field == field


@pytest.mark.parametrize("tables", [{"nodes": {}}, {"name": "x"}])
def test_unknown_tables(tables: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="unknown table or setting"):
        resolve({}, {}, [FileTable(ETC, tables)], DEFAULTS)


def test_a_table_must_be_one() -> None:
    with pytest.raises(UserError, match=r"node must be a table \(write \[node\]\)"):
        resolve({}, {}, [FileTable(ETC, {"node": 1})], DEFAULTS)


def test_a_variable_is_named() -> None:
    with pytest.raises(UserError) as caught:
        node({}, {"SPINETTA_MEMORY": "lots"})
    assert str(caught.value).startswith("SPINETTA_MEMORY: not a size")


def test_mistyped_variables_are_warned_of_and_others_left_alone() -> None:
    environ = {"SPINETTA_MEMROY": "1G", "SPINETTA_TASK_ID": "x", "SPINETTA_NODE": "127.0.0.1:1", "SPINETTA_VENV": "y"}
    assert node({}, environ).warnings == (
        "environment variable SPINETTA_MEMROY is no setting (did you mean SPINETTA_MEMORY?)",
    )


def test_client() -> None:
    resolved = resolve_client({}, {"SPINETTA_NODE": "127.0.0.2:7220,localhost:7220,127.0.0.2:7220"}, [])
    assert resolved.settings.nodes == ("127.0.0.2:7220", "127.0.0.1:7220")
    assert str(resolved.origins["nodes"]) == "SPINETTA_NODE"
    resolved = resolve_client(
        {}, {}, [FileTable(ETC, {"client": {"node": ["127.0.0.9:1"], "timeout": "3s"}, "node": {}})]
    )
    assert resolved.settings == config.ClientSettings(("127.0.0.9:1",), 3.0)
    assert resolve_client({}, {}, []).settings.nodes == (config.DEFAULT_ADDRESS,)
    with pytest.raises(UserError, match="--node: names no node"):
        resolve_client({"node": " , "}, {}, [])


def test_every_setting_has_its_own_flag_and_variable() -> None:
    options = [*NODE_OPTIONS, *CLIENT_OPTIONS]
    assert len({o.flag for o in options}) == len({variable(o) for o in options}) == len(options)
    assert all(o.help.endswith(".") for o in options)


@given(st.text(max_size=100))
def test_any_host_name_gives_a_lawful_node_name(host: str) -> None:
    names.check_node_name(names.node_name_from_host(host))


@pytest.mark.parametrize(
    ("host", "name"), [("Big-Box.example.org", "big-box"), ("host_1", "host-1"), ("", "node"), ("--", "node")]
)
def test_node_name_from_host(host: str, name: str) -> None:
    assert names.node_name_from_host(host) == name


@given(st.dictionaries(st.sampled_from([o.key for o in NODE_OPTIONS]), st.text(max_size=20), max_size=4))
def test_no_text_does_more_than_a_user_error(flags: dict[str, str]) -> None:
    try:
        resolved = node(flags)
    except UserError:
        return
    assert all(resolved.origins[o.attribute].kind == "flag" for o in NODE_OPTIONS if o.key in flags)
