"""Containers as people write and read them: mounts, what goes together, what is shown, what an administrator may do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from spinetta.cli import exits, show
from spinetta.cli.app import run
from spinetta.cli.contained import nearest
from spinetta.cli.node import node_table
from spinetta.cli.submit import NETWORKS as OFFERED
from spinetta.cli.submit import exit_code_of
from spinetta.cli.taskfile import read_specs
from spinetta.cli.used import now_words, usage_cells, usage_words
from spinetta.client import Mount, make_spec
from spinetta.client.containers import read_mounts
from spinetta.client.views import NodeInfo, UsageNow
from spinetta.container import NETWORKS, ContainerSpec
from spinetta.errors import UserError
from spinetta.lifecycle import claimed, ended
from spinetta.model import Exit, IncarnationId, NodeId, Reason, Revision, Usage
from tests.builders import contained, mounted, node_record, queued
from tests.unit.test_show import info, nodes, waits

A, B = Mount("/a", "/a"), Mount("/b", "/x", True)


# --- mounts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "found"),
    [
        ((), ()),
        ("", ()),
        ("/a", (A,)),
        ("/a/", (A,)),  # as completion leaves it
        ("/a:ro", (A,)),
        ("/a:/a:ro", (A,)),
        ("/b:/x:rw", (B,)),
        ("/b/:/x/:rw", (B,)),
        ("/a, /b:/x:rw", (A, B)),
        (["/b:/x:rw", "/a"], (A, B)),  # by target
        (A, (A,)),
        ([A, "/b:/x:rw"], (A, B)),
        ({"source": "/a"}, (A,)),
        ([{"source": "/b/", "target": "/x", "writable": True}, A], (A, B)),
        ([{"source": "/a:b,c", "target": "/c:d"}], (Mount("/a:b,c", "/c:d"),)),
        ("/a:rw", (Mount("/a", "/a", True),)),
        (("/a", "/a"), (A, A)),  # refused where it is checked
    ],
)
def test_mounts_are_written_in_many_ways(given_: Any, found: tuple[Mount, ...]) -> None:
    assert read_mounts(given_) == found


@pytest.mark.parametrize(
    ("given_", "field", "words"),
    [
        ("/a:/b:/c", "mounts[0]", "not a mount: '/a:/b:/c'"),
        ("/a:/b:rx", "mounts[0]", "not a mount"),
        ("/a:", "mounts[0]", "not a mount: '/a:'"),
        (":/a", "mounts[0]", "not a mount: ':/a'"),
        ("/a::rw", "mounts[0]", "not a mount"),
        (["/a", 7], "mounts[1]", "must be text or a table"),
        ([None], "mounts[0]", "must be text or a table"),
        (7, "mounts", "must be a list, not int"),
        ([{"target": "/a"}], "mounts[0]", "a mount is a table of a source"),
        ([{"source": "/a", "rw": True}], "mounts[0]", "a mount has no 'rw'"),
        ([{"source": "/a", "writable": "yes"}], "mounts[0]", "a mount is a table of a source"),
        ([{"source": "/a", "targte": "/b"}], "mounts[0]", "a mount has no 'targte'"),
    ],
)
def test_what_is_no_mount(given_: Any, field: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_mounts(given_)
    assert words in caught.value.message
    assert caught.value.field == field
    assert caught.value.hint


@given(st.text(max_size=20))
def test_no_text_does_more_than_a_user_error(text: str) -> None:
    try:
        make_spec(["a"], image="tools", mounts=[text])
    except UserError:
        return


# --- a specification -------------------------------------------------------------------------------------------------


def test_all_of_it_arrives() -> None:
    made = make_spec(
        "a", image="tools", network="host", writable=True, user="7", capabilities="cap_kill, CHOWN", mounts="/b:/x:rw",
        tmp="1MiB", keep_scratch="1h",
    )  # fmt: skip
    assert made.container == ContainerSpec("tools", "host", True, "7", ("CHOWN", "KILL"), (B,), 1 << 20)
    assert made.keep_scratch_s == 3600.0
    assert make_spec("a").container is None
    assert make_spec("a", keep_scratch=60).keep_scratch_s == 60.0  # of a plain process, too
    assert make_spec("a", image="tools").container == contained()


@pytest.mark.parametrize(
    "options",
    [
        {"network": "host"},
        {"network": "none"},  # a plain process has the machine's: better said than believed
        {"writable": True},
        {"user": "root"},
        {"capabilities": ["KILL"]},
        {"mounts": ["/a"]},
        {"tmp": "1G"},
    ],
    ids=lambda o: next(iter(o)),
)
def test_what_only_containers_have_is_refused_without_an_image(options: dict[str, Any]) -> None:
    (key,) = options
    with pytest.raises(UserError, match=f"{key} is for tasks in containers, and no image is named") as caught:
        make_spec("a", **options)
    assert (caught.value.field, "--image" in caught.value.hint) == (key, True)
    assert make_spec("a", image="tools", **options).container is not None


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"image": "a b"}, "image"),
        ({"image": "./x.tar"}, "image"),
        ({"network": "vpn"}, "network"),
        ({"user": "me"}, "user"),
        ({"capabilities": ["FLY"]}, "capabilities"),
        ({"mounts": ["data"]}, "mounts[0].source"),
        ({"mounts": ["/a:/proc"]}, "mounts"),
        ({"tmp": -1}, "tmp"),
        ({"tmp": 1 << 60}, "tmp"),
        ({"keep_scratch": "31d"}, "keep_scratch"),
        ({"keep_scratch": -1}, "keep_scratch"),
    ],
    ids=lambda o: str(o),
)
def test_errors_name_the_argument(options: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError) as caught:
        make_spec("a", **{"image": "tools", **options})
    assert caught.value.field == field


# --- task files ------------------------------------------------------------------------------------------------------

ENTRY = {
    "command": ["a"], "image": "tools", "network": "bridge", "writable": True, "user": "7:8",
    "capabilities": ["KILL"], "mounts": ["/a", {"source": "/b", "target": "/x", "writable": True}], "tmp": "1MiB",
    "keep_scratch": "2h",
}  # fmt: skip


def test_task_files_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps([ENTRY]))
    (tmp_path / "t.yaml").write_text(yaml.safe_dump([ENTRY]))
    (tmp_path / "t.jsonl").write_text(json.dumps(ENTRY))
    for name in ("t.json", "t.yaml", "t.jsonl"):
        [made] = read_specs(str(tmp_path / name), None, {})
        assert made.container == ContainerSpec("tools", "bridge", True, "7:8", ("KILL",), (A, B), 1 << 20)
        assert made.keep_scratch_s == 7200.0


def test_options_are_defaults_of_entries(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text("- command: a\n- command: b\n  image: other\n  network: none\n")
    one, two = read_specs(str(path), None, {"image": "tools", "network": "host", "mounts": ["/a"]})
    assert one.container == replace(mounted("/a"), network="host")
    assert two.container == replace(mounted("/a"), image="other")
    with pytest.raises(UserError, match=r"entry 1 .*: network is for tasks in containers"):
        read_specs(str(path), None, {"network": "host"})


@pytest.mark.parametrize(
    ("line", "field", "words"),
    [
        ("user: 1000", "user", 'write it in quotes, e.g. user: "1000:1000"'),
        ("user: 1000:50", "user", 'write it in quotes, e.g. user: "1000:1000"'),  # 60050, as YAML reads it
        ("writable: 1", "writable", "must be yes or no"),
        ("mounts: {source: /a}", "mounts", "must be a list of text or tables"),
        ("mounts: [[a]]", "mounts[0]", "must be text or a table"),
        ("capabilities: 7", "capabilities", "must be a list of text"),
        ("tmp: lots", "tmp", "not a size"),
        ("containers: x", "containers", "unknown key 'containers'"),
    ],
)
def test_mistakes_in_task_files(tmp_path: Path, line: str, field: str, words: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(f"- command: a\n  image: tools\n  {line}\n")
    with pytest.raises(UserError) as caught:
        read_specs(str(path), None, {})
    assert words in str(caught.value)
    assert caught.value.field == f"tasks[0].{field}"


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_networks_that_are_offered_are_those_that_there_are() -> None:
    assert OFFERED == NETWORKS


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--network", "host"), "network is for tasks in containers, and no image is named (name one (--image)"),
        (("--writable",), "writable is for tasks in containers"),
        (("--image", "tools", "--network", "vpn"), "'vpn' is not one of"),
        (("--image", "tools", "--mount", "data"), "mounts[0].source: not a plain absolute path: 'data'"),
        (("--image", "tools", "--cap-add", "FLY"), "no capability is called 'FLY'"),
        (("--image", "tools", "--user", "me"), "not a user of a container: 'me'"),
        (("--image", "tools", "--tmp", "lots"), "tmp: not a size: 'lots'"),
        (("--keep-scratch", "soon"), "not a duration: 'soon'"),
    ],
)
def test_refused(argv: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["submit", *argv, "--", "true"]) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert (out, "Traceback" in err) == ("", False)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("spinetta submit --ima", "--image"),
        ("spinetta submit --network h", "host"),
        ("spinetta submit --cap-add SYS_P", "SYS_PTRACE"),
        ("spinetta submit --cap-add sys_p", "SYS_PTRACE"),
        ("spinetta submit --mount /da", "file,/da"),
        ("spinetta submit --image /sr", "file,/sr"),
    ],
)
def test_completion(words: str, found: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spinetta.cli"],
        env={
            **os.environ, "_SPINETTA_COMPLETE": "bash_complete", "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        },
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert found in done.stdout


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_a_task_in_full() -> None:
    rich = replace(
        mounted("/a", "/b:/x:rw"), network="host", writable=True, user="root", capabilities=("CHOWN", "KILL")
    )
    lines = dict(show.task_lines(info(queued(1, container=replace(rich, tmp_bytes=1 << 30), keep_scratch_s=7200.0))))
    assert lines["Image"] == "tools"
    assert lines["Container"] == "network host, writable, user root, 1GiB /tmp"
    assert lines["Capabilities"] == "CHOWN, KILL"
    assert lines["Mounts"] == "/a, /b at /x (writable)"
    assert lines["Scratch"] == "kept for 2h00m"
    plain = dict(show.task_lines(info(queued(1))))
    assert not {"Image", "Container", "Capabilities", "Mounts", "Scratch"} & set(plain)


def test_documents() -> None:
    document = show.task_document(info(queued(1, container=mounted("/b:/x:rw"))))
    assert document["spec"]["container"] == {
        "image": "tools", "network": "none", "writable": False, "user": "", "capabilities": [], "tmp_bytes": 0,
        "mounts": [{"source": "/b", "target": "/x", "writable": True}],
    }  # fmt: skip
    assert show.task_document(info(queued(1)))["spec"]["container"] is None
    record = node_record("n1", allows=("container", "mount:/a"), images=("sha256:1",), images_coming=("sha256:2",))
    node = show.node_document(NodeInfo(record, False, False, False, "ready", 0))
    assert (node["allows"], node["images"], node["images_coming"]) == (
        ["container", "mount:/a"], ["sha256:1"], ["sha256:2"],
    )  # fmt: skip


def test_what_was_used() -> None:
    assert usage_words(Usage(1.0, 0.25, 12 << 20, 3 << 20, 1 << 20, 7)) == (
        "1.25s CPU, 12MiB peak, 3MiB read, 1MiB written, 7 processes"
    )
    assert usage_words(Usage(pids_peak=1)) == "1 process"
    assert usage_words(Usage()) == ""


def test_what_a_running_task_has_now() -> None:
    task = claimed(queued(1), NodeId("n1"), IncarnationId("life"), now_ms=1)
    attempt = replace(task.attempts[-1], usage=Usage(61.0, 1.5, 9 << 20, pids_peak=8))
    running = replace(info(replace(task, attempts=(attempt,))), now=UsageNow(5 << 20, 3))
    assert now_words(running) == "5MiB memory, 3 processes"
    assert usage_cells(running) == ("1m02s", "5MiB", "3")
    assert usage_cells(replace(running, now=None)) == ("1m02s", "9MiB", "8")
    assert usage_cells(info(queued(1))) == ("", "", "")
    assert dict(show.task_lines(running))["Now"] == "5MiB memory, 3 processes"
    assert show.task_document(running)["now"] == {"memory_bytes": 5 << 20, "pids": 3, "units": {}}
    given = replace(running, now=UsageNow(5 << 20, 3, (("fpga", ("a",)), ("gpu", ("0", "2")))))
    assert dict(show.task_lines(given))["Given"] == "fpga a; gpu 0, 2"
    assert show.task_document(given)["now"]["units"] == {"fpga": ["a"], "gpu": ["0", "2"]}
    assert show.task_document(info(queued(1)))["now"] is None
    assert now_words(replace(running, now=UsageNow(0, 1))) == "0B memory, 1 process"


@pytest.mark.parametrize(
    ("how", "word", "code"),
    [
        (Exit(Reason.OUT_OF_PIDS, 3, message="refused 4 times"), "out-of-pids", 3),
        (Exit(Reason.OUT_OF_PIDS, signal=6), "out-of-pids", 134),
        (Exit(Reason.DISK_LIMIT, signal=9), "disk-limit", exits.DISK_LIMIT),
        (Exit(Reason.OUT_OF_MEMORY, signal=9), "out-of-memory", 137),
        (Exit(Reason.SIGNAL, 143, signal=15), "signal 15", 143),  # the init of a container says it in its own code
    ],
)
def test_how_it_ended(how: Exit, word: str, code: int) -> None:
    task = claimed(queued(1, container=contained()), NodeId("n1"), IncarnationId("life"), now_ms=1)
    over = info(ended(task, how, Revision(7), cancel_requested=False, now_ms=2).task)
    assert (show.exit_word(over), exit_code_of(over)) == (word, code)


# --- why -------------------------------------------------------------------------------------------------------------


def test_a_node_without_containers() -> None:
    assert waits(nodes(node_record("n1"), node_record("n2", allows=("process",))), container=contained()) == [
        "no node of the cluster can ever run it:",
        "n1, n2: the node runs no containers; its administrator could add container to its setting runtimes",
    ]
    broken = nodes(node_record("n1", allows=("process",), runtimes=("process", "container")))
    assert waits(broken, container=contained())[1:] == [
        "n1: the node runs no containers; it is set to, and cannot: see the warnings of spinetta node show n1"
    ]
    assert waits(nodes(node_record("n1", allows=("container",)))) == [
        "no node of the cluster can ever run it:",
        "n1: the node runs tasks in containers only, and this one names no image; name one with --image",
    ]


def test_what_would_have_to_be_allowed() -> None:
    found = nodes(
        node_record("n1", allows=("container", "network:bridge")),
        node_record("n2", allows=("container",)),
        node_record("n3", allows=("container", "network:host", "mount:/data")),
    )
    asked = replace(mounted("/data/x"), network="host")
    assert waits(found, container=asked) == [
        "n1: the node does not allow mount:/data/x, network:host (but network:bridge); "
        'its administrator could add "mount:/data/x", "network:host" to its setting allow',
        "n2: the node does not allow mount:/data/x, network:host; "
        'its administrator could add "mount:/data/x", "network:host" to its setting allow',
        "n3: free; the node will take it when its turn comes",
    ]


@pytest.mark.parametrize(
    ("need", "allows", "near"),
    [
        ("network:host", ("network:bridge", "user:root"), "network:bridge"),
        ("network:host", ("user:root",), ""),
        ("capability:KILL", ("capability:CHOWN", "capability:FOWNER"), "capability:CHOWN, capability:FOWNER"),
        ("mount:/data/a/b", ("mount:/data/a/c", "mount:/data/x", "mount:/srv"), "mount:/data/a/c"),
        ("mount:/data/a", ("mount:/srv",), ""),
        ("mount-rw:/data/a", ("mount:/data",), "mount:/data"),
        ("mount:/database", ("mount:/data",), ""),
        ("image:/srv/a.tar", ("image:/srv/images", "mount:/srv"), "image:/srv/images"),
        ("image:docker://r.example/a", ("image:/srv", "image:docker://s.example"), "image:docker://s.example"),
        ("image:/srv/a", ("image:docker://s.example",), ""),
        ("user:root", (), ""),
    ],
)
def test_the_nearest_allowance(need: str, allows: tuple[str, ...], near: str) -> None:
    assert nearest(need, allows) == near


def test_the_table_of_nodes_tells_of_images_where_containers_run(capsys: pytest.CaptureFixture[str]) -> None:
    node_table(nodes(node_record("n1"), node_record("n2", allows=("process",))))
    assert "IMAGES" not in capsys.readouterr().out
    some = node_record("n1", allows=("container", "mount:/data"), images=("sha256:1",))
    more = replace(some, name=NodeId("n2"), images_coming=("sha256:2", "sha256:3"))
    node_table(nodes(some, more, node_record("n3"), replace(node_record("n4"), address="")))
    header, *rows = capsys.readouterr().out.splitlines()
    assert [row[header.index("IMAGES") :] for row in rows] == ["1", "1+2", "-", ""]
    assert "mount:/data" not in "".join(rows)  # `node show` has room for it
