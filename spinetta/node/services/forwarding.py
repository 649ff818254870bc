"""Calls that are meant for another node: whether they may be passed on, and what that node's silence means."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import grpc
import grpc.aio

from spinetta.errors import Denied, OutcomeUnknown, UserError
from spinetta.node.services.desk import Asked
from spinetta.rights import CallerKind


def check_passed_on(asked: Asked, *, local_only: bool) -> None:
    """A node asks for nothing of its own accord.

    Raises:
        Denied: it does, or wants it passed on further.
    """
    if asked.caller.kind is CallerKind.NODE and not (asked.is_forwarded and local_only):
        raise Denied(f"{asked.caller.title} may only pass on what a person has asked for")


def is_for(us: str, name: str, asked: Asked) -> bool:
    """Whether a call that names a node (empty: the one that is asked) is for us; else it is to be passed on.

    Raises:
        Denied: it comes from a node that asks for itself.
        UserError: it has been passed on to us, and is for another.
    """
    check_passed_on(asked, local_only=True)
    if name in ("", us):
        return True
    if asked.is_forwarded:  # the address it was sent to was that of another node until lately
        raise UserError(f"this is node {us}, not {name}", field="node", reason="node-unreachable", hint="try again")
    return False


@contextlib.contextmanager
def passed_on(name: str) -> Iterator[None]:
    """A call to another node. Its own errors go through; its silence must not look like that of the node asked."""
    try:
        yield
    except grpc.aio.AioRpcError as e:
        if is_silence(e):
            if (e.details() or "").startswith("failed to connect"):
                raise UserError(
                    f"node {name} does not answer",
                    field="node",
                    reason="node-unreachable",
                    hint="is it running? See `spinetta node list`, in which it stays until its lease has run out",
                ) from e
            raise OutcomeUnknown(f"node {name} went away during the call") from e
        if e.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not e.trailing_metadata():
            raise OutcomeUnknown(f"node {name} did not answer in time") from e
        raise


@contextlib.contextmanager
def asked_of_holder(who: str, so: Callable[[], str] = lambda: "") -> Iterator[None]:
    """A call to the node that has an attempt, which can be made again. Its own errors go through.

    Args:
        who: that node, for people.
        so: what its silence has led to, for people.
    """
    try:
        yield
    except grpc.aio.AioRpcError as e:
        if not is_silence(e):
            raise
        raise UserError(
            f"{who} does not answer ({e.details()}){so()}",
            field="id",
            reason="node-unreachable",
            hint="it may be restarting: try again",
        ) from e


def is_silence(error: grpc.aio.AioRpcError) -> bool:
    """The other node is not reached, rather than that it has answered with an error: those carry metadata."""
    return error.code() is grpc.StatusCode.UNAVAILABLE and not error.trailing_metadata()
