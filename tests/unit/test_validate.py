import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinetta import validate
from spinetta.container import ContainerSpec
from spinetta.errors import UserError
from spinetta.model import Resources, TaskId, TaskSpec

ID = TaskId("01890a5d-ac96-774b-bcce-b302099a8057")
OTHER = TaskId("01890a5d-ac96-774b-bcce-b302099a8058")
GOOD = TaskSpec(ID, ("/bin/true",))
FULL = TaskSpec(
    ID,
    ("bowtie2", "-x", "λ phage", ""),
    name="align 7",
    labels=(("run", "7"), ("example.org/stage", "align")),
    env=(("LC_ALL", "C"), ("_EMPTY", "")),
    working_directory="/data",
    resources=Resources.of(1500, 2 << 30, 1 << 30, {"gpu": 1}),
    walltime_s=5400,
    tags_required=("ssd",),
    tags_forbidden=("zone=b",),
    priority=-5,
    retries=3,
    retry_backoff_s=0.5,
    owner="me@example.org",
    grace_s=30,
)


def test_good() -> None:
    validate.check_spec(GOOD, "tasks[0]")
    validate.check_spec(FULL, "")
    validate.check_submit([GOOD, dataclasses.replace(FULL, id=OTHER)])


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"id": ""}, "id", "a task needs an id"),
        ({"id": ID.upper()}, "id", "not a task id"),
        ({"id": "3f06af63-a93c-41e8-9b2d-6f0f4a4f8c11"}, "id", "not a task id"),
        ({"id": ID + "\n"}, "id", "not a task id"),
        ({"command": ()}, "command", "the command is empty"),
        ({"command": ("", "x")}, "command[0]", "the program's name is empty"),
        ({"command": ("a", "b\0c")}, "command[1]", "argument 1 holds a NUL character"),
        ({"command": ("a", "\udcff")}, "command[1]", "argument 1 is not UTF-8"),
        ({"command": ("a",) * 4097}, "command", "the command has 4097 arguments"),
        ({"command": ("a", "x" * (128 << 10))}, "command[1]", "argument 1 has 131072 bytes"),
        ({"command": ("a", "x" * 100_000, "y" * 100_000, "z" * 100_000)}, "command", "have 300005 bytes together"),
        ({"env": (("1A", ""),)}, "env", "not a name for an environment variable: '1A'"),
        ({"env": (("", ""),)}, "env", "not a name for an environment variable: ''"),
        ({"env": (("A=B", ""),)}, "env", "not a name for an environment variable: 'A=B'"),
        ({"env": (("A", "\0"),)}, "env", "environment variable 'A' holds a NUL character"),
        ({"env": tuple((f"A{i}", "") for i in range(1025))}, "env", "1025 environment variables"),
        ({"name": "x" * 257}, "name", "the name has 257 characters"),
        ({"name": "a\nb"}, "name", "the name holds the character U+000A"),
        ({"labels": (("", "x"),)}, "labels", "not a label's key: ''"),
        ({"labels": (("a b", "x"),)}, "labels", "not a label's key: 'a b'"),
        ({"labels": (("a", "x" * 257),)}, "labels", "label 'a' has 257 characters"),
        ({"labels": (("a", "\x1b[31m"),)}, "labels", "label 'a' holds the character U+001B"),
        ({"labels": tuple((f"a{i}", "") for i in range(65))}, "labels", "65 labels"),
        ({"owner": "a b"}, "owner", "not an owner: 'a b'"),
        ({"working_directory": "data"}, "working_directory", "not an absolute path: 'data'"),
        ({"working_directory": "/" + "x" * 4096}, "working_directory", "has 4097 characters"),
        ({"working_directory": "/a\0"}, "working_directory", "holds the character U+0000"),
        ({"resources": Resources(-1)}, "resources.cpu_millis", "-1 is out of range"),
        ({"resources": Resources(0, 1 << 63)}, "resources.memory_bytes", "is out of range for an amount of memory"),
        (
            {"resources": Resources(0, 1 << 20), "container": ContainerSpec("tools")},
            "resources.memory_bytes",
            "1MiB of memory are too few for a container",
        ),
        ({"resources": Resources(0, 0, 1 << 63)}, "resources.disk_bytes", "is out of range for an amount of disk"),
        (
            {"resources": Resources.of(countables={"GPU": 1})},
            "resources.countables",
            "not a name for a countable: 'GPU'",
        ),
        ({"resources": Resources.of(countables={"cpu": 1})}, "resources.countables", "'cpu' is no countable"),
        ({"resources": Resources.of(countables={"gpu": 1 << 40})}, "resources.countables.gpu", "a number of gpu"),
        (
            {"resources": Resources.of(countables={f"x{i}": 1 for i in range(33)})},
            "resources.countables",
            "33 countables",
        ),
        ({"walltime_s": -1.0}, "walltime_s", "-1 s is out of range for a walltime"),
        ({"walltime_s": math.nan}, "walltime_s", "nan s is out of range"),
        ({"walltime_s": math.inf}, "walltime_s", "inf s is out of range"),
        ({"walltime_s": 4e7}, "walltime_s", "40000000 s is out of range"),
        ({"tags_required": ("a b",)}, "tags_required[0]", "not a tag: 'a b'"),
        ({"tags_forbidden": ("x",) * 33}, "tags_forbidden", "33 tags"),
        ({"tags_required": ("a",), "tags_forbidden": ("a",)}, "tags_forbidden", "'a' is both required and forbidden"),
        ({"priority": 1001}, "priority", "1001 is out of range for a priority"),
        ({"priority": -1001}, "priority", "-1001 is out of range"),
        ({"retries": 101}, "retries", "101 is out of range"),
        ({"retry_backoff_s": 86401.0}, "retry_backoff_s", "is out of range for a back-off"),
        ({"grace_s": 1.0}, "grace_s", "1 s is out of range for a grace"),
        ({"grace_s": -1.0}, "grace_s", "-1 s is out of range for a grace"),
    ],
)
def test_bad(change: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate.check_spec(dataclasses.replace(GOOD, **change), "tasks[3]")
    assert message in caught.value.message
    assert caught.value.field == f"tasks[3].{field}"
    assert caught.value.hint
    with pytest.raises(UserError) as caught:
        validate.check_spec(dataclasses.replace(GOOD, **change), "")
    assert caught.value.field == field


def test_submit() -> None:
    with pytest.raises(UserError, match="no task is given"):
        validate.check_submit([])
    with pytest.raises(UserError, match="1001 tasks in one request") as caught:
        validate.check_submit([GOOD] * 1001)
    assert caught.value.reason == "too-large"
    with pytest.raises(UserError, match=r"the id of tasks\[0\] is given again") as caught:
        validate.check_submit([GOOD, GOOD])
    assert caught.value.field == "tasks[1].id"


def test_the_largest_lawful_task_fits_far_below_a_request_of_etcd() -> None:
    spec = dataclasses.replace(
        GOOD,
        command=("a", *("x" * 61 for _ in range(4095))),
        labels=tuple((f"k{i:0127}", "é" * 256) for i in range(64)),
    )
    validate.check_spec(spec, "")
    from spinetta import messages

    assert len(messages.spec_to_pb(spec).SerializeToString()) < 512 << 10


@pytest.mark.parametrize("text", ["0189", "01890A5D", " 01890a5d-ac96 ", ID, "9a8057", "b302099a8057", ID.upper()])
def test_fragments(text: str) -> None:
    fragment = validate.id_fragment(text, "ids[0]")
    assert validate.matches(fragment, ID)
    assert validate.id_fragment(fragment) == fragment


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a task id: ''"),
        ("018", "too short for a task id: '018'"),
        ("0-1-8", "too short for a task id"),
        ("xyz1", "not a task id: 'xyz1'"),
        ("../../etc", "not a task id"),
        (ID + "0", "not a task id"),
        ("3f06af63-a93c-41e8-9b2d-6f0f4a4f8c11", "not a task id"),
    ],
)
def test_fragments_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate.id_fragment(text, "ids[0]")
    assert message in caught.value.message
    assert (caught.value.field, bool(caught.value.hint)) == ("ids[0]", True)


