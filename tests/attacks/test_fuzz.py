"""Any bytes, and messages that look right, at every method, by everybody: a clear answer, and nothing else happens."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import traceback
from collections.abc import Iterable
from typing import Any

import grpc
import hypothesis.strategies as st
import psutil
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, Phase, given, settings

from spinetta import codec, keys, trustcodec
from spinetta.access import UserAcl, UserRole
from spinetta.trust import certificates, sealing
from tests.attacks.fortress import (
    ADMIN,
    GUEST,
    METHODS,
    NAMES,
    OPERATOR,
    SEAT,
    USER,
    VIEWER,
    WORKER,
    Fortress,
    Method,
    Stage,
    call,
)
from tests.contract.api_world import eventually, new_id

EXAMPLES = int(os.environ.get("SPINETTA_FUZZ_EXAMPLES", "80"))  # for each caller, of up to five calls at once
GROWTH_BYTES_MAX = 48 << 20
FEED_TASKS_MAX = 16  # the gateway keeps one watch at etcd for each of four prefixes that workers have watched
IDLE_S = 0.05  # what may be asked to wait is not waited for any longer
WAITS = {"Spinetta.Watch", "Spinetta.Wait", "Spinetta.Log", "Gateway.Watch", "Health.Watch"}
CLEAR = frozenset(grpc.StatusCode) - {
    grpc.StatusCode.UNKNOWN,  # an exception that nobody caught
    grpc.StatusCode.INTERNAL,  # one that nobody thought of
    grpc.StatusCode.DATA_LOSS,
}

# --- what is sent ----------------------------------------------------------------------------------------------------

_KEY = certificates.new_key()
_CSR = certificates.csr(_KEY, "ann")
_SEALING = sealing.public_of(sealing.new_sealing_key())
WORDS = (
    "", "ann", "bob", "root", "n1", "v2", "w1", "n9", "genomes", "red", "members", "db", "cluster", "etcd", "worker",
    "../../trust/node.key", "/etc/passwd", "a\nb", "\x1b[31mred\x1b[0m", "\x00", "ä" * 40, "x" * 300, "true",
    "00000000", "127.0.0.1:1", "10.0.0.1:7220", "https://issuer.example", "sub", "SPTK", "0.test", "\u202e", "-1",
)  # fmt: skip
TEXT_KEYS = (
    "", "/", "/acl/", "/acl/policy", "/acl/user/ann", "/acl/user/root", "/acl/node/w1", "/acl/node/n1", "/trust/",
    "/trust/label/members", keys.authority("cluster"), "/secret/ann/db", "/secret/bob/db", "/node/", "/node/w1",
    "/node/n1", "/incarnation/w1", "/incarnation/n1", "/generation", "/leader/", "/status/queued/",
    "/status/running/w1/", "/status/running/", "/task/", "/acl/token/",
)  # fmt: skip
KEYS = (*(key.encode() for key in TEXT_KEYS), b"\xff\xfe", b"\x00")
BYTES = (b"", _CSR, _SEALING, bytes(32), b"-----BEGIN CERTIFICATE-----\n", b"x" * 2000, *KEYS)
NUMBERS = (0, 1, 2, 3, 5, 100, 2**31 - 1, 2**32 - 1, 2**63 - 1)
DEPTH_MAX = 3

texts = st.sampled_from(WORDS) | st.text(max_size=8)
binaries = st.sampled_from(BYTES) | st.binary(max_size=24)
doubles = st.sampled_from((0.0, 0.01, 1.0, 3600.0, -1.0, 1e18, float("inf"), float("nan")))
_T = FieldDescriptor


def scalars(field: Any, ids: tuple[str, ...]) -> st.SearchStrategy[Any]:
    match field.cpp_type:
        case _T.CPPTYPE_STRING:
            return st.sampled_from(ids) | texts if field.type == _T.TYPE_STRING else binaries
        case _T.CPPTYPE_BOOL:
            return st.booleans()
        case _T.CPPTYPE_DOUBLE | _T.CPPTYPE_FLOAT:
            return doubles
        case _T.CPPTYPE_ENUM:
            return st.sampled_from((0, 1, 2, 3, 4, 99, -1))
        case _T.CPPTYPE_INT32:
            return st.sampled_from([n for n in NUMBERS if n < 2**31] + [-1, -(2**31)])
        case _T.CPPTYPE_UINT32:
            return st.sampled_from([n for n in NUMBERS if n < 2**32])
        case _T.CPPTYPE_INT64:
            return st.sampled_from([*NUMBERS, -1, -(2**63)])
        case _:
            return st.sampled_from([*NUMBERS, 2**64 - 1])


@st.composite
def messages(draw: st.DrawFn, made: Message, ids: tuple[str, ...], depth: int = 0) -> Message:
    """One that its service can read; mostly of values that mean something here."""
    for field in made.DESCRIPTOR.fields:
        if not draw(st.integers(0, 3)):
            continue
        inner = field.message_type
        if inner is not None and inner.GetOptions().map_entry:
            for key in draw(st.lists(texts, max_size=2)):
                getattr(made, field.name)[key] = draw(scalars(inner.fields_by_name["value"], ids))
        elif inner is not None:
            if depth >= DEPTH_MAX:
                continue
            if field.is_repeated:
                for _ in range(draw(st.integers(0, 2))):
                    draw(messages(getattr(made, field.name).add(), ids, depth + 1))
            else:
                getattr(made, field.name).SetInParent()
                draw(messages(getattr(made, field.name), ids, depth + 1))
        elif field.is_repeated:
            getattr(made, field.name).extend(draw(st.lists(scalars(field, ids), max_size=3)))
        else:
            setattr(made, field.name, draw(scalars(field, ids)))
    return made


@st.composite
def bodies(draw: st.DrawFn, method: Method, ids: tuple[str, ...]) -> bytes:
    """Noise; a message; a message with a byte changed, cut short or followed by another."""
    if not draw(st.integers(0, 5)):
        return draw(st.binary(max_size=64))
    data = bytearray(draw(messages(method.request(), ids)).SerializeToString())
    match draw(st.integers(0, 7)):
        case 0 if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        case 1:
            del data[draw(st.integers(0, len(data))) :]
        case 2:
            data *= 2
        case _:
            pass
    return bytes(data)


def calls(ids: tuple[str, ...]) -> st.SearchStrategy[list[tuple[str, bytes]]]:
    one = st.sampled_from(sorted(METHODS)).flatmap(lambda name: st.tuples(st.just(name), bodies(METHODS[name], ids)))
    return st.lists(one, min_size=1, max_size=5)


# --- what may change -------------------------------------------------------------------------------------------------

OWN = {
    GUEST: (),
    VIEWER: (),
    USER: ("/task/", "/status/", "/secret/ann/", "/secret/genomes/"),
    OPERATOR: ("/task/", "/status/", "/secret/olga/"),
    WORKER: (
        "/node/w1", "/incarnation/w1", "/beat/w1", keys.beat("w1"), keys.incarnation("w1"), keys.node("w1"),  # type: ignore[arg-type]
        "/status/running/w1/", "/acl/node/w1", "/trust/label/",
    ),
    ADMIN: ("/acl/", "/trust/", "/secret/", "/task/", "/status/", keys.BACKUP),
    SEAT: ("",),
}  # fmt: skip


def foreign(f: Fortress, who: str, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Keys that have changed and were not this caller's to change."""
    changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    wrong = {k for k in changed if not k.startswith(tuple(OWN[who]))} if OWN[who] else changed
    for key in changed:
        if key.startswith(keys.TASK) and who == USER and key in after:
            owner = codec.decode_task(after[key].value).spec.owner
            if owner not in ("ann", "genomes"):
                wrong.add(f"{key} of {owner!r}")
    if who == USER and keys.task(f.tasks["bob"]) in changed:  # type: ignore[arg-type]
        wrong.add("bob's task")
    return sorted(wrong)


