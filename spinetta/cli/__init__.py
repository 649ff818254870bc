"""The command line. Nothing heavy is imported before a command needs it: ``spinetta --help`` must be instant."""

from __future__ import annotations


def main() -> None:
    """Entry point of the console script."""
    import os
    import sys

    # gRPC's core writes remarks of its own into our user's terminal otherwise ("Got goaway …", and each handshake that
    # fails). It reads this when it is loaded, whichever import does that.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from spinetta.cli.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # an impatient user's, before or after there is anything that says so nicely
        code = 130
    sys.exit(code)
