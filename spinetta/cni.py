"""How we talk to CNI plugins: one network of one plugin, its request in the environment, its answer in JSON.

Pure. By the specification's versions 0.4.0 and 1.0.0: a configuration on standard input, what to do in variables, a
result or an error on standard output. docs/adr/0042-a-network-behind-the-machines-address.md says why these plugins.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VERSION = "1.0.0"
VERSIONS = ("1.0.0", "0.4.0")  # of plugins that we can talk to, the best first
PLUGINS = ("ptp", "host-local")  # the second is started by the first
FOLDERS = ("/usr/lib/cni", "/opt/cni/bin")  # Debian's place, and that of the project's own packages
INTERFACE = "eth0"  # in the container
NETWORK = "spinetta"
SAID_CHARS_MAX = 300


class PluginError(Exception):
    """A plugin refused, or said what nobody understands. `code` is its own; 0: it gave none."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Attached:
    """What a plugin made.

    Attributes:
        address: of the container.
        gateway: the node's end.
        host_interface: its name on the machine.
    """

    address: ipaddress.IPv4Address
    gateway: ipaddress.IPv4Address
    host_interface: str


def configuration(
    subnet: ipaddress.IPv4Network, leases: str, version: str = VERSION, *, mtu: int = 0
) -> dict[str, object]:
    """Of the network: each container at the end of a cable of its own, with an address out of the subnet.

    `leases` is the folder where addresses that are in use are kept, `mtu` the largest packet (0: the plugin's own
    idea). Addresses are not translated by the plugin: one rule of ours does that for all.
    """
    return {
        "cniVersion": version,
        "name": NETWORK,
        "type": PLUGINS[0],
        "ipMasq": False,
        "mtu": mtu,
        "ipam": {
            "type": PLUGINS[1],
            "dataDir": leases,
            "ranges": [[{"subnet": str(subnet)}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }


def variables(command: str, key: str, netns_path: str, folder: str) -> dict[str, str]:
    """The environment of a plugin. `netns_path` empty: there is none any more, which a deletion copes with."""
    given = {"CNI_COMMAND": command, "CNI_CONTAINERID": key, "CNI_IFNAME": INTERFACE, "CNI_PATH": folder}
    return given | ({"CNI_NETNS": netns_path} if netns_path else {})


def answered(output: bytes, code: int, said: str = "") -> dict[str, Any]:
    """What a plugin printed; of a deletion nothing.

    Args:
        output: its standard output.
        code: its exit code.
        said: its standard error, for when nothing else tells.

    Raises:
        PluginError: it failed.
    """
    try:
        told = json.loads(output) if output.strip() else {}
    except ValueError:
        told = None
    if code == 0 and isinstance(told, dict):
        return told
    if isinstance(told, dict) and (told.get("msg") or told.get("code")):
        number = told.get("code")
        words = ": ".join(str(told[name]) for name in ("msg", "details") if told.get(name))
        raise PluginError(words[:SAID_CHARS_MAX], number if isinstance(number, int) else 0)
    if code == 0:
        raise PluginError("it printed no JSON")
    last = (said or output.decode(errors="replace")).strip().splitlines()
    raise PluginError(last[-1][-SAID_CHARS_MAX:] if last else f"it ended with {code}")


def attached(result: Mapping[str, Any]) -> Attached:
    """What a result says.

    Raises:
        PluginError: not what we need to know.
    """
    try:
        interfaces = result["interfaces"]
        outside = [i["name"] for i in interfaces if not i.get("sandbox")]
        first = next(ip for ip in result["ips"] if ":" not in ip["address"])
        address = ipaddress.IPv4Interface(first["address"]).ip
        gateway = ipaddress.IPv4Address(first["gateway"])
        name = str(outside[0])
    except (KeyError, IndexError, TypeError, ValueError, StopIteration, AttributeError) as e:
        raise PluginError(f"a result without an address and two interfaces: {str(dict(result))[:200]}") from e
    if not name or "/" in name or len(name) > 15 or name.startswith("-"):
        raise PluginError(f"a result with an interface called {name[:20]!r}")
    return Attached(address, gateway, name)


def common_version(output: bytes, code: int = 0) -> str:
    """The version to talk in, by what a plugin answers to VERSION.

    Raises:
        PluginError: there is none.
    """
    told = answered(output, code)
    known = told.get("supportedVersions")
    for version in VERSIONS:
        if isinstance(known, list) and version in known:
            return version
    raise PluginError(f"it speaks none of the versions {', '.join(VERSIONS)}")


def no_addresses(error: PluginError) -> bool:
    """Whether it means that all addresses are in use: the plugin has no code for that."""
    return "no IP addresses available" in str(error)
