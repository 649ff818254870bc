"""Units of a node's countables, and who has them. Part of ``spinetta node show``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spinetta.client.aio import AsyncClient
    from spinetta.model import NodeRecord

TASKS_MAX = 2000  # looked at; a node has some dozens of units at most, so that few of its tasks have any

Given = dict[str, dict[str, str]]
"""By countable and label the id of the task that has the unit; empty: none that we know of."""


async def given_units(client: AsyncClient, node: NodeRecord) -> Given:
    """Who has which, as the tasks that run there say now."""
    from spinetta.client.views import TaskFilter
    from spinetta.model import State

    found: Given = {name: dict.fromkeys(labels, "") for name, labels in node.units}
    if not found:
        return found
    wanted = TaskFilter(states=(State.RUNNING,), node=node.name)
    async for info in client.list(wanted, limit=TASKS_MAX, with_usage=True):
        for name, labels in info.now.units if info.now is not None else ():
            found.setdefault(name, {}).update(dict.fromkeys(labels, info.id))
    return found


def unit_words(given: Given) -> list[str]:
    """For people, one countable each."""
    return [
        f"{name} " + ", ".join(f"{label} ({task[-6:]})" if task else label for label, task in of.items())
        for name, of in given.items()
    ]