def complaints(records: Iterable[logging.LogRecord]) -> list[str]:
    """What the log says of errors that nobody thought of."""
    return [
        record.getMessage() + "".join(traceback.format_exception(*record.exc_info)[-3:] if record.exc_info else ())
        for record in records
        if record.exc_info or record.levelno >= logging.ERROR
    ]


# --- the tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", [GUEST, VIEWER, USER, OPERATOR, WORKER, ADMIN, SEAT])
def test_whatever_is_sent_has_a_clear_answer_and_changes_only_ones_own(
    stage: Stage, who: str, caplog: pytest.LogCaptureFixture
) -> None:
    f = stage.fortress
    ids = (*f.tasks.values(), *f.tasks.values(), f.tasks["bob"][-8:], new_id())
    before = stage.run(lambda f: f.state())
    tasks = stage.run(_tasks)
    channel = stage.run(lambda f: _opened(f, who))
    process = psutil.Process(os.getpid())
    sizes: list[int] = []
    caplog.set_level(logging.WARNING)

    async def send(several: list[tuple[str, bytes]]) -> dict[str, grpc.StatusCode]:
        async def one(name: str, body: bytes) -> grpc.StatusCode:
            return await call(channel, METHODS[name], body, IDLE_S if name in WAITS else 20.0)

        codes = await asyncio.gather(*(one(name, body) for name, body in several))
        return {name: code for (name, _), code in zip(several, codes, strict=True) if code not in CLEAR}

    @settings(
        max_examples=EXAMPLES,
        derandomize="SPINETTA_FUZZ_EXAMPLES" not in os.environ,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(calls(ids))
    def storm(several: list[tuple[str, bytes]]) -> None:
        unclear = stage.run(lambda _: send(several))
        assert unclear == {}
        assert complaints(caplog.get_records("call")) == []
        if len(sizes) < 2:  # what is loaded at the first calls is no growth
            sizes.append(process.memory_info().rss)

    storm()
    gc.collect()
    assert process.memory_info().rss - sizes[-1] < GROWTH_BYTES_MAX
    stage.run(lambda _: channel.close())
    stage.run(lambda _: _rested(tasks))
    after = stage.run(lambda f: f.state())
    assert foreign(f, who, before, after) == []
    if who not in (ADMIN, SEAT):  # these may shut everybody out
        assert stage.run(_still_answers) == "viewer"


async def _opened(f: Fortress, who: str) -> grpc.aio.Channel:
    return f.channel(who)


async def _tasks(_: Fortress) -> int:
    return len(asyncio.all_tasks())


async def _rested(tasks: int) -> None:
    def rest() -> bool:
        return len(asyncio.all_tasks()) <= tasks + FEED_TASKS_MAX

    await eventually(rest, within_s=40, what="the calls leave no task behind")


async def _still_answers(f: Fortress) -> str:
    from spinetta.v1 import trust_pb2, trust_pb2_grpc

    async with f.channel(VIEWER) as channel:
        return (await trust_pb2_grpc.TrustStub(channel).WhoAmI(trust_pb2.WhoAmIRequest())).role


def test_the_fuzz_reaches_what_it_is_for(stage: Stage) -> None:
    # The channel that the noise goes through is one that good calls go through too.
    async def scenario(f: Fortress) -> None:
        async with f.channel(VIEWER) as channel:
            assert await call(channel, METHODS["Spinetta.List"], b"") is grpc.StatusCode.OK
        assert trustcodec.decode(UserAcl, (await f.state())[keys.acl_user(NAMES[VIEWER])].value).role is UserRole.VIEWER

    stage.run(scenario)
