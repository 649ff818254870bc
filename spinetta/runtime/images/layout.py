"""OCI layouts: read, looked into, and made of a root file system."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from spinetta.runtime.images import layers
from spinetta.runtime.images.layers import CHUNK_BYTES, Tally, Tell, compression_of, decompressed
from spinetta.runtime.images.limits import LAYERS_MAX, MANIFEST_BYTES_MAX, Limits, Refused

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
TAG = "image"  # of what we make
REF_NAME = "org.opencontainers.image.ref.name"
GUESS_ENTRIES_MAX = 200_000  # of a tar file, to see what it is: `docker save` puts its list last
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True, slots=True)
class Blob:
    """What a descriptor names; `digest` is of the form ``sha256:…``."""

    digest: str
    size: int
    media_type: str

    def path(self, layout: Path) -> Path:
        """Where it is."""
        return layout / "blobs" / "sha256" / self.digest.removeprefix("sha256:")


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image of a layout."""

    blob: Blob
    config: Blob
    layers: tuple[Blob, ...]


def read_manifest(layout: Path) -> Manifest:
    """The only image of a layout, its manifest and configuration checked against their digests.

    Raises:
        Refused: there is not exactly one, or it is not what it should be.
    """
    index = _json((layout / "index.json").read_bytes()[: MANIFEST_BYTES_MAX + 1], "the index")
    found = [_blob(d) for d in _list(index, "manifests")]
    if len(found) != 1:
        raise Refused(f"{len(found)} images where one was expected")
    content = _json(_checked(found[0], layout), "the manifest")
    if len(_list(content, "layers")) > LAYERS_MAX:
        raise Refused(f"the image has more than {LAYERS_MAX} layers", reason="too-large")
    manifest = Manifest(found[0], _blob(content.get("config")), tuple(_blob(d) for d in _list(content, "layers")))
    _checked(manifest.config, layout)
    return manifest


def read_config(manifest: Manifest, layout: Path) -> dict[str, Any]:
    """The image's configuration: what `docker inspect` calls Config.

    Raises:
        Refused: it is not of the form it should be.
    """
    whole = _json(_checked(manifest.config, layout), "the configuration")
    config = whole.get("config") or {}
    if not isinstance(config, dict):
        raise Refused("the image's configuration is not of the form it should be")
    return {
        "env": _texts(config, "Env"),
        "entrypoint": _texts(config, "Entrypoint"),
        "cmd": _texts(config, "Cmd"),
        "user": _text(config, "User"),
        "workdir": _text(config, "WorkingDir"),
        "stop_signal": _text(config, "StopSignal"),
        "architecture": _text(whole, "architecture"),
        "os": _text(whole, "os"),
    }


def _json(data: bytes, what: str) -> dict[str, Any]:
    if len(data) > MANIFEST_BYTES_MAX:
        raise Refused(f"{what} of the image has more than {MANIFEST_BYTES_MAX} bytes", reason="too-large")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise Refused(f"{what} of the image is not JSON") from None
    if not isinstance(found, dict):
        raise Refused(f"{what} of the image is not of the form it should be")
    return found


def _list(document: Mapping[str, Any], key: str) -> Sequence[Any]:
    found = document.get(key) or []
    if not isinstance(found, list):
        raise Refused(f"{key!r} of the image is not a list")
    return found


def _texts(document: Mapping[str, Any], key: str) -> list[str]:
    found = _list(document, key)
    if not all(isinstance(v, str) and "\0" not in v for v in found):
        raise Refused(f"{key!r} in the image's configuration is not a list of texts")
    return list(found)


def _text(document: Mapping[str, Any], key: str) -> str:
    found = document.get(key) or ""
    if not isinstance(found, str) or "\0" in found:
        raise Refused(f"{key!r} in the image's configuration is not text")
    return found


