"""Containers' networks: settings, subnets, rules, nameservers, and what plugins say."""

from __future__ import annotations

import ipaddress
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinetta import cni, network
from spinetta.config import resolve
from spinetta.errors import UserError
from spinetta.network import Subnet

ROUTES: list[dict[str, Any]] = [
    {"dst": "default", "gateway": "192.0.2.1", "dev": "eth1", "metric": 100},
    {"dst": "default", "gateway": "192.0.2.1", "dev": "eth0"},
    {"dst": "192.0.2.0/24", "dev": "eth0"},
    {"type": "local", "dst": "192.0.2.2", "dev": "eth0", "table": "local"},
    {"type": "local", "dst": "127.0.0.0/8", "dev": "lo", "table": "local"},
    {"type": "broadcast", "dst": "10.231.0.255", "dev": "eth0", "table": "local"},
]


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "becomes"),
    [("auto", ""), ("", ""), (" 10.9.0.0/16 ", "10.9.0.0/16"), ("192.168.7.0/29", "192.168.7.0/29")],
)
def test_subnets(text: str, becomes: str) -> None:
    assert network.parse_subnet(text, "node.network_subnet") == becomes


@pytest.mark.parametrize(
    "text",
    ["10.9.0.1/16", "10.9.0.0/30", "10.0.0.0/7", "8.8.8.0/24", "fd00::/64", "127.0.0.0/16", "169.254.0.0/20", "none",
     "240.0.0.0/8", "0.0.0.0/8"],
)  # fmt: skip
def test_what_is_no_subnet_for_containers(text: str) -> None:
    with pytest.raises(UserError) as refused:
        network.parse_subnet(text, "node.network_subnet")
    assert refused.value.field == "node.network_subnet"
    assert refused.value.hint


def test_settings_come_from_file_and_flags() -> None:
    flags = {
        "network_subnet": "10.9.0.0/24",
        "network_nameservers": "192.0.2.53, 192.0.2.54",
        "network_refuse": ["10.0.0.0/8", "192.0.2.7"],
    }
    settings = resolve(flags, {}, (), {"name": "n1", "data_dir": "/d"}).settings
    assert settings.network_subnet == "10.9.0.0/24"
    assert settings.network_nameservers == ("192.0.2.53", "192.0.2.54")
    assert settings.network_refuse == ("10.0.0.0/8", "192.0.2.7/32")
    for key, bad in (("network_nameservers", "127.0.0.53"), ("network_nameservers", "::1"), ("network_refuse", "far")):
        with pytest.raises(UserError):
            resolve({key: bad}, {}, (), {"name": "n1", "data_dir": "/d"})


# --- subnets -----------------------------------------------------------------------------------------------------


def test_a_node_takes_the_first_part_that_is_free() -> None:
    assert str(network.choose("", [], ROUTES)) == "10.231.0.0/20"
    assert str(network.choose("", ["spinetta_10_231_0_0_20", "filter"], ROUTES)) == "10.231.16.0/20"
    taken = [*ROUTES, {"dst": "10.231.16.0/24", "dev": "tun0"}]
    assert str(network.choose("", ["spinetta_10_231_0_0_20"], taken)) == "10.231.32.0/20"
    cables = [*ROUTES, {"dst": "10.231.0.2", "dev": "veth1"}]
    assert str(network.choose("", ["spinetta_10_231_0_0_20"], cables)) == "10.231.16.0/20"
    with pytest.raises(UserError, match="no part of"):
        network.choose("", [], [*ROUTES, {"dst": "10.0.0.0/8", "dev": "tun0"}])


def test_a_subnet_that_is_wanted_and_taken() -> None:
    assert str(network.choose("10.231.0.0/24", [], ROUTES)) == "10.231.0.0/24"
    with pytest.raises(UserError, match=r"another node on this machine has 10\.231\.0\.0/20"):
        network.choose("10.231.0.0/24", ["spinetta_10_231_0_0_20"], ROUTES)
    with pytest.raises(UserError, match=r"a route to 192\.0\.2\.0/24 \(eth0\)"):
        network.choose("192.0.2.0/28", [], ROUTES)
    with pytest.raises(UserError, match=r"a route to 192\.0\.2\.2/32"):
        network.choose("192.0.2.0/28", [], ROUTES[3:])


