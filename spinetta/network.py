"""The containers' network of a node: which addresses, what passes and what does not, who answers for names.

Pure: routes and files come in, text for nft(8) and resolv.conf comes out. All rules are of one table of the node's own,
made and removed as a whole. docs/adr/0042-a-network-behind-the-machines-address.md says why.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spinetta import names
from spinetta.errors import UserError

Subnet = ipaddress.IPv4Network
POOL = ipaddress.IPv4Network("10.231.0.0/16")
POOL_PREFIX = 20  # 16 nodes on one machine, each with 4093 addresses: eight for each attempt that a node may hold
PREFIX_MAX = 29  # five addresses
PREFIX_MIN = 8
NOT_FOR_CONTAINERS = 3  # addresses of a subnet: its own, the node's, broadcast
NAMESERVERS_MAX = 3  # as many as the resolver reads
REFUSE_MAX = 256  # each is an element of a set that is looked up in no time; more is a mistake
TABLE_PREFIX = "spinetta_"
MARK = "forwarding_was_off"  # a chain that says so
SYSTEMD_RESOLV = "/run/systemd/resolve/resolv.conf"  # what systemd-resolved, on loopback, asks itself
# Never forwarded: loopback, link-local (169.254.169.254 tells a cloud's machine its secrets; with one cloud
# 100.100.100.200 does), multicast, reserved.
REFUSED_ALWAYS = ("0.0.0.0/8", "100.100.100.200/32", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4")
REFUSED_PORTS = "ip daddr 168.63.129.16 tcp dport { 80, 32526 }"  # such a service as well, and a nameserver beside it
FLOWS_MAX = 4096  # of a container at once; a machine usually keeps 262144 for all, itself among them
_INTERFACE = re.compile(r"[A-Za-z0-9_.:@+-]{1,15}", re.ASCII)
_TABLE = re.compile(rf"{TABLE_PREFIX}(\d+)_(\d+)_(\d+)_(\d+)_(\d+)", re.ASCII)


# --- settings ----------------------------------------------------------------------------------------------------


def parse_subnet(text: str, field: str) -> str:
    """A subnet for containers, in its usual form; ``auto`` is empty.

    Raises:
        UserError: it is none, or not a private one.
    """
    if text.strip().lower() in ("", "auto"):
        return ""
    subnet = _network(text, field)
    if not subnet.is_private or not PREFIX_MIN <= subnet.prefixlen <= PREFIX_MAX:
        raise UserError(
            f"not a subnet for containers: {names.quoted(text)}",
            field=field,
            hint=f"a private one of /{PREFIX_MIN} to /{PREFIX_MAX}, e.g. {POOL}; auto: a free part of {POOL}",
        )
    if any(subnet.overlaps(Subnet(refused)) for refused in REFUSED_ALWAYS):
        raise UserError(f"{subnet} is never forwarded", field=field, hint=f"e.g. {POOL}")
    return str(subnet)


def parse_refused(text: str, field: str) -> str:
    """Addresses that containers may not reach: one address or a subnet, in its usual form. Raises UserError."""
    return str(_network(text, field))


def parse_nameserver(text: str, field: str) -> str:
    """An IPv4 address that containers can reach. Raises UserError."""
    try:
        address = ipaddress.IPv4Address(text.strip())
    except ValueError:
        raise UserError(f"not an IPv4 address: {names.quoted(text)}", field=field, hint="e.g. 192.0.2.53") from None
    if address.is_loopback or address.is_unspecified or address.is_multicast:
        raise UserError(f"no container reaches {address}", field=field, hint="an address of another machine")
    return str(address)


def _network(text: str, field: str) -> Subnet:
    try:
        return Subnet(text.strip())
    except ValueError as e:
        raise UserError(f"not a subnet: {names.quoted(text)}: {e}", field=field, hint="e.g. 10.40.0.0/16") from None


# --- addresses ---------------------------------------------------------------------------------------------------


def addresses(subnet: Subnet) -> int:
    """How many containers it has room for."""
    return max(subnet.num_addresses - NOT_FOR_CONTAINERS, 0)


def choose(wanted: str, tables: Iterable[str], routes: Sequence[Mapping[str, Any]]) -> Subnet:
    """The subnet of a node.

    Args:
        wanted: the setting; empty: the first free part of `POOL`.
        tables: of other nodes on this machine.
        routes: all of the machine's, as ip(8) tells them in JSON.

    Raises:
        UserError: it is taken, or no part is free.
    """
    others = [subnet for name in tables if (subnet := subnet_of(name)) is not None]
    for candidate in [Subnet(wanted)] if wanted else POOL.subnets(new_prefix=POOL_PREFIX):
        if not (why := _taken(candidate, others, routes)):
            return candidate
        if wanted:
            raise UserError(
                f"network_subnet {wanted}: {why}",
                field="node.network_subnet",
                hint="choose another, or auto",
                reason="subnet-taken",
            )
    raise UserError(
        f"no part of {POOL} is free for containers",
        field="node.network_subnet",
        hint="set network_subnet",
        reason="subnet-taken",
    )


def _taken(subnet: Subnet, others: Sequence[Subnet], routes: Sequence[Mapping[str, Any]]) -> str:
    if other := next((other for other in others if other.overlaps(subnet)), None):
        return f"another node on this machine has {other}"
    for route in routes:
        to = _destination(route)
        if to is None or to.prefixlen == 0 or not to.overlaps(subnet):
            continue
        if any(to.subnet_of(other) for other in others):
            continue  # a cable of one of its containers
        return f"this machine has a route to {to} ({route.get('dev') or route.get('type') or 'unknown'})"
    return ""


def own_addresses(routes: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """The machine's own addresses, by its routes."""
    return frozenset(str(r.get("dst")) for r in routes if r.get("type") == "local")