def _blob(descriptor: Any) -> Blob:
    match descriptor:
        case {"digest": str(digest), "size": int(size), "mediaType": str(kind)}:
            word = digest.removeprefix("sha256:")
            if digest.startswith("sha256:") and len(word) == 64 and set(word) <= set("0123456789abcdef"):
                return Blob(digest, size, kind)
    raise Refused("the image's manifest is not of the form it should be", hint="only sha256 digests are understood")


def _checked(blob: Blob, layout: Path) -> bytes:
    with blob.path(layout).open("rb") as file:
        data = file.read(MANIFEST_BYTES_MAX + 1)
    if len(data) > MANIFEST_BYTES_MAX:
        raise Refused(f"{blob.digest} has more than {MANIFEST_BYTES_MAX} bytes", reason="too-large")
    if hashlib.sha256(data).hexdigest() != blob.digest.removeprefix("sha256:"):
        raise Refused(f"{blob.digest} is damaged: it is not what its digest says", reason="damaged")
    return data


def check_layers(manifest: Manifest, layout: Path, limits: Limits, ids: int, tell: Tell) -> Tally:
    """Look through all layers; see `layers`.

    Raises:
        Refused: one of them is not to be unpacked.
    """
    tally = Tally(limits, ids, _tell=tell)
    for layer in manifest.layers:
        _check_kind(layer)
        path = layer.path(layout)
        with decompressed(path, compression_of(path)) as stream:
            layers.check_layer(stream, tally)
    return tally


def _check_kind(layer: Blob) -> None:
    if "foreign" in layer.media_type or not layer.media_type.endswith(("tar", "+gzip", ".gzip", "+zstd")):
        raise Refused(
            f"a layer of the kind {layer.media_type[:100]!r} is not understood",
            hint="layers are tar files, plain or compressed with gzip or zstd",
        )


def made_plain(manifest: Manifest, layout: Path) -> None:
    """Say of each layer how it is really compressed, and unpack it where umoci does not know how.

    What `docker save` writes is said to be gzip, and is not. The image in the layout is another one then, only to be
    unpacked; its name remains the digest it came with.
    """
    content = json.loads(manifest.blob.path(layout).read_bytes())
    changed = False
    for descriptor, layer in zip(content["layers"], manifest.layers, strict=True):
        how = compression_of(layer.path(layout))
        if how not in ("", "gzip"):
            with decompressed(layer.path(layout), how) as stream:
                blob = _add(layout, stream, LAYER)
        else:
            blob = Blob(layer.digest, layer.size, LAYER + "+gzip" if how else LAYER)
        if blob != layer:
            descriptor.update(_ref(blob))
            changed = True
    if changed:
        _index(layout, _add_json(layout, content, MANIFEST))


# --- made here -------------------------------------------------------------------------------------------------------


def make(source: Path, layout: Path, tell: Tell, limits: Limits) -> Blob:
    """An image of one layer from a root file system: a directory, or a tar file of one.

    The same content gives the same digest. Returns the manifest.

    Raises:
        Refused: it cannot be read, or is too large.
    """
    (layout / "blobs" / "sha256").mkdir(parents=True)
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    if stat.S_ISDIR(source.stat().st_mode):
        layer = _of_directory(source, layout, tell, limits)
    else:
        tally = Tally(limits, 0, _tell=tell)
        with decompressed(source, compression_of(source)) as stream:
            layer = _add(layout, layers.Counted(stream, tally), LAYER)
    config = _add_json(
        layout,
        {
            "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [layer.digest]},
        },
        CONFIG,
    )
    manifest = _add_json(
        layout, {"schemaVersion": 2, "mediaType": MANIFEST, "config": _ref(config), "layers": [_ref(layer)]}, MANIFEST
    )
    _index(layout, manifest)
    return manifest


