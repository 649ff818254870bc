"""An image of a node, made of this machine's own files: nothing is fetched, nothing is built.

What is in it: this Python with what spinetta depends on, spinetta itself, etcd, runc and the programs beside it, each
with the libraries it is linked with, and below all of it the root file system of ``scripts/demo-image.sh``, which has a
shell and what the demonstration runs. Every file lies where it lies here. It takes about three seconds, so it is not
kept between runs, where it could be out of date.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("etcd", "etcdctl", "runc", "tini-static", "skopeo", "umoci", "mount", "umount", "ip")
EXAMPLES = Path("/usr/share/doc/bowtie2/examples")
# Of Python's library, what no node runs.
LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "ensurepip",
    "lib2to3",
    "tkinter",
    "turtledemo",
    "site-packages",
    "dist-packages",
}
BYTES_MAX = 600 << 20  # somebody's large Python, perhaps; better told than filled into a disk
ENTRY = "/usr/sbin/node-entry"
DEMO_IMAGE = "/srv/demo-image.tar"  # for the containers within


def write(target: Path, entry: str) -> int:
    """Write the image as a tar of a root file system; its size in bytes.

    Args:
        target: the file.
        entry: a shell script, the container's first program (at `ENTRY`).
    """
    below = target.with_suffix(".below.tar")
    subprocess.run([str(ROOT / "scripts" / "demo-image.sh"), str(below)], check=True, capture_output=True, timeout=60)
    tree = _Tree(target)
    with tree.tar, tarfile.open(below) as demo:
        for member in demo:
            if not member.isdir() or member.name != ".":
                tree.copy(member, demo.extractfile(member) if member.isreg() else None)
        tree.write(DEMO_IMAGE, below.read_bytes(), 0o644)
        below.unlink()
        files = [*map(_program, PROGRAMS), *_python(), *_packages()]
        for path in files:
            tree.add(path)
        for path in _libraries(files):
            tree.add(path)
        for top in (ROOT / "spinetta", ROOT / "examples", EXAMPLES):
            tree.add_below(top)
        tree.write(ENTRY, entry.encode(), 0o755)
    return target.stat().st_size


class _Tree:
    """A tar in which everything keeps its path, symbolic links on the way included."""

    def __init__(self, target: Path) -> None:
        self.tar = tarfile.TarFile(target, "w")
        self._there: set[str] = set()

    def copy(self, member: tarfile.TarInfo, data: object) -> None:
        """A member of another tar."""
        member.name = os.path.normpath(member.name)
        self._there.add(member.name)
        self.tar.addfile(member, data)  # type: ignore[arg-type]

    def write(self, path: str, data: bytes, mode: int) -> None:
        """A file of our own."""
        info = tarfile.TarInfo(path.lstrip("/"))
        info.size, info.mode = len(data), mode
        self.tar.addfile(info, io.BytesIO(data))

    def add(self, path: Path) -> None:
        """A file of this machine, and what it links to; its directories, and what those link to."""
        here = Path("/")
        parts = list(path.absolute().parts[1:])
        while parts:
            here /= parts.pop(0)
            if here.is_symlink():
                self._one(here)
                # Go on where it leads, with what is left of the path.
                here, parts = Path("/"), [*Path(os.path.normpath(here.parent / here.readlink())).parts[1:], *parts]
            elif here.is_dir() or not parts:
                self._one(here)

    def add_below(self, top: Path) -> None:
        """All files below a folder."""
        for folder, folders, names in os.walk(top):
            folders[:] = [f for f in folders if f != "__pycache__"]
            for name in names:
                self.add(Path(folder, name))

    def _one(self, path: Path) -> None:
        name = str(path).lstrip("/")
        if name in self._there:
            return
        self._there.add(name)
        info = self.tar.gettarinfo(path, name)
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        if info.isreg() or info.islnk():
            info.type, info.linkname = tarfile.REGTYPE, ""  # two links to one file are two files
            info.size = path.stat().st_size
            with path.open("rb") as data:
                self.tar.addfile(info, data)
            assert self.tar.offset < BYTES_MAX, f"the image grows past {BYTES_MAX} bytes at {path}"
        else:
            self.tar.addfile(info)


def _program(name: str) -> Path:
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    assert path is not None, f"{name} is not installed (scripts/setup.sh --dev does)"
    return Path(path)


def _python() -> Iterator[Path]:
    """The interpreter, its library, and the virtual environment's own files."""
    yield Path(sys.executable)
    yield Path(os.path.realpath(sys.executable))
    if sys.prefix != sys.base_prefix:
        yield Path(sys.prefix, "pyvenv.cfg")
    for name in ("libpython3.so", sysconfig.get_config_var("INSTSONAME") or ""):
        library = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib", name)
        if name and library.is_file():
            yield library
    for key in ("stdlib", "platstdlib"):
        for folder, folders, names in os.walk(sysconfig.get_path(key, vars={"base": sys.base_prefix})):
            folders[:] = [f for f in folders if f not in LEFT_OUT and not f.startswith("config-")]
            yield from (Path(folder, name) for name in names)


def _packages() -> Iterator[Path]:
    """The files of what spinetta depends on."""
    wanted, seen = ["spinetta"], set()
    while wanted:
        name = wanted.pop()
        if (plain := re.sub(r"[-_.]+", "-", name).lower()) in seen:
            continue
        seen.add(plain)
        found = importlib.metadata.distribution(name)
        for file in found.files or ():
            if (path := Path(os.path.normpath(str(found.locate_file(file))))).is_file():
                yield path
        for line in found.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted.append(requirement.name)


def _libraries(files: Iterable[Path]) -> list[Path]:
    """What programs and extension modules are linked with, as the dynamic linker says."""
    binaries = []
    for path in files:
        with path.open("rb") as file:
            if file.read(4) == b"\x7fELF":
                binaries.append(str(path))
    said = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=False, timeout=60).stdout
    found = set(re.findall(r"^\t(?:.* => )?(/\S+) \(", said, re.MULTILINE))
    return sorted({Path(p) for p in found} | {Path(os.path.realpath(p)) for p in found})
