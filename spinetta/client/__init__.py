"""Spinetta in Python: `Client` and `AsyncClient`.

::

    from spinetta.client import Client

    with Client("127.0.0.1:7220,127.0.0.2:7220") as client:
        task = client.submit(["bowtie2", "-x", "lambda", "-U", "reads.fq"], cpus=2, memory="2GiB", time="1h")
        print(task.wait().task.outcome)

A secured cluster is reached with ``Client("10.0.0.5:7220", credentials=PATH)``; ``client.admin`` is for tokens, users,
nodes and policy.

Errors are those of `spinetta.errors`. Names are imported when first used: gRPC takes a while to load, and what only
makes specifications does not need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spinetta.client.admin import Access, AsyncAdmin, AuthorityInfo, NewToken, Rotated, WhoAmI
    from spinetta.client.aio import AsyncClient, AsyncTaskHandle
    from spinetta.client.containers import Mount
    from spinetta.client.execs import CopiedEntry, CopySkipped, ExecEnd, ExecOutput
    from spinetta.client.specs import TaskOptions, make_spec, new_id
    from spinetta.client.sync import Client, TaskHandle
    from spinetta.client.syncadmin import Admin
    from spinetta.client.views import (
        CancelResult,
        ClusterInfo,
        LeaveStep,
        LogChunk,
        NodeInfo,
        NodeList,
        Submitted,
        TaskChanges,
        TaskFilter,
        TaskInfo,
        UsageNow,
        VoterInfo,
        WaitResult,
    )

_HOMES = {
    "Access": "admin",
    "Admin": "syncadmin",
    "AsyncAdmin": "admin",
    "AuthorityInfo": "admin",
    "NewToken": "admin",
    "Rotated": "admin",
    "WhoAmI": "admin",
    "AsyncClient": "aio",
    "AsyncTaskHandle": "aio",
    "Client": "sync",
    "TaskHandle": "sync",
    "Mount": "containers",
    "CopiedEntry": "execs",
    "CopySkipped": "execs",
    "ExecEnd": "execs",
    "ExecOutput": "execs",
    "TaskOptions": "specs",
    "make_spec": "specs",
    "new_id": "specs",
    "CancelResult": "views",
    "ClusterInfo": "views",
    "LeaveStep": "views",
    "LogChunk": "views",
    "NodeInfo": "views",
    "NodeList": "views",
    "Submitted": "views",
    "TaskChanges": "views",
    "TaskFilter": "views",
    "TaskInfo": "views",
    "UsageNow": "views",
    "VoterInfo": "views",
    "WaitResult": "views",
}

__all__ = [
    "Access",
    "Admin",
    "AsyncAdmin",
    "AsyncClient",
    "AsyncTaskHandle",
    "AuthorityInfo",
    "CancelResult",
    "Client",
    "ClusterInfo",
    "CopiedEntry",
    "CopySkipped",
    "ExecEnd",
    "ExecOutput",
    "LeaveStep",
    "LogChunk",
    "Mount",
    "NewToken",
    "NodeInfo",
    "NodeList",
    "Rotated",
    "Submitted",
    "TaskChanges",
    "TaskFilter",
    "TaskHandle",
    "TaskInfo",
    "TaskOptions",
    "UsageNow",
    "VoterInfo",
    "WaitResult",
    "WhoAmI",
    "make_spec",
    "new_id",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
