"""Worlds whose cluster is made anew while everything goes on: all that lives is fenced, and every daemon begins again.

What a recovery does when nothing has been lost: revisions go on, so that the checker can judge every step. Its lives
are condemned while their nodes are up, which no leader ever does.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from spinetta import codec, keys
from spinetta.lineage import Generation, encode_generation
from spinetta.model import Life, NodeId
from spinetta.txn import Delete, Put, Txn
from tests.sim.faults import Plan
from tests.sim.more import plan
from tests.sim.runs import run
from tests.sim.world import World

LOOK_S = 0.2  # how soon a daemon makes itself anew, at the latest
TIMES = 2
FAULTS = (("none",), ("daemon", "net"), ("machine", "pause"), ("partition", "etcd", "shim"))
SEEDS = 3  # of each


class Anew:
    """What befalls a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.begun_again = 0
        chance = random.Random(f"anew {world.plan.seed}")
        for number in range(TIMES):
            world.at(chance.uniform(3.0, world.plan.horizon_s), self.strike, number)
        world.at(LOOK_S, self.look)

    def strike(self, number: int) -> None:
        """Between two turns of everything, as in data that nobody can reach."""
        world = self.world
        world.log("FAULT", "the cluster is made anew")
        listed = [kv.key for prefix in (keys.NODE, keys.LEADER) for kv in world.model.list(prefix).entries]
        world.on_store(lambda: world.model.commit(Txn(then=tuple(Delete(key) for key in listed))))
        for kv in world.model.list(keys.INCARNATION).entries:
            life = codec.decode_incarnation(kv.value)
            if life.state is Life.OPEN:
                self._put(kv.key, codec.encode_incarnation(replace(life, state=Life.CONDEMNED)))
        self._put(keys.GENERATION, encode_generation(Generation(f"g{number}", how="recover")))

    def _put(self, key: str, value: bytes) -> None:
        # The checker lets a node itself write of its life.
        author = keys.parse_node(key) if key.startswith(keys.INCARNATION) else NodeId("")
        self.world.on_store(lambda: self.world.model.commit(Txn(then=(Put(key, value),))), author=author)

    def look(self) -> None:
        """A daemon whose agent says so begins again, in the same process: requests under way go on."""
        for machine in self.world.machines.values():
            if machine.daemon is not None and machine.daemon.agent.restored:
                machine.crash_daemon()
                machine.start_daemon()
                self.begun_again += 1
        self.world.after(LOOK_S, self.look)


def unlike(seed: int, faults: tuple[str, ...]) -> Plan:
    """The plan of a seed without tasks that may overlap: a leader may take those from its own life, which is condemned
    here as nowhere else, while they execute; and that is no harm."""
    found = plan(seed, faults)
    return replace(found, submits=tuple((at_s, replace(spec, overlap=False)) for at_s, spec in found.submits))


@pytest.mark.parametrize("faults", FAULTS, ids=",".join)
def test_a_cluster_made_anew_breaks_nothing_and_goes_on(faults: tuple[str, ...]) -> None:
    begun_again = 0
    for seed in range(SEEDS):
        struck: list[Anew] = []
        world = World(unlike(seed, faults), mutate=lambda w, struck=struck: struck.append(Anew(w)))  # type: ignore[misc]
        wrong = run(world)
        assert not wrong, f"seed {seed}, {','.join(faults)}: {wrong}"
        begun_again += struck[0].begun_again
    assert begun_again, "no daemon has noticed"
