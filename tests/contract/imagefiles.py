"""Images built by hand: layers entry by entry, layouts, archives. Nothing here checks what it is told to build."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
BUSYBOX = Path("/usr/bin/busybox")


@dataclass(frozen=True)
class Entry:
    """A member of a layer. `kind`: of tarfile."""

    name: str
    data: bytes = b""
    kind: bytes = tarfile.REGTYPE
    mode: int = 0o644
    link: str = ""
    uid: int = 0
    gid: int = 0
    device: tuple[int, int] = (0, 0)
    size: int | None = None  # instead of the data's own
    pax: tuple[tuple[str, str], ...] = ()


def folder(name: str, mode: int = 0o755, uid: int = 0) -> Entry:
    return Entry(name, kind=tarfile.DIRTYPE, mode=mode, uid=uid, gid=uid)


def symlink(name: str, to: str) -> Entry:
    return Entry(name, kind=tarfile.SYMTYPE, link=to, mode=0o777)


def hardlink(name: str, to: str) -> Entry:
    return Entry(name, kind=tarfile.LNKTYPE, link=to)


def device(name: str, kind: bytes = tarfile.CHRTYPE, number: tuple[int, int] = (1, 3)) -> Entry:
    return Entry(name, kind=kind, device=number, mode=0o666)


def layer(*entries: Entry) -> bytes:
    """A tar file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for e in entries:
            info = tarfile.TarInfo(e.name)
            info.type, info.mode, info.linkname, info.uid, info.gid = e.kind, e.mode, e.link, e.uid, e.gid
            info.devmajor, info.devminor = e.device
            info.pax_headers = dict(e.pax)
            info.size = len(e.data) if e.size is None else e.size
            tar.addfile(info, io.BytesIO(e.data) if info.isreg() else None)
    return out.getvalue()


def base() -> bytes:
    """A layer with busybox, sh, and a few users."""
    return layer(
        folder("bin"),
        Entry("bin/busybox", BUSYBOX.read_bytes(), mode=0o755),
        symlink("bin/sh", "busybox"),
        folder("etc"),
        Entry("etc/passwd", b"root:x:0:0::/:/bin/sh\nann:x:1234:100::/:/bin/sh\n"),
        Entry("etc/group", b"root:x:0:\nusers:x:100:\nlab:x:500:ann,bob\n"),
        folder("home"),
        folder("home/ann", uid=1234),
    )


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def layout(
    directory: Path,
    layers: Sequence[bytes],
    *,
    config: Mapping[str, Any] | None = None,
    tag: str = "latest",
    how: str = "",
    media_type: str = "",
) -> str:
    """An OCI layout; its manifest's digest. `how`: empty or gzip."""
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    (directory / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')

    def put(data: bytes, kind: str) -> dict[str, Any]:
        (blobs / digest_of(data).removeprefix("sha256:")).write_bytes(data)
        return {"mediaType": kind, "digest": digest_of(data), "size": len(data)}

    document = {
        "architecture": "amd64",
        "os": "linux",
        "config": dict(config or {}),
        "rootfs": {"type": "layers", "diff_ids": [digest_of(data) for data in layers]},
    }
    kind = media_type or (LAYER + "+gzip" if how == "gzip" else LAYER)
    packed = [gzip.compress(data, 1, mtime=0) if how == "gzip" else data for data in layers]
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": put(json.dumps(document).encode(), CONFIG),
        "layers": [put(data, kind) for data in packed],
    }
    found = put(json.dumps(manifest).encode(), MANIFEST)
    index = directory / "index.json"
    known = json.loads(index.read_text())["manifests"] if index.exists() else []
    found["annotations"] = {"org.opencontainers.image.ref.name": tag}
    index.write_text(json.dumps({"schemaVersion": 2, "manifests": [*known, found]}))
    return str(found["digest"])


def oci_archive(path: Path, directory: Path) -> None:
    """A layout as a tar file."""
    with tarfile.open(path, "w") as tar:
        for part in ("oci-layout", "index.json", "blobs"):
            tar.add(directory / part, part)


def docker_archive(
    path: Path, layers: Sequence[bytes], name: str = "tool:1", config: Mapping[str, Any] | None = None
) -> None:
    """As `docker save` writes."""
    document = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": dict(config or {}),
            "rootfs": {"type": "layers", "diff_ids": [digest_of(data) for data in layers]},
        }
    ).encode()
    config_name = digest_of(document).removeprefix("sha256:") + ".json"
    files = {config_name: document}
    for data in layers:
        files[f"{digest_of(data).removeprefix('sha256:')}/layer.tar"] = data
    of_layers = [n for n in files if n.endswith("layer.tar")]
    files["manifest.json"] = json.dumps([{"Config": config_name, "RepoTags": [name], "Layers": of_layers}]).encode()
    path.write_bytes(layer(*(Entry(n, d) for n, d in files.items())))
