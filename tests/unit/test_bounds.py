"""What the page of limits says is so: constants have their numbers, tests exist, and some of the bounds themselves."""

from __future__ import annotations

import ast
import asyncio
import importlib
import re
from functools import cache
from pathlib import Path
from typing import cast

import pytest

from spinetta.agent import Agent
from spinetta.client.links import LINKS_MAX, RETIRED_MAX, Link, Links
from spinetta.events import Happening, Tick
from spinetta.node.driver import Driver
from spinetta.node.launching import LaunchSettings
from spinetta.runtime.protocol import Runtime
from spinetta.store.protocol import Store
from spinetta.trust.backoff import Backoff
from spinetta.trust.dial import VOTER, Dialer
from tests.builders import settings, spec
from tests.sim.direct import Direct

ROOT = Path(__file__).resolve().parents[2]
NAMED = re.compile(r"`([a-z]+/test_\w+\.py)::(test_\w+)`")
CONSTANT = re.compile(r"`([A-Za-z_]+)` = (\d+) \(`([a-z_/]+)\.py`\)")
COLUMNS = 5
NO_TEST = "\N{EN DASH}"


def rows() -> list[list[str]]:
    lines = (ROOT / "docs/limits.md").read_text().splitlines()
    cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return [row for row in cells if row[0] != "what"]


@cache
def defined_in(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return frozenset(n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:50])
def test_each_row_is_true(row: list[str]) -> None:
    assert len(row) == COLUMNS, row
    for name, number, where in CONSTANT.findall(row[1]):
        module = importlib.import_module("spinetta." + where.replace("/", "."))
        there = getattr(module, name, None)
        if there is None:  # a field of the settings
            there = module.AgentSettings.__dataclass_fields__[name].default
        assert there == int(number), f"{name} is {there}"
    for where in re.findall(r"`([a-z_/]+\.py)`", row[1]):
        assert (ROOT / "spinetta" / where).exists(), where
    assert row[4] == NO_TEST or NAMED.findall(row[4]), row[4]
    for file, test in NAMED.findall(row[4]):
        assert test in defined_in(file), f"{file} has no {test}"


def test_every_queue_has_a_bound() -> None:
    for path in (ROOT / "spinetta").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "Queue":
                assert node.args or node.keywords, f"{path}:{node.lineno}: a queue without a bound"


def test_a_full_inbox_holds_back_who_tells_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spinetta.node.driver.INBOX_EVENTS_MAX", 2)

    class Noting:
        """In the place of an agent: what it was told."""

        settings = settings()
        next_s = None

        def __init__(self) -> None:
            self.told = 0

        def handle(self, _now: float, _now_ms: int, *events: Happening) -> list[object]:
            self.told += len(events)
            return []

    async def scenario() -> None:
        agent = Noting()
        driver = Driver(
            cast("Agent", agent), cast("Store", None), cast("Runtime", None), LaunchSettings("n1", 0, "h:1"),
            remember=lambda _: None,
        )  # fmt: skip
        tellers = [asyncio.create_task(driver.tell(Tick())) for _ in range(50)]
        for _ in range(10):
            await asyncio.sleep(0)
        assert sum(t.done() for t in tellers) == 2  # the others wait
        while not all(t.done() for t in tellers):
            events = await driver._gather()
            agent.handle(0.0, 0, *events)
            await asyncio.sleep(0)
        while not driver._inbox.empty():
            agent.handle(0.0, 0, *await driver._gather())
        assert agent.told == 50

    asyncio.run(scenario())


def test_a_node_with_all_places_taken_claims_nothing() -> None:
    d = Direct(settings(attempts_max=2))
    for n in range(1, 6):
        d.submit(spec(n))
    d.run(1.0)
    assert len(d.node().agent.holdings.held) == 2
    d.run(20.0)  # and gets through all of them in the end
    assert not d.node().agent.holdings.held


def test_a_client_keeps_so_many_connections() -> None:
    async def scenario() -> None:
        links = Links(Dialer.open())
        first = await links.get("127.0.0.1:1", VOTER)
        assert await links.get("127.0.0.1:1", VOTER) is first
        for port in range(2, 2 * LINKS_MAX):
            await links.get(f"127.0.0.1:{port}", VOTER)
        assert len(links) == LINKS_MAX + RETIRED_MAX
        assert await links.get("127.0.0.1:1", VOTER) is not first
        await links.close()
        assert len(links) == 0

    asyncio.run(scenario())


def test_two_calls_at_once_have_one_connection_even_while_others_are_let_go() -> None:
    class Slow(Links):
        async def _retire(self, link: Link) -> None:
            await asyncio.sleep(0)  # closing may take a while
            await super()._retire(link)

    async def scenario() -> None:
        links = Slow(Dialer.open())
        for port in range(1, LINKS_MAX + 1):
            await links.get(f"127.0.0.1:{port}", VOTER)
        one, other = await asyncio.gather(*(links.get("127.0.0.1:9999", VOTER) for _ in range(2)))
        assert one is other
        await links.close()

    asyncio.run(scenario())


def test_waits_grow_to_a_limit_by_chance_and_begin_anew() -> None:
    wait = Backoff(0.1, 2.0)
    for _ in range(3):
        found = [wait.next_s() for _ in range(12)]
        for n, waited_s in enumerate(found):
            high_s = min(0.1 * 2**n, 2.0)
            assert high_s / 2 <= waited_s <= high_s
        wait.reset()
    one, other = Backoff(1.0, 1.0), Backoff(1.0, 1.0)
    assert [one.next_s() for _ in range(4)] != [other.next_s() for _ in range(4)]
    tired = Backoff(0.1, 30.0)
    assert max(tired.next_s() for _ in range(2000)) <= 30.0  # however often