@given(st.integers(8, 29), st.integers(0, 2**32 - 1), st.integers(8, 29), st.integers(0, 2**32 - 1))
def test_tables_and_groups_tell_subnets_apart(one: int, first: int, other: int, second: int) -> None:
    a, b = (Subnet((number >> (32 - size) << (32 - size), size)) for size, number in ((one, first), (other, second)))
    assert network.subnet_of(network.table_of(a)) == a
    assert 0 <= network.group_of(a) < 2**31
    if not a.overlaps(b):
        assert network.group_of(a) != network.group_of(b)


@pytest.mark.parametrize(
    "name", ["spinetta", "spinetta_10_0_0_0", "spinetta_10_0_0_1_8", "spinetta_999_0_0_0_8", "filter"]
)
def test_other_tables_are_none_of_ours(name: str) -> None:
    assert network.subnet_of(name) is None


def test_addresses_of_a_subnet() -> None:
    assert network.addresses(Subnet("10.0.0.0/29")) == 5
    assert network.addresses(Subnet("10.0.0.0/20")) == 4093


def test_what_routes_tell() -> None:
    assert network.own_addresses(ROUTES) == {"192.0.2.2", "127.0.0.0/8"}
    assert network.default_interface(ROUTES) == "eth0"
    assert network.default_interface(ROUTES[2:]) == ""


def test_bridges_to_other_machines_and_those_to_neighbours_on_this_one() -> None:
    def bridge(name: str) -> dict[str, Any]:
        return {"ifname": name, "linkinfo": {"info_kind": "bridge"}}

    links = [
        {"ifname": "lo"},
        *map(bridge, ("docker0", "br0", "virbr0", "vmbr0")),
        {"ifname": "veth1", "master": "docker0", "linkinfo": {"info_kind": "veth"}},
        {"ifname": "veth2", "master": "br0", "linkinfo": {"info_kind": "veth"}},
        {"ifname": "eth1", "master": "vmbr0"},
        {"ifname": "bond0", "linkinfo": {"info_kind": "bond"}},
    ]
    assert network.bridges_out(links, ROUTES) == ["vmbr0"]
    assert network.bridges_out(links, [{"dst": "default", "gateway": "192.0.2.1", "dev": "br0"}]) == ["br0", "vmbr0"]
    several = {"dst": "default", "nexthops": [{"gateway": "192.0.2.1", "dev": "br0"}, {"dev": "docker0"}]}
    assert network.bridges_out(links, [several]) == ["br0", "vmbr0"]


# --- rules -------------------------------------------------------------------------------------------------------


def test_rules_are_one_transaction_that_replaces_the_table() -> None:
    text = network.rules(Subnet("10.231.0.0/20"), refused=("10.0.0.0/8",))
    lines = text.splitlines()
    assert lines[:2] == ["add table inet spinetta_10_231_0_0_20", "delete table inet spinetta_10_231_0_0_20"]
    assert "10.0.0.0/8" in text
    assert "169.254.0.0/16" in text
    assert network.MARK not in text
    assert "@between" not in text
    marked = network.rules(
        Subnet("10.231.0.0/20"), was_off=True, between=("eth0", "eth1"), there=("eth0", "eth1", "eth2")
    )
    assert f"chain {network.MARK}" in marked
    assert 'set between { type ifname; elements = { "eth0", "eth1" } }' in marked
    assert 'set there { type ifname; elements = { "eth0", "eth1", "eth2" } }' in marked
    empty = network.rules(Subnet("10.231.0.0/20"), was_off=True)
    assert f"chain {network.MARK}" in empty
    assert "@between" not in empty


def test_names_that_would_say_something_else_in_a_rule_are_left_out() -> None:
    assert network.uplinks(["eth0", "lo", 'a"; drop', "x y", "wlan0.7", "eth0"]) == ["eth0", "wlan0.7"]


def test_a_firewall_that_drops() -> None:
    chain = {"family": "ip", "table": "filter", "name": "FORWARD", "hook": "forward", "policy": "drop"}
    assert network.forward_drops([{"metainfo": {}}, {"chain": chain}]) == "ip filter FORWARD"
    for change in ({"policy": "accept"}, {"hook": "input"}, {"family": "ip6"}):
        assert network.forward_drops([{"chain": chain | change}]) == ""


# --- names -------------------------------------------------------------------------------------------------------

OWN = frozenset({"192.0.2.2"})


