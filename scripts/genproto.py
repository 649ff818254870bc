#!/usr/bin/env python3
"""Generate spinetta/v1 from proto/; with --check, only say whether what is there is in step.

Run it with the project's development environment (grpcio-tools and mypy-protobuf of the pinned versions).
"""

from __future__ import annotations

import argparse
import filecmp
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path("spinetta/v1")


def generate(out: Path) -> None:
    """Write the modules and their type stubs below `out`."""
    protos = sorted(str(p.relative_to(ROOT / "proto")) for p in (ROOT / "proto").rglob("*.proto"))
    scripts = sysconfig.get_path("scripts")
    subprocess.run(
        [
            sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}",
            f"--python_out={out}", f"--grpc_python_out={out}",
            f"--mypy_out=quiet:{out}", f"--mypy_grpc_out=quiet:{out}",
            *protos,
        ],
        check=True,
        env={**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"},
    )  # fmt: skip
    (out / TARGET / "__init__.py").write_text('"""Generated from proto/spinetta/v1 by scripts/genproto.py."""\n')
    empty = out / TARGET / "record_pb2_grpc.py"  # no service in it
    empty.unlink(missing_ok=True)
    empty.with_suffix(".pyi").unlink(missing_ok=True)


def main() -> int:
    """Generate, or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when spinetta/v1 is stale")
    check = parser.parse_args().check
    if not check:
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as tmp:
        generate(Path(tmp))
        fresh, present = Path(tmp) / TARGET, ROOT / TARGET
        names = {p.name for d in (fresh, present) for p in d.iterdir() if p.is_file()}
        _, stale, missing = filecmp.cmpfiles(fresh, present, sorted(names), shallow=False)
        if stale or missing:
            print(
                f"spinetta/v1 is stale ({', '.join(sorted(stale + missing))}): run scripts/genproto.py", file=sys.stderr
            )
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
