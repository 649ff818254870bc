"""The syntax of names: nodes, tags, countables, labels, owners, addresses. One place, so that a name accepted by the
command line is never refused by a node."""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Iterable

from spinetta.errors import UserError

NODE_NAME_MAX = 63  # characters, as a DNS label: names become parts of keys, paths and certificates
TAG_MAX = 63
COUNTABLE_NAME_MAX = 63
LABEL_KEY_MAX = 128
LABEL_VALUE_MAX = 256
OWNER_MAX = 128
CLEARANCE_MAX = 63
SECRET_NAME_MAX = 128

_NODE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:=-]{0,62}", re.ASCII)
_COUNTABLE = re.compile(r"[a-z][a-z0-9._-]{0,62}", re.ASCII)
_LABEL_KEY = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._/-]{0,126}[A-Za-z0-9_])?", re.ASCII)
_OWNER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@+-]{0,127}", re.ASCII)
_HOST = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})(?:\.[A-Za-z0-9][A-Za-z0-9-]{0,62})*", re.ASCII)
_CLEARANCE = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?", re.ASCII)
_SECRET = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", re.ASCII)
_NOT_IN_A_NAME = re.compile(r"[^a-z0-9-]+", re.ASCII)

_RESERVED_COUNTABLES = frozenset({"cpu", "cpus", "memory", "disk"})

LOOPBACK = ipaddress.ip_network("127.0.0.0/8")


def check_node_name(name: str, field: str = "") -> str:
    """The name, if it is one for a node: like a DNS label, at most 63 of ``a-z 0-9 -``, no ``-`` at either end.

    Raises:
        UserError: it is not.
    """
    if not _NODE.fullmatch(name):
        raise UserError(
            f"not a name for a node: {quoted(name)}",
            field=field,
            hint=f"1 to {NODE_NAME_MAX} of a-z, 0-9 and '-', beginning and ending with a letter or digit",
        )
    return name


def node_name_from_host(host: str) -> str:
    """A lawful node name near a host name: its first label in lower case; ``node`` when nothing is left."""
    label = _NOT_IN_A_NAME.sub("-", host.partition(".")[0].lower()).strip("-")[:NODE_NAME_MAX].strip("-")
    return label or "node"


def check_tag(tag: str, field: str = "") -> str:
    """The tag, if it is one: at most 63 of letters, digits and ``. _ : = -``, beginning with a letter or digit."""
    if not _TAG.fullmatch(tag):
        raise UserError(
            f"not a tag: {quoted(tag)}",
            field=field,
            hint=f"1 to {TAG_MAX} letters, digits and '._:=-', beginning with a letter or digit",
        )
    return tag


def check_countable_name(name: str, field: str = "") -> str:
    """The name, if it is one for a countable resource such as ``gpu``; ``cpu``, ``memory``, ``disk`` are taken."""
    if name in _RESERVED_COUNTABLES:
        raise UserError(
            f"{name!r} is no countable: it has an option of its own", field=field, hint="use cpus, memory or disk"
        )
    if not _COUNTABLE.fullmatch(name):
        raise UserError(
            f"not a name for a countable: {quoted(name)}",
            field=field,
            hint=f"1 to {COUNTABLE_NAME_MAX} of a-z, 0-9 and '._-', beginning with a letter, e.g. gpu",
        )
    return name


def check_label(key: str, value: str, field: str = "") -> None:
    """Raise UserError unless key and value make a label."""
    if not _LABEL_KEY.fullmatch(key):
        raise UserError(
            f"not a label's key: {quoted(key)}",
            field=field,
            hint=f"1 to {LABEL_KEY_MAX} letters, digits and '._/-', beginning and ending with a letter, digit or '_'",
        )
    if len(value) > LABEL_VALUE_MAX:
        raise UserError(
            f"label {key!r} has {len(value)} characters",
            field=field,
            hint=f"at most {LABEL_VALUE_MAX}",
            reason="too-large",
        )
    check_printable(value, f"label {key!r}", field)


def check_owner(owner: str, field: str = "", what: str = "an owner") -> None:
    """Raise UserError unless `owner` is empty or like a login name or mail address."""
    if owner and not _OWNER.fullmatch(owner):
        raise UserError(
            f"not {what}: {quoted(owner)}", field=field, hint=f"1 to {OWNER_MAX} letters, digits and '._@+-'"
        )


def check_clearance(label: str, field: str = "") -> str:
    """The label, if it is one that nodes are cleared for and tasks carry.

    Raises:
        UserError: it is not.
    """
    if not _CLEARANCE.fullmatch(label):
        raise UserError(
            f"not a clearance label: {quoted(label)}",
            field=field,
            hint=f"1 to {CLEARANCE_MAX} of a-z, 0-9 and '._-', beginning and ending with a letter or digit",
        )
    return label