@pytest.mark.parametrize(
    ("given_", "texts", "found"),
    [
        ((), ["nameserver 192.0.2.53\nsearch far.example\n"], "nameserver 192.0.2.53\nsearch far.example\n"),
        ((), ["nameserver 127.0.0.53\n", "nameserver 192.0.2.9\n"], "nameserver 192.0.2.9\n"),
        ((), ["nameserver 192.0.2.2\nnameserver ::1\nnameserver fe80::1%eth0\nsearch a\n"], "search a\n"),
        (("198.51.100.1",), ["nameserver 192.0.2.53\noptions edns0\n"], "nameserver 198.51.100.1\noptions edns0\n"),
        (
            (),
            ["nameserver\t192.0.2.53 # ours\n nameserver  192.0.2.54\nnameserver\n"],
            "nameserver 192.0.2.53\nnameserver 192.0.2.54\n",
        ),
        ((), [], ""),
        ((), ["#nameserver 192.0.2.53\nnonsense\n\0\n"], ""),
    ],
)
def test_nameservers_that_containers_reach(given_: tuple[str, ...], texts: list[str], found: str) -> None:
    text = network.resolv_text(OWN, given_, texts)
    assert text == found
    assert network.has_nameserver(text) == ("nameserver" in found)


def test_no_more_nameservers_than_are_read() -> None:
    text = "".join(f"nameserver 192.0.2.{i}\n" for i in range(10, 20))
    assert network.resolv_text(OWN, (), [text]).count("nameserver") == 3


# --- plugins -----------------------------------------------------------------------------------------------------

RESULT: dict[str, Any] = {
    "cniVersion": "1.0.0",
    "interfaces": [{"name": "veth1", "mac": "x"}, {"name": "eth0", "sandbox": "/n"}],
    "ips": [{"address": "10.231.0.2/20", "gateway": "10.231.0.1", "interface": 1}],
}


def test_a_result() -> None:
    made = cni.attached(RESULT)
    assert (str(made.address), str(made.gateway), made.host_interface) == ("10.231.0.2", "10.231.0.1", "veth1")


@pytest.mark.parametrize(
    "change",
    [
        {"interfaces": []}, {"interfaces": None}, {"ips": []}, {"ips": [{"address": "fd00::2/64"}]}, {"ips": [{}]},
        {"ips": [{"address": "10.0.0.2/24"}]}, {"ips": 7}, {"interfaces": [{"name": "-a"}]},
        {"interfaces": [{"name": "../../x"}]}, {"interfaces": [{"name": "sixteen-letters-"}]}, {"interfaces": [7]},
    ],
)  # fmt: skip
def test_results_that_do_not_say_what_is_needed(change: dict[str, Any]) -> None:
    with pytest.raises(cni.PluginError):
        cni.attached(RESULT | change)


def test_what_plugins_answer() -> None:
    assert cni.answered(b"", 0) == {}
    assert cni.answered(json.dumps(RESULT).encode(), 0) == RESULT
    with pytest.raises(cni.PluginError, match="no room: at all") as failed:
        cni.answered(b'{"code": 11, "msg": "no room", "details": "at all"}', 1)
    assert failed.value.code == 11
    for out, code, said, why in (
        (b"", 2, "panic\nlast words\n", "last words"),
        (b"", 2, "", "ended with 2"),
        (b"[1]", 0, "", "no JSON"),
        (b'{"code": "x", "msg": 5}', 1, "", "5"),
    ):
        with pytest.raises(cni.PluginError, match=why):
            cni.answered(out, code, said)


@given(st.binary(max_size=200), st.integers(0, 2))
def test_any_bytes_are_an_answer_or_an_error(output: bytes, code: int) -> None:
    try:
        told = cni.answered(output, code)
    except cni.PluginError:
        return
    assert code == 0
    assert isinstance(told, dict)


def test_versions() -> None:
    assert cni.common_version(b'{"supportedVersions": ["0.4.0", "1.0.0"]}') == "1.0.0"
    assert cni.common_version(b'{"supportedVersions": ["0.3.0", "0.4.0"]}') == "0.4.0"
    for told in (b'{"supportedVersions": ["0.2.0"]}', b"{}", b'{"supportedVersions": 7}'):
        with pytest.raises(cni.PluginError, match="none of the versions"):
            cni.common_version(told)


def test_a_request() -> None:
    config = cni.configuration(Subnet("10.231.0.0/20"), "/run/leases", mtu=1400)
    assert config["type"] == "ptp"
    assert config["mtu"] == 1400
    assert cni.variables("DEL", "a.1", "", "/usr/lib/cni").get("CNI_NETNS") is None
    assert cni.variables("ADD", "a.1", "/n", "/usr/lib/cni")["CNI_NETNS"] == "/n"
    assert cni.no_addresses(cni.PluginError("failed: no IP addresses available in range set: 1-2"))
    assert network.hosts_text("n1", ipaddress.IPv4Address("10.0.0.2")).endswith("10.0.0.2 n1\n")
