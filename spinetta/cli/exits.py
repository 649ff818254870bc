"""Exit codes, and the one place that turns errors into them."""

from __future__ import annotations

from spinetta.errors import (
    Denied,
    Fenced,
    InvariantViolation,
    NotFound,
    OutcomeUnknown,
    RuntimeUnavailable,
    SpinettaError,
    StoreUnavailable,
    UserError,
)

OK = 0
TASK_FAILED = 1
USAGE = 2
NOT_FOUND = 3
UNAVAILABLE = 4
TIMED_OUT = 5
UNKNOWN = 6
DENIED = 7
UNAUTHENTICATED = 8
BUG = 70
INTERRUPTED = 130

# `submit --wait` and `--follow` of one task end with the task's own code. Ours are then few and high, as in other
# programs that run programs.
WALLTIME = 124
OURS = 125
NOT_STARTED = 126
ENDED_OTHERWISE = 127
SIGNAL_BASE = 128
DISK_LIMIT = SIGNAL_BASE + 25  # SIGXFSZ, with which the kernel ends who writes too much; ours had to be KILL

HELP = """\b
Exit codes:
  0    it worked (with --wait: all tasks succeeded)
  1    a task failed
  2    bad usage or bad input
  3    no such task or node
  4    no node could answer; nothing was changed
  5    the time was over
  6    no answer came: it may have happened, look before trying again
  7    you may not do this
  8    the cluster does not know you: log in
  70   a bug in Spinetta
  130  Ctrl-C

\b
`submit --wait` or `--follow` of one task ends with the task's own exit code, and else with:
  124    its time was over (--time)
  125    Spinetta failed, whatever the code would have been otherwise
  126    its program could not be started
  127    it was cancelled or lost
  128+N  signal N ended it (137: out of memory; 153: more than --disk in its scratch directory)
"""

HELP_EXEC = """\b
Exit codes:
  the command's own, and else:
  125    Spinetta failed: wrong usage, no such task, no answer, no right; the message says which
  126    the command could not be started
  128+N  signal N ended it
"""


def code_of(error: SpinettaError) -> int:
    """The exit code that an error means."""
    match error:
        case NotFound():
            return NOT_FOUND
        case Denied():
            return UNAUTHENTICATED if error.reason == "unauthenticated" else DENIED
        case UserError():
            return UNAVAILABLE if error.reason in ("node-unreachable", "store-full") else USAGE
        case StoreUnavailable() | Fenced() | RuntimeUnavailable():
            return UNAVAILABLE
        case OutcomeUnknown():
            return UNKNOWN
        case InvariantViolation():
            return BUG
        case _:
            return UNAVAILABLE


def word_of(error: SpinettaError) -> str:
    """A stable word for programs."""
    if isinstance(error, UserError | StoreUnavailable):
        return error.reason
    words = {USAGE: "invalid", UNAVAILABLE: "unavailable", UNKNOWN: "outcome-unknown", BUG: "bug"}
    return words[code_of(error)]
