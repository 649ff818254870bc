"""The command line. Nothing heavy is imported before a command needs it: ``spinetta --help`` must be instant."""

from __future__ import annotations


def main() -> None:
    """Entry point of the console script."""
    import sys

    from spinetta.cli.app import run

    sys.exit(run(sys.argv[1:]))
