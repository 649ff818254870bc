"""A hostile task in a container that a real shim holds, beside another task: it reaches nothing of either."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spinetta import ociconfig
from spinetta.model import Reason
from spinetta.node import founding
from spinetta.runtime.protocol import ContainerLaunch, Launch
from tests.attacks.cells import FIRST_ID, OPEN_FILES, RUNC, Yard, missing, numbers_of, yard
from tests.attacks.inside.attempts import ATTACKS
from tests.attacks.test_escapes import NUMBERS
from tests.contract.shims import asynchronous, identity, launch, ran, runtime, state_dir, until

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "all is there")
_ = state_dir  # a fixture
SECRET = "of-the-other-task-only"  # noqa: S105 - none


@pytest.fixture(scope="module")
def cells() -> Iterator[Yard]:
    with yard() as made:
        yield made


def contained(cells: Yard, state: Path, key: str, *command: str, **changes: Any) -> Launch:
    """An attempt in a container, as a node would ask for it."""
    request = cells.request(
        command,
        scratch_path=str(state / "scratch" / key),
        secrets_path=str(state / "bundle/secrets"),
    )
    config = ociconfig.runtime_config(request)
    owner = (FIRST_ID + request.uid, FIRST_ID + request.gid)
    container = ContainerLaunch(str(RUNC), config, (str(cells.rootfs),), False, owner)
    return replace(launch(key, *command, **changes), container=container)


def missing_of(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if not Path(path).exists()]


@asynchronous
async def test_a_task_in_a_container_reaches_neither_its_node_nor_another_task(
    cells: Yard, state_dir: Path, tmp_path: Path
) -> None:
    state = state_dir
    await founding.found_cluster(tmp_path / "trust", "n1", "127.0.0.1:7220")
    keys = [str(path) for path in (tmp_path / "trust").rglob("*") if path.name.endswith(".key")]
    assert keys
    async with runtime(state_dir) as rt:
        waiting = ("sh", "-c", "echo mine > result; exec sleep 300")
        assert (
            await rt.start(contained(cells, state, "prey.1", *waiting, secrets=(("token", SECRET.encode()),))) is None
        )
        await until(lambda: list((state / "scratch").rglob("result")))
        shim = identity(state_dir)["pid"]
        arguments: dict[str, Any] = {
            "numbers": numbers_of(*NUMBERS),
            "host_files": [
                *keys,
                str(state / "shim.json"),
                *map(str, (state / "scratch").rglob("result")),
                str(state / "bundle/secrets/token"),
                str(rt.log_path("prey.1", "stdout")),
                f"/proc/{shim}/environ",
            ],
            "host_pids": [shim, os.getpid(), 1],
            "tcp": [],
            "unix": [str(state / "shim.sock"), "/run/docker.sock"],
            "abstract": [],
            "disk": [8, 0],
            "open_files": OPEN_FILES,
        }
        token = str(state / "bundle/secrets/token")
        assert missing_of(arguments["host_files"]) == [token], "they are there to be found, and that one for the task"
        attacker = contained(cells, state, "hostile.1", *cells.program(), json.dumps(arguments))
        own = (("token", b"of-the-attacker"),)
        ended = await ran(rt, replace(attacker, secrets=own))
        said = rt.log_path("hostile.1", "stdout").read_text()
        assert ended.exit_code == 0, f"{ended}\n{said}\n{rt.log_path('hostile.1', 'stderr').read_text()}"
        told = json.loads(said)
        assert told == {name: [] for name in ATTACKS}
        assert SECRET not in said
        assert not missing_of([f"/proc/{shim}"])
        assert [held.exit for held in await rt.held() if held.key == "prey.1"] == [None], "the other task goes on"
        await rt.stop("prey.1", Reason.CANCELLED)
