"""``run.py ARGUMENTS [NAME...]``: ARGUMENTS is a JSON object; what came of it goes to stdout as another."""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.attacks.inside import attempts, ordinary, raw


def main() -> int:
    arguments: dict[str, Any] = json.loads(sys.argv[1])
    names = sys.argv[2:] or list(attempts.ATTACKS)
    told: Any
    if names == ["ordinary"]:
        told = ordinary.ordinary(arguments["numbers"]["ptrace"])
    elif names == ["calls"]:
        told = raw.calls(arguments["calls"])
    elif names == ["calls_of_32_bits"]:
        told = raw.calls_of_32_bits(arguments["calls"])
    else:
        attempts.ARGUMENTS.update(arguments)
        told = {name: attempts.ATTACKS[name]() for name in names}
    sys.stdout.write(json.dumps(told))
    return 0
