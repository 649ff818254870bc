"""Every RPC that Spinetta makes has a deadline, and every stream a bound of its own: found in the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from aetcd.rpc import rpc_pb2 as etcd_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from spinetta.v1 import api_pb2, gateway_pb2, trust_pb2

ROOT = Path(__file__).parents[2] / "spinetta"
RAW = {"unary_unary", "unary_stream", "stream_unary", "stream_stream"}

STREAMS = {
    # where → what ends it when nothing comes any more
    "store/watch.py: Watch": "asked for a sign of life after IDLE_S, which must come within ANSWER_S",
    "store/snapshot.py: Snapshot": "STALL_S for each piece",
    "store/gateway.py: open_stream": "SILENT_S between two messages: the voter gives a sign of life every 5 s",
    "client/channels.py: method(…)": "HTTP/2 keep-alive of 10 s + 5 s (_OPTIONS); the streams open it again",
    "client/execs.py: Exec": "HTTP/2 keep-alive of 10 s + 5 s (channels._OPTIONS): a command may be silent for days",
    "node/services/execute.py: Exec": "HTTP/2 keep-alive of 10 s + 5 s (Peers.OPTIONS); the caller going away",
    "node/services/copying.py: CopyOut": "HTTP/2 keep-alive of 10 s + 5 s (Peers.OPTIONS); the caller going away",
    "node/services/images.py: PullImage": "HTTP/2 keep-alive (Peers.OPTIONS); the limits of the store's errands",
    "node/services/images.py: VerifyImage": "HTTP/2 keep-alive (Peers.OPTIONS); the limits of the store's errands",
    "node/services/nodes.py: Leave": "HTTP/2 keep-alive of 10 s + 5 s (Peers.OPTIONS); the caller's own deadline",
    "node/services/logs.py: Log": "HTTP/2 keep-alive of 10 s + 5 s (Peers.OPTIONS), then LOG_RECONNECT_S",
}


def rpc_names() -> frozenset[str]:
    """The names of all calls of all services that are spoken here, etcd's as well."""
    files = [m.DESCRIPTOR for m in (api_pb2, trust_pb2, gateway_pb2, health_pb2, reflection_pb2, etcd_pb2)]
    return frozenset(m.name for f in files for s in f.services_by_name.values() for m in s.methods)


RPCS = rpc_names()


def calls_of(source: str) -> Iterator[tuple[str, int, bool]]:
    """Calls over the wire in a module: name, line, whether a timeout is given."""
    tree = ast.parse(source)
    raw = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        if isinstance(node.value.func, ast.Attribute) and node.value.func.attr in RAW
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    # A module's name has types of messages behind it, which may be called as an RPC is.
    imports = (n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom))
    imported = {alias.asname or alias.name for n in imports for alias in n.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ""
        match node.func:
            case ast.Attribute(value=ast.Name(id="super" | "self"), attr=_):
                continue
            case ast.Attribute(value=value, attr=attr) if attr in RPCS and _root(value) not in imported:
                name = attr
            case ast.Call(func=ast.Name(id="method" | "pick" | "call")):
                name = "method(…)"
            case ast.Name(id=given) if given in raw:
                name = given
        if name:
            yield name, node.lineno, any(k.arg == "timeout" for k in node.keywords)


def _root(value: ast.expr) -> str:
    """The name that a chain of attributes begins with."""
    while isinstance(value, ast.Attribute):
        value = value.value
    return value.id if isinstance(value, ast.Name) else ""


MODULES = sorted(p for p in ROOT.rglob("*.py") if "v1" not in p.parts and "shim" not in p.parts)


def test_every_call_has_a_deadline_or_is_a_stream_with_a_bound() -> None:
    found, without = 0, set[str]()
    for path in MODULES:
        where = str(path.relative_to(ROOT))
        for name, line, timed in calls_of(path.read_text()):
            found += 1
            if not timed and f"{where}: {name}" not in STREAMS:
                raise AssertionError(f"{where}:{line}: {name} is called without a timeout")
            if not timed:
                without.add(f"{where}: {name}")
    assert without == set(STREAMS), "a stream is listed here that there is not"
    assert found > 20  # it sees them at all


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("await stub.Submit(request)", [("Submit", False)]),
        ("await stub.Submit(request, timeout=3)", [("Submit", True)]),
        ("await EnrollStub(channel).Join(request)", [("Join", False)]),
        ("await stubs.kv.Range(request, metadata=M)", [("Range", False)]),
        ("await (await self._peers.stub(r)).Log(ask)", [("Log", False)]),
        ("await method(stubs)(request)", [("method(…)", False)]),
        ("send = channel.unary_unary(p, e, d)\nawait send(r)", [("send", False)]),
        ("import api\napi.Submit(x)\nCommit(x)\nself.Submit(x)", []),
    ],
)
def test_what_it_sees(line: str, seen: list[tuple[str, bool]]) -> None:
    source = "async def f():\n" + "\n".join(f"    {each}" for each in line.splitlines())
    assert [(name, timed) for name, _, timed in calls_of(source)] == seen
