"""One exception tree, named by what the caller should do.

::

    SpinettaError
    ├── UserError            the caller's input: says what is wrong and how to mend it
    │   ├── NotFound         no such task or node
    │   ├── AlreadyExists    the name or id is taken by something else
    │   ├── CorruptRecord    a stored value is not what its key says
    │   ├── Denied           who asks may not do this
    │   ├── Busy             too much is asked for: again later
    │   └── AskElsewhere     another node answers that
    ├── StoreUnavailable     nothing happened: safe to try again
    ├── RuntimeUnavailable   the shim does not answer; every request to it may be made twice: try again
    ├── OutcomeUnknown       may have happened: read back first
    │   └── StoreFull        the store is full, and says so of writes that it took, too
    ├── Compacted            the history asked for is gone: list again
    ├── Fenced               we no longer own this: stop, clean up, forget
    └── InvariantViolation   a bug: crash loudly, with the whole story
"""

from __future__ import annotations


class SpinettaError(Exception):
    """Base of all errors of this package."""


class UserError(SpinettaError):
    """The caller's input cannot be used.

    Attributes:
        field: which part of the input, e.g. ``tasks[3].resources.memory_bytes``; empty when it is the whole.
        hint: what to do about it; may be empty.
        reason: a stable word for programs.
    """

    reason = "invalid"

    def __init__(self, message: str, *, field: str = "", hint: str = "", reason: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.hint = hint
        if reason is not None:
            self.reason = reason

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text} ({self.hint})" if self.hint else text

    @property
    def message(self) -> str:
        """What is wrong, without the hint."""
        return super().__str__()


class NotFound(UserError):
    """There is no such task or node."""

    reason = "not-found"


class AlreadyExists(UserError):
    """The id or name is in use by something else."""

    reason = "already-exists"


class CorruptRecord(UserError):
    """A stored value is not what its key says; it is left as it is."""

    reason = "corrupt"


class Denied(UserError):
    """Who asks may not do this; reason ``unauthenticated`` when it is not known who asks."""

    reason = "denied"


class Busy(UserError):
    """Too much is asked for at once, by this caller or by all together: nothing was done; again later.

    Attributes:
        retry_after_s: how long to wait first.
    """

    reason = "busy"

    def __init__(self, message: str, *, retry_after_s: float, hint: str = "") -> None:
        super().__init__(message, hint=hint or f"try again in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class AskElsewhere(UserError):
    """This node may not answer that, another one does: reason ``ask-a-voter`` or ``ask-node``.

    Attributes:
        addresses: of the API of nodes that answer.
        object: what was asked for under its full name, for those who search by fragments; may be empty.
    """

    reason = "ask-a-voter"

    def __init__(
        self, message: str, *, addresses: tuple[str, ...], field: str = "", object_: str = "", reason: str | None = None
    ) -> None:
        where = " or ".join(addresses) or "none is known here at the moment"
        super().__init__(message, field=field, hint=f"ask {where}", reason=reason)
        self.addresses = addresses
        self.object = object_


class StoreUnavailable(SpinettaError):
    """The store did not answer, or refused, and nothing was changed: safe to try again.

    Attributes:
        hint: what to do about it; may be empty.
        reason: a stable word for programs: ``unavailable``, ``no-quorum``, ``cut-off``, ``store-corrupt``.
    """

    reason = "unavailable"

    def __init__(self, message: str = "", *, hint: str = "", reason: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        if reason is not None:
            self.reason = reason


class RuntimeUnavailable(SpinettaError):
    """The shim did not answer. Every request to it may be made twice, so: safe to try again."""


class OutcomeUnknown(SpinettaError):
    """A write was sent and no answer came: it may have happened. Read back before anything else.

    `hint`: what else to know about it; may be empty.
    """

    def __init__(self, message: str = "", *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class StoreFull(OutcomeUnknown):
    """Etcd is full and refused a write, which it may have carried out all the same.

    Etcd 3.4 and 3.5 say so after the fact of every write that was under way while the quota was passed.
    """


class Compacted(SpinettaError):
    """The history from the wanted revision on has been compacted away: list again."""

    def __init__(self, compact_revision: int) -> None:
        super().__init__(f"history before revision {compact_revision} has been compacted")
        self.compact_revision = compact_revision


class Fenced(SpinettaError):
    """What we held is no longer ours: stop it, clean up, forget it."""


class InvariantViolation(SpinettaError):
    """A bug. The message carries all that is needed to understand it."""
