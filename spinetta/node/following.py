"""A node whose cluster was made anew elsewhere, from a backup or from one voter's data, finds that out and follows."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from spinetta import keys
from spinetta.errors import StoreUnavailable, UserError
from spinetta.lineage import decode_generation
from spinetta.store.etcd import EtcdStore
from spinetta.store.identity import Identity
from spinetta.store.members import status
from spinetta.store.tls import TlsSource

log = logging.getLogger("spinetta.node")

ASK_S = 1.0  # a voter that needs longer counts as silent: the start does not wait for machines that are off
READ_S = 5.0


@dataclass(frozen=True, slots=True)
class Successor:
    """The cluster that follows this node's, and where it was found."""

    cluster_id: str
    endpoints: tuple[str, ...]


async def find_successor(
    identity: Identity,
    endpoints: Sequence[str],
    tls: TlsSource | None,
    more: Callable[[], Awaitable[Sequence[str]]] | None = None,
) -> Successor | None:
    """The cluster that says of itself that it follows this node's; None when nobody there says so.

    Only one that has a majority counts. When a voter of this node's own cluster has one, that is no proof: two clusters
    may both be alive after a recovery that should not have been made. Then an administrator must decide, and each node
    keeps to its own as long as that one has a majority.

    Args:
        endpoints: client URLs of voters other than this node's own member.
        more: further ones, asked for when those tell nothing.
    """
    if not identity.cluster_id:
        return None
    found = await _ask(identity, endpoints, tls)
    if found is None and more is not None:
        found = await _ask(identity, [u for u in await more() if u not in endpoints], tls)
    return found if isinstance(found, Successor) else None


async def _ask(identity: Identity, endpoints: Sequence[str], tls: TlsSource | None) -> Successor | str | None:
    """The successor; or the id of our own cluster, when a voter of it has a majority; None: nobody says anything."""

    async def look(url: str) -> tuple[str, str]:
        try:
            seen = await status(url, tls, timeout_s=ASK_S)
        except (StoreUnavailable, UserError):
            return url, ""
        return url, seen.cluster_id if seen.healthy else ""

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(look(url)) for url in endpoints]
    answers = [task.result() for task in tasks]
    if any(cluster_id == identity.cluster_id for _, cluster_id in answers):
        return identity.cluster_id
    for url, cluster_id in answers:
        if cluster_id and await _follows(url, tls, identity.cluster_id):
            return Successor(cluster_id, tuple(u for u, c in answers if c == cluster_id))
    return None


async def _follows(url: str, tls: TlsSource | None, cluster_id: str) -> bool:
    store = EtcdStore([url], tls)
    try:
        entry = (await store.read([keys.GENERATION], timeout_s=READ_S)).entries[keys.GENERATION]
    except StoreUnavailable:
        return False
    finally:
        await store.close()
    generation = decode_generation(entry.value) if entry is not None else None
    return generation is not None and generation.follows(cluster_id)