def test_an_end_must_be_long_enough() -> None:
    assert not validate.matches("a8057", ID)
    assert validate.matches("9a8057", ID)


@given(st.integers(0, 31), st.integers(4, 36))
def test_any_beginning_matches(start: int, length: int) -> None:
    fragment = ID[:length]
    if len(fragment.replace("-", "")) >= validate.FRAGMENT_PREFIX_MIN:
        assert validate.matches(validate.id_fragment(fragment), ID)
    tail = ID[start:]
    if len(tail.replace("-", "")) >= validate.FRAGMENT_SUFFIX_MIN:
        assert validate.matches(validate.id_fragment(tail), ID)


def test_other_requests() -> None:
    assert validate.check_page_size(0) == validate.LIST_PAGE_DEFAULT
    assert validate.check_page_size(7) == 7
    validate.check_reason("no longer needed")
    validate.check_wait_timeout(5)
    for call in (
        lambda: validate.check_page_size(1001),
        lambda: validate.check_reason("x" * 1025),
        lambda: validate.check_reason("\x07"),
        lambda: validate.check_wait_timeout(-1),
        lambda: validate.check_wait_timeout(math.nan),
        lambda: validate.check_filter([("a b", "")], "", "", ""),
        lambda: validate.check_filter([], "a b", "", ""),
        lambda: validate.check_filter([], "", "x" * 257, ""),
        lambda: validate.check_filter([], "", "", "A"),
        lambda: validate.check_fragments([], "ids", 3),
        lambda: validate.check_fragments(["0123"] * 4, "ids", 3),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert caught.value.field
        assert caught.value.hint
    assert validate.check_fragments(["0123", "ABCDEF"], "ids", 3) == ["0123", "abcdef"]
