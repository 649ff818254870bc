"""A secured cluster on a network of its own: three voters and two workers, joined by tokens only.

Each node lives in a network namespace that the test makes. What runs in them is the whole thing: daemons, shims, etcd,
certificates. The test itself sits on the bridge, as a person's machine or an attacker's would.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.harness import API_PORT, CLIENT_PORT, PEER_PORT, Node, eventually
from tests.cluster.netns import NetCluster, can_make_namespaces, network

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.xdist_group("secured"),
    pytest.mark.skipif(not can_make_namespaces(), reason="network namespaces take root, ip(8) and nsenter(1)"),
]

OPTIONS = ("--cpus", "2", "--memory", "1GiB", "--lease-ttl", "8s", "--kill-margin", "2s", "--grace", "15s")
LABEL = "patients"
CLI = (sys.executable, "-m", "spinetta.cli")
SHORT_S = 30.0  # lifetime of the nodes' certificates: each is renewed several times meanwhile


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetCluster]:
    with network(tmp_path_factory.mktemp("net"), *OPTIONS) as cluster:
        cluster.add(name="v1")
        cluster.wait_ready()
        cluster.cli("policy", "set", "--node-certificate", f"{SHORT_S:g}s")
        voters = cluster.token("voter", "--uses", "2")
        cluster.add(name="v2", token=voters)
        cluster.add(name="v3", token=voters)
        cluster.add(name="w1", token=cluster.token("worker", "--clearance", LABEL))
        cluster.add(name="w2", token=cluster.token("worker"))
        cluster.wait_ready()
        cluster.wait_voters(3)
        cluster.cli("user", "set", "admin", "--clearance", LABEL)
        yield cluster


def submit(net: NetCluster, *command: str, options: tuple[str, ...] = (), node: int = 0) -> str:
    return net.cli("submit", *options, "--", *command, node=node).stdout.strip()


def ended(net: NetCluster, *ids: str, within_s: float = 60) -> list[dict[str, Any]]:
    """The tasks, once all have ended."""
    net.cli("wait", "--timeout", f"{within_s:g}s", *ids, check=False, timeout_s=within_s + 30)
    return list(net.json("status", *ids)["tasks"])


def many(net: NetCluster, count: int, script: str, *options: str) -> list[str]:
    """Submit as many tasks in one call."""
    lines = "\n".join(json.dumps({"command": ["sh", "-c", script], "cpus": 0.5}) for _ in range(count))
    return net.cli("submit", "--file", "-", "--format", "jsonl", *options, stdin=lines).stdout.split()


def test_tasks_run_on_voters_and_on_workers(net: NetCluster) -> None:
    tasks = ended(net, *many(net, 60, "sleep 0.3"), within_s=120)
    assert Counter(t["outcome"] for t in tasks) == {"succeeded": 60}
    assert {t["node"] for t in tasks} == {"v1", "v2", "v3", "w1", "w2"}


def test_any_node_takes_a_task_and_gives_its_log(net: NetCluster) -> None:
    for i, node in enumerate(net.nodes):
        task = submit(net, "echo", f"by way of {node.name}", node=i)
        ended(net, task)
        for j in (i, (i + 2) % 5):
            assert net.cli("log", task, node=j).stdout == f"by way of {node.name}\n"


def test_a_labelled_task_runs_where_it_is_cleared_and_its_payload_is_nowhere_in_clear(net: NetCluster) -> None:
    word = "hippocampus-4711"
    tasks = [
        submit(net, "sh", "-c", f"echo {word}; sleep 0.2", options=("--clearance", LABEL, "--name", f"n-{word}"))
        for _ in range(6)
    ]
    found = ended(net, *tasks)
    assert {(t["node"], t["outcome"]) for t in found} == {("w1", "succeeded")}
    assert net.cli("log", tasks[0]).stdout == f"{word}\n"
    assert word not in net.cli("status", *tasks).stdout
    for node in net.nodes[:3]:
        strings = subprocess.run(
            ["grep", "-r", "-a", "-l", word, str(node.data_dir)], capture_output=True, text=True, check=False
        )
        assert strings.stdout == "", f"{word} lies in clear on {node.name}: {strings.stdout}"
    # The bytes are searched where they are, and the search itself is shown to find what is in clear.
    plain = submit(net, "echo", "seahorse-4712")
    ended(net, plain)
    member = net.nodes[0].data_dir / "etcd"
    assert subprocess.run(["grep", "-r", "-a", "-q", "seahorse-4712", str(member)], check=False).returncode == 0


def test_a_label_nobody_is_cleared_for_waits_and_says_why(net: NetCluster) -> None:
    net.cli("user", "set", "admin", "--clearance", f"{LABEL},moon")
    refused = net.cli("submit", "--clearance", "moon", "--", "true", check=False)
    assert refused.returncode == 2
    assert "moon" in refused.stderr


def test_a_secret_reaches_its_task_as_a_file_and_nothing_else(net: NetCluster) -> None:
    value = "correct-horse-battery-staple"
    net.cli("secret", "set", "db", stdin=value)
    task = submit(
        net,
        "sh",
        "-c",
        'sha256sum < "$SPINETTA_SECRETS/db"; stat -f -c %T "$SPINETTA_SECRETS"; env | grep -c horse',
        options=("--secret", "db"),
    )
    ended(net, task)
    digest = subprocess.run(["sha256sum"], input=value.encode(), capture_output=True, check=True).stdout.decode()
    assert net.cli("log", task).stdout.splitlines() == [digest.strip(), "tmpfs", "0"]
    for node in net.nodes:
        where = subprocess.run(
            ["grep", "-r", "-a", "-l", value, str(node.data_dir)], capture_output=True, text=True, check=False
        )
        assert where.stdout == ""
    assert value not in json.dumps(net.json("secret", "list"))


# --- the door ------------------------------------------------------------------------------------------------------


def ports_of(net: NetCluster) -> list[tuple[str, int]]:
    found = [(n.host, API_PORT) for n in net.nodes]
    return found + [(n.host, p) for n in net.nodes[:3] for p in (CLIENT_PORT, PEER_PORT)]


def test_plain_text_gets_nothing_at_any_port(net: NetCluster) -> None:
    for host, port in ports_of(net):
        for said in (b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)):
            with socket.create_connection((host, port), timeout=5) as sock:
                sock.settimeout(5)
                sock.sendall(said)
                try:
                    got = sock.recv(4096)
                except (ConnectionResetError, TimeoutError):
                    got = b""
            assert b"etcdserver" not in got, (host, port, got)
            assert b"\x00\x00\x12\x04" not in got, (host, port, got)  # HTTP/2's settings


def test_without_a_certificate_tls_gets_nothing_at_any_port(net: NetCluster) -> None:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    for host, port in ports_of(net):
        got = b""
        try:
            with (
                socket.create_connection((host, port), timeout=5) as sock,
                context.wrap_socket(sock, server_hostname=host) as tls,
            ):
                tls.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
                got = tls.recv(4096)
        except (OSError, ssl.SSLError):
            continue
        assert got == b"", (host, port, got)


def test_nobody_listens_in_plain_text_beside(net: NetCluster) -> None:
    for node in net.nodes:
        listed = subprocess.run([*node.prefix, "ss", "-Hltn"], capture_output=True, text=True, check=True).stdout
        open_ports = {line.split()[3].replace("[::ffff:", "").replace("]", "") for line in listed.splitlines()}
        wanted = {API_PORT, CLIENT_PORT, PEER_PORT} if node.name.startswith("v") else {API_PORT}
        assert open_ports == {f"{node.host}:{p}" for p in wanted}, node.name


def test_a_token_lets_in_as_often_as_it_says_and_no_more(net: NetCluster, tmp_path: Path) -> None:
    spent = net.nodes[3].token
    assert "has been used up" in joining(net, tmp_path / "a", "x1", spent)
    revoked = net.json("token", "create", "--role", "worker")
    net.cli("token", "revoke", revoked["id"])
    assert "revoked" in joining(net, tmp_path / "b", "x1", revoked["token"])
    good = net.token("worker")
    assert "cut short" in joining(net, tmp_path / "c", "x1", good[:-12])
    assert "the name w1 is taken" in joining(net, tmp_path / "d", "w1", good)
    assert "lets in only who has a join token" in joining(net, tmp_path / "e", "x1", "")


def joining(net: NetCluster, directory: Path, name: str, token: str) -> str:
    """What a node says that must not get in."""
    argv = Node(name, net.nodes[3].host, directory, directory, OPTIONS).argv([net.nodes[0].address])
    argv[argv.index("--address") + 1] = f"{net.nodes[3].host}:7299"
    env = {"SPINETTA_TOKEN": token, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    done = subprocess.run(
        [*net.nodes[3].prefix, *argv], capture_output=True, text=True, timeout=60, check=False, env=env
    )
    assert done.returncode in (2, 7, 8), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


# --- certificates under load ---------------------------------------------------------------------------------------


def test_certificates_are_renewed_and_an_authority_is_exchanged_under_load(net: NetCluster) -> None:
    before = {n["name"]: n["certificate_expires_ms"] for n in nodes(net)}
    serials = {n.name: (n.data_dir / "trust" / "current").readlink() for n in net.nodes}
    tasks = many(net, 30, "sleep 4")
    net.cli("cluster", "rotate-ca", "--kind", "cluster", "--overlap", "20s")
    tasks += load_until(net, lambda: len(authorities(net)) == 1 and authorities(net)[0]["state"] == "active", "rotated")
    tasks += load_until(
        net, lambda: all(n["certificate_expires_ms"] != before[n["name"]] for n in nodes(net)), "all renewed"
    )
    outcomes = Counter((t["outcome"], len(t["attempts"])) for t in ended(net, *tasks, within_s=240))
    assert outcomes == {("succeeded", 1): len(tasks)}, "no task failed, and none was started twice"
    assert all((n.data_dir / "trust" / "current").readlink() != serials[n.name] for n in net.nodes)
    net.wait_ready()


def nodes(net: NetCluster) -> list[dict[str, Any]]:
    return list(net.json("node", "list")["nodes"])


def authorities(net: NetCluster) -> list[dict[str, Any]]:
    return [a for a in net.json("cluster", "authorities")["authorities"] if a["kind"] == "cluster"]


def load_until(
    net: NetCluster, condition: Any, what: str, within_s: float = 180, command: str = "sleep 0.5"
) -> list[str]:
    """Submit a few tasks again and again until something is so."""
    tasks: list[str] = []
    end_s = time.monotonic() + within_s
    while not condition():
        os.utime(net.admin_pem, (0, 0))  # looked at long ago: the command asks whether the authorities have changed
        assert time.monotonic() < end_s, f"not within {within_s:g} s: {what}\n{net.tails()}"
        tasks += many(net, 5, command)
    return tasks


# --- losses --------------------------------------------------------------------------------------------------------


def test_a_worker_goes_on_through_another_voter(net: NetCluster) -> None:
    tasks = many(net, 40, "sleep 1")
    victim = net.nodes[1]
    net.cut(victim, off=True)
    try:
        ran_after: set[str] = set()
        end_s = time.monotonic() + 120
        while not {"w1", "w2"} <= ran_after:
            assert time.monotonic() < end_s, f"only {ran_after} run tasks\n{net.tails()}"
            fresh = many(net, 12, "sleep 1")
            ran_after |= {t["node"] for t in ended(net, *fresh, within_s=90)}
            tasks += fresh
        found = ended(net, *tasks, within_s=150)
        assert Counter(t["outcome"] for t in found) == {"succeeded": len(tasks)}
    finally:
        net.cut(victim, off=False)
    net.wait_ready(within_s=90)


def test_a_cluster_that_was_off_comes_back_and_an_administrator_gets_in_again(net: NetCluster) -> None:
    """All nodes stop, past the end of their certificates; the administrator's file is lost."""
    soon_s = time.time() + 2 * SHORT_S  # the first node's first certificate is older than the policy
    last = max(e for n in nodes(net) if (e := n["certificate_expires_ms"] / 1000) < soon_s)
    net.admin_pem.unlink()
    for node in net.nodes:
        node.stop()
    eventually(lambda: time.time() > last + 1, within_s=SHORT_S + 30, what="the certificates have ended", every_s=0.5)
    for node in net.nodes[:3]:
        node.start(net.peers_of(node))
    eventually(
        lambda: subprocess.run(
            [*net.nodes[0].prefix, *CLI, "cluster", "rescue", "--data-dir", str(net.nodes[0].data_dir)],
            capture_output=True, check=False, timeout=60,
        ).returncode == 0,
        within_s=90, what=f"an administrator is made\n{net.tails()}", every_s=1,
    )  # fmt: skip
    for node in net.nodes[3:]:
        node.token = net.token("worker")
        node.start(net.peers_of(node))
    net.wait_ready(within_s=90)
    assert [t["outcome"] for t in ended(net, submit(net, "true"))] == ["succeeded"]