def _of_directory(source: Path, layout: Path, tell: Tell, limits: Limits) -> Blob:
    # Sorted, and without the times of tar's own headers, so that the same files always give the same digest.
    command = [
        "tar", "--create", "--file=-", "--format=pax", "--sort=name",
        "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime", "--numeric-owner", "--one-file-system",
        "--xattrs", "--xattrs-include=user.*", "--warning=no-file-ignored", f"--directory={source}", ".",
    ]  # fmt: skip
    tally = Tally(limits, 0, _tell=tell)
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_plain()
    ) as process:
        stdout, stderr = layers.there(process.stdout), layers.there(process.stderr)
        try:
            blob = _add(layout, layers.Counted(stdout, tally), LAYER)
        except BaseException:
            process.kill()
            raise
        said = stderr.read(4096).decode(errors="replace").strip()
    if process.returncode:
        last = said.splitlines()[-1] if said else f"tar ended with {process.returncode}"
        raise Refused(f"{source} cannot be read: {last}", reason="unreadable")
    return blob


def _plain() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


def _add(layout: Path, stream: layers.Counted | IO[bytes], media_type: str) -> Blob:
    hashed, size = hashlib.sha256(), 0
    new = layout / "blobs" / "sha256" / ".new"
    with new.open("wb") as file:
        while data := stream.read(CHUNK_BYTES):
            hashed.update(data)
            size += len(data)
            file.write(data)
    blob = Blob(f"sha256:{hashed.hexdigest()}", size, media_type)
    new.rename(blob.path(layout))
    return blob


def _add_json(layout: Path, document: object, media_type: str) -> Blob:
    data = json.dumps(document, separators=(",", ":"), sort_keys=True).encode()
    blob = Blob(f"sha256:{hashlib.sha256(data).hexdigest()}", len(data), media_type)
    blob.path(layout).write_bytes(data)
    return blob


def _ref(blob: Blob) -> dict[str, Any]:
    return {"mediaType": blob.media_type, "digest": blob.digest, "size": blob.size}


def _index(layout: Path, manifest: Blob) -> None:
    document = {"schemaVersion": 2, "manifests": [{**_ref(manifest), "annotations": {REF_NAME: TAG}}]}
    (layout / "index.json").write_text(json.dumps(document))


def discard_blobs(layout: Path) -> None:
    """The layers are not needed any more."""
    shutil.rmtree(layout, ignore_errors=True)


# --- what is it? -----------------------------------------------------------------------------------------------------


def guess(path: Path) -> str:
    """``oci``, ``oci-archive``, ``docker-archive`` or ``rootfs``, by what is there.

    Raises:
        Refused: it is none of them.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        if (path / "oci-layout").is_file() and (path / "index.json").is_file():
            return "oci"
        if any((path / name).is_dir() for name in ("bin", "usr", "sbin", "etc")):
            return "rootfs"
        hint = "an OCI layout has a file oci-layout, a root file system bin, usr or etc; or say which: rootfs:/PATH"
        raise Refused(f"{path} looks like no image", hint=hint)
    if not stat.S_ISREG(mode):
        raise Refused(f"{path} is neither a file nor a directory")
    names: set[str] = set()
    try:
        with decompressed(path, compression_of(path)) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for count, member in enumerate(tar):
                name = member.name.removeprefix("./").strip("/")
                names.add(name)
                vars(tar)["members"] = []
                if name.partition("/")[0] in ("bin", "usr", "etc", "lib", "sbin", "dev", "proc") or name == ".":
                    return "rootfs"
                if {"oci-layout", "index.json"} <= names:
                    return "oci-archive"
                if name == "manifest.json":
                    return "docker-archive"
                if count > GUESS_ENTRIES_MAX:
                    break
    except (tarfile.TarError, ValueError, EOFError, MemoryError) as e:
        raise Refused(
            f"{path} is no tar file that can be read: {e}", hint="see: spinetta image import --help"
        ) from None
    raise Refused(
        f"{path} looks like no image", hint="say which kind: oci-archive:/PATH, docker-archive:/PATH, rootfs:/PATH"
    )
