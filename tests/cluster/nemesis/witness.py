"""What each task of the nemesis runs: it tells a ledger, outside the system, that an attempt begins, lives and ends.

Run by path with ``python3 -I -S``, which starts in about 10 ms. Each line is one write to a file opened for appending,
so lines of several writers do not mix: what (B begin, H alive, E end), task, attempt, node, CLOCK_BOOTTIME in
nanoseconds, and at the end the exit code. An attempt that is killed has no E: its last line is a time at which it
certainly lived.

Arguments: the ledger, seconds to live, exit codes with commas between (of the first, second … attempt; the last for
all further ones).
"""

import os
import sys
import time

ALIVE_EVERY_S = 0.1


def main() -> int:
    """Live for as long as was asked."""
    ledger, seconds, codes = sys.argv[1], float(sys.argv[2]), [int(c) for c in sys.argv[3].split(",")]
    attempt = int(os.environ["SPINETTA_ATTEMPT"])
    who = f"{os.environ['SPINETTA_TASK_ID']} {attempt} {os.environ['SPINETTA_NODE_NAME']}"
    fd = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def tell(what: str, more: str = "") -> None:
        os.write(fd, f"{what} {who} {time.clock_gettime_ns(time.CLOCK_BOOTTIME)}{more}\n".encode())

    tell("B")
    end_s = time.monotonic() + seconds
    while (left_s := end_s - time.monotonic()) > 0:
        time.sleep(min(left_s, ALIVE_EVERY_S))
        if left_s > ALIVE_EVERY_S:
            tell("H")
    code = codes[min(attempt, len(codes)) - 1]
    tell("E", f" {code}")
    return code


if __name__ == "__main__":
    sys.exit(main())