def test_a_revoked_worker_is_out_and_its_tasks_run_elsewhere(net: NetCluster) -> None:
    def has_a_task() -> bool:
        return any(t["node"] == "w2" for t in net.json("list", "--state", "running")["tasks"])

    tasks = load_until(net, has_a_task, "w2 has a task", within_s=60, command="sleep 5")
    net.cli("node", "revoke", "w2", "--yes", "--reason", "test")
    found = ended(net, *tasks, within_s=150)
    assert Counter(t["outcome"] for t in found) == {"succeeded": len(tasks)}
    later = ended(net, *many(net, 12, "true"), within_s=60)
    assert "w2" not in {t["node"] for t in later}
    eventually(
        lambda: re.search(r"revoked", net.nodes[4].tail(200)), within_s=60, what=f"w2 says so\n{net.nodes[4].tail()}"
    )


def test_a_revoked_voter_is_out_of_etcd_too(net: NetCluster, tmp_path: Path) -> None:
    """Etcd looks at certificates only, and a voter's opens everything: it gets a new authority."""
    stolen = tmp_path / "stolen"
    shutil.copytree(net.nodes[2].data_dir / "trust" / "current", stolen)
    key = [f"--cacert={stolen / 'etcd-ca.pem'}", f"--cert={stolen / 'etcd.pem'}", f"--key={stolen / 'etcd.key'}"]

    def gets_in(node: Node) -> bool:
        asked = ["etcdctl", f"--endpoints=https://{node.host}:{CLIENT_PORT}", "--command-timeout=3s", *key]
        done = subprocess.run(
            [*asked, "get", "/acl/policy", "--keys-only", "--consistency=s"],
            capture_output=True, timeout=30, check=False, env={**os.environ, "ETCDCTL_API": "3"},
        )  # fmt: skip
        return b"/acl/policy" in done.stdout

    assert gets_in(net.nodes[0])
    net.cli("node", "revoke", "v3", "--yes", "--reason", "stolen")
    eventually(
        lambda: not any(gets_in(n) for n in net.nodes[:2]), within_s=150, what=f"etcd shuts it out\n{net.tails()}",
        every_s=1,
    )  # fmt: skip
    os.utime(net.admin_pem, (0, 0))
    found = ended(net, *many(net, 6, "sleep 0.2"), within_s=90)
    assert Counter(t["outcome"] for t in found) == {"succeeded": 6}
    assert "v3" not in {t["node"] for t in found}


def test_the_audit_log_of_each_node_is_whole_and_tells_of_what_was_done(net: NetCluster) -> None:
    calls: Counter[str] = Counter()
    for node in net.nodes:
        if (node.data_dir / "audit").exists() and any((node.data_dir / "audit").iterdir()):
            checked = net.cli("audit", "verify", "--data-dir", str(node.data_dir), "--json")
            assert json.loads(checked.stdout)["faults"] == []
            shown = net.cli("audit", "show", "--data-dir", str(node.data_dir), "--json").stdout
            calls.update(re.findall(r'"call": ?"([a-z_.-]+)"', shown))
    assert {"submit", "tokens", "access-change"} <= set(calls) or len(calls) >= 4, calls