def check_secret_name(name: str, field: str = "", what: str = "a secret") -> str:
    """The name, if it is one for a secret or for the file that a task gets it in: no slash, no leading dot.

    Raises:
        UserError: it is not.
    """
    if not _SECRET.fullmatch(name):
        raise UserError(
            f"not a name for {what}: {quoted(name)}",
            field=field,
            hint=f"1 to {SECRET_NAME_MAX} letters, digits and '._-', beginning with a letter, digit or '_'",
        )
    return name


def check_printable(text: str, what: str, field: str) -> None:
    """Raise UserError when `text` holds control characters or halves of surrogate pairs: tables and logs show it."""
    for c in text:
        if ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000:
            raise UserError(f"{what} holds the character U+{ord(c):04X}", field=field, hint="remove control characters")


def check_address(address: str, field: str = "") -> str:
    """HOST:PORT in canonical form: IPv4 address, IPv6 address in brackets, or DNS name (`localhost`: 127.0.0.1).

    Raises:
        UserError: not HOST:PORT, no such port, or no such host can be.
    """
    host, colon, port_text = address.strip().rpartition(":")
    hint = "write HOST:PORT, e.g. 127.0.0.1:7220"
    if not colon or not host:
        raise UserError(f"not an address: {quoted(address)}", field=field, hint=hint)
    if not (port_text.isascii() and port_text.isdecimal()) or not 1 <= int(port_text[:6]) <= 65535:
        raise UserError(f"not a port: {quoted(port_text)} in {quoted(address)}", field=field, hint="1 to 65535")
    if host.lower() == "localhost":
        host = "127.0.0.1"
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        ip = ipaddress.ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        if bracketed or not _HOST.fullmatch(host) or host.rpartition(".")[2].isdecimal():
            raise UserError(f"not a host: {quoted(host)} in {quoted(address)}", field=field, hint=hint) from None
        return f"{host.lower()}:{int(port_text)}"
    if ip.version == 6 and not bracketed:
        raise UserError(f"not an address: {quoted(address)}", field=field, hint="write IPv6 as [ADDRESS]:PORT")
    return f"[{ip}]:{int(port_text)}" if ip.version == 6 else f"{ip}:{int(port_text)}"


def check_own_address(address: str, field: str = "") -> str:
    """As `check_address`, for a node itself: an IP address that the others can reach it at, so not 0.0.0.0 or ``[::]``.

    Raises:
        UserError: it is none.
    """
    found = check_address(address, field)
    host = bare_host(found)
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        raise UserError(
            f"address {quoted(address)} is a name", field=field, hint="a node listens on an IP address of its machine"
        ) from None
    if ip.is_unspecified or ip.is_multicast:
        raise UserError(
            f"address {quoted(address)} is of no machine: the other nodes are told of it and must reach this one there",
            field=field,
            hint="the address of one network interface, e.g. 10.0.0.5:7220",
        )
    return found


def bare_host(address: str) -> str:
    """The host of a HOST:PORT, without the brackets of IPv6."""
    host = address.rpartition(":")[0]
    return host[1:-1] if host.startswith("[") else host


def is_loopback(address: str) -> bool:
    """True when the host of a HOST:PORT is an IPv4 address in 127.0.0.0/8, the only place for plain text."""
    try:
        return ipaddress.ip_address(bare_host(address)) in LOOPBACK
    except ValueError:
        return False


def require_loopback(address: str, field: str = "") -> str:
    """The address, if plain text may be spoken to it.

    Raises:
        UserError: it is off loopback (reason ``off-loopback``).
    """
    if not is_loopback(address):
        raise UserError(
            f"address {quoted(address)} is off loopback, where plain text is not spoken: anyone on the network could "
            "read it, and run programs here",
            field=field,
            hint="log in to the cluster with `spinetta login`, or use an address in 127.0.0.0/8",
            reason="off-loopback",
        )
    return address


def quoted(text: str) -> str:
    """For a message: as Python shows it, shortened."""
    return repr(text) if len(text) <= 80 else repr(text[:77] + "...")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint naming the nearest known word, or all of them when none is near."""
    choices = sorted(known)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(choices)}"


def is_below(path: str, top: str) -> bool:
    """Whether a plain path is `top` or below it: ``/data/a`` is below ``/data``, ``/database`` is not."""
    return path == top or path.startswith(top.rstrip("/") + "/")