def default_interface(routes: Sequence[Mapping[str, Any]]) -> str:
    """The interface that leads to the outside; empty: none does."""
    found = [r for r in routes if r.get("dst") == "default" and r.get("table", "main") == "main" and r.get("dev")]
    return str(min(found, key=_metric)["dev"]) if found else ""


def bridges_out(links: Sequence[Mapping[str, Any]], routes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Bridges that lead to other machines, as they do where virtual machines run: a gateway is behind it, or a real
    interface is one of its ports. Others are those of containers and machines on this one.

    Args:
        links: all interfaces, as ``ip -d`` tells them in JSON.
        routes: all routes.
    """
    kinds = {str(link.get("ifname")): str((link.get("linkinfo") or {}).get("info_kind") or "") for link in links}
    hops = [hop for route in routes for hop in (route, *(route.get("nexthops") or ()))]
    to_gateways = {str(hop.get("dev")) for hop in hops if hop.get("gateway")}
    guests = ("veth", "tun", "dummy")
    of_ports = {str(link.get("master")) for link in links if kinds[str(link.get("ifname"))] not in guests}
    return uplinks(name for name, kind in kinds.items() if kind == "bridge" and name in to_gateways | of_ports)


def _metric(route: Mapping[str, Any]) -> int:
    metric = route.get("metric", 0)
    return metric if isinstance(metric, int) else 0


def _destination(route: Mapping[str, Any]) -> Subnet | None:
    if route.get("type") in ("broadcast", "multicast"):
        return None
    try:
        return Subnet(str(route.get("dst")))
    except ValueError:  # "default"
        return None


# --- rules -------------------------------------------------------------------------------------------------------


def table_of(subnet: Subnet) -> str:
    """The name of a node's table: two nodes with one subnet cannot both make it."""
    return f"{TABLE_PREFIX}{str(subnet).replace('.', '_').replace('/', '_')}"


def subnet_of(table: str) -> Subnet | None:
    """Of a table, by its name; None: it is not ours."""
    found = _TABLE.fullmatch(table)
    if found is None:
        return None
    try:
        return Subnet(f"{'.'.join(found.groups()[:4])}/{found[5]}")
    except ValueError:
        return None


def group_of(subnet: Subnet) -> int:
    """The group that the node's ends of its cables are in; no other node of the machine has it."""
    return int(subnet.network_address) >> (32 - PREFIX_MAX)


def uplinks(interfaces: Iterable[str]) -> list[str]:
    """Names that can stand in a rule, sorted, without loopback."""
    return sorted({name for name in interfaces if name != "lo" and _INTERFACE.fullmatch(name)})


def rules(
    subnet: Subnet,
    *,
    refused: Sequence[str] = (),
    was_off: bool = False,
    between: Sequence[str] = (),
    there: Sequence[str] = (),
    bridges: Sequence[str] = (),
) -> str:
    """The whole table, for ``nft -f -``: made anew if it is there, all at once.

    A container begins connections to the outside, in the machine's name. Nothing begins one with a container, and a
    container none with the machine itself or another container.

    Args:
        refused: more destinations that are refused.
        was_off: the machine forwarded nothing before.
        between: interfaces of which nothing is forwarded to those that are `there`, since nothing was before.
        there: interfaces of before.
        bridges: those that lead to other machines; behind others are neighbours that are refused.
    """
    name, group = table_of(subnet), group_of(subnet)
    never = ", ".join(str(net) for net in ipaddress.collapse_addresses(map(Subnet, (*REFUSED_ALWAYS, *refused))))
    lines = [f"add table inet {name}", f"delete table inet {name}", f"table inet {name} {{"]
    if was_off:
        lines.append(f"  chain {MARK} {{ }}")
    for called, interfaces in (("between", between), ("there", there), ("bridges", bridges)):
        quoted = ", ".join(f'"{name}"' for name in interfaces)
        elements = f"elements = {{ {quoted} }} " if interfaces else ""
        lines.append(f"  set {called} {{ type ifname; {elements}}}")
    lines += [
        "  set flows { type ipv4_addr; size 65535; flags dynamic; }",
        f"  set refused {{ type ipv4_addr; flags interval; elements = {{ {never} }} }}",
        "  chain prerouting { type filter hook prerouting priority raw; policy accept;",
        f"    iifgroup {group} meta nfproto ipv6 drop",
        f"    iifgroup {group} ip saddr != {subnet} drop",
        f"    iifgroup {group} fib saddr . iif oif missing drop",
        # Else another's rule could send it on, to whatever publishes a port there, before it is refused as input.
        f"    iifgroup {group} fib daddr type local notrack",
        "  }",
        "  chain input { type filter hook input priority filter - 5; policy accept;",
        f"    iifgroup {group} reject with icmpx admin-prohibited",
        "  }",
        "  chain output { type filter hook output priority filter - 5; policy accept;",
        f"    oifgroup {group} ct state new reject with icmpx admin-prohibited",
        "  }",
        "  chain out { ",
        "    ct state invalid drop",  # it would leave as it is: what belongs to no connection is not translated
        f"    ct state new add @flows {{ ip saddr ct count over {FLOWS_MAX} }} reject with icmpx admin-prohibited",
        f"    oifgroup {group} reject with icmpx admin-prohibited",
        "    ip daddr @refused reject with icmpx admin-prohibited",
        f"    {REFUSED_PORTS} reject with icmpx admin-prohibited",
        '    meta oifkind "bridge" oifname != @bridges reject with icmpx admin-prohibited',
        "  }",
        "  chain in { ",
        "    ct state established,related accept",
        "    drop",
        "  }",
        "  chain forward { type filter hook forward priority filter - 5; policy accept;",
        *(["    iifname @between oifname @there drop"] if between else []),
        f"    iifgroup {group} goto out",
        f"    oifgroup {group} goto in",
        "  }",
        "  chain postrouting { type nat hook postrouting priority srcnat; policy accept;",
        f"    ip saddr {subnet} oifgroup != {group} masquerade",
        "  }",
        "}",
    ]
    return "\n".join(lines) + "\n"


def forward_drops(listed: Sequence[Mapping[str, Any]]) -> str:
    """The chain of another firewall that drops what the machine forwards unless it knows it; empty: none does.

    Args:
        listed: what ``nft -j list chains`` tells.
    """
    for entry in listed:
        chain = entry.get("chain") or {}
        if chain.get("hook") == "forward" and chain.get("policy") == "drop" and chain.get("family") in ("ip", "inet"):
            return f"{chain.get('family')} {chain.get('table')} {chain.get('name')}"
    return ""


# --- names -------------------------------------------------------------------------------------------------------


def resolv_text(own: frozenset[str], given: Sequence[str], texts: Iterable[str]) -> str:
    """A resolv.conf for containers, of nameservers that they can reach; without any if there are none.

    Args:
        own: the machine's own addresses, which containers do not reach.
        given: the setting; when there are some they count, and no others.
        texts: the machine's own files; the first that names a nameserver of use counts.
    """
    said: list[str] = []
    found = list(given)
    for text in texts:
        servers, others = _read_resolv(text, own)
        said = said or others
        if not found and servers:
            found, said = servers, others
    return "".join(f"{line}\n" for line in (*(f"nameserver {s}" for s in found[:NAMESERVERS_MAX]), *said))


def has_nameserver(text: str) -> bool:
    """Whether a resolv.conf names one."""
    return any(line.startswith("nameserver ") for line in text.splitlines())


def _read_resolv(text: str, own: frozenset[str]) -> tuple[list[str], list[str]]:
    servers: list[str] = []
    others: list[str] = []
    for line in text.splitlines()[:100]:
        word, *rest = line.split() or [""]
        if word == "nameserver":
            try:
                address = ipaddress.IPv4Address(rest[0] if rest else "")
            except ValueError:  # IPv6, which containers have not got
                continue
            if not (address.is_loopback or address.is_link_local or address.is_unspecified or str(address) in own):
                servers.append(str(address))
        elif word in ("search", "domain", "options"):
            others.append(line.strip())
    return servers, others


def hosts_text(hostname: str, address: ipaddress.IPv4Address) -> str:
    """A file for /etc/hosts: a container knows itself, by the address that it has."""
    return f"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n{address} {hostname}\n"
