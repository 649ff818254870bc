"""Where images are: files of the node looked at, bare names looked up, and what skopeo calls all that."""

from __future__ import annotations

import asyncio
import os
import stat
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spinetta import imageref
from spinetta.errors import Denied, NotFound, UserError
from spinetta.imageref import ImageRef, Kind
from spinetta.names import is_below
from spinetta.runtime.images import errands

GUESS_LIMIT_S = 300.0  # to look through a compressed tar file
MIRRORS_MAX = 4  # each that does not answer costs its own time


@dataclass(frozen=True, slots=True)
class Local:
    """Files of the node: the reference with the real path, and a stamp that changes when they do.

    A directory's stamp tells only of what is directly in it.
    """

    ref: ImageRef
    stamp: str


def skopeo_source(ref: ImageRef) -> str:
    """As skopeo calls it."""
    if ref.kind is Kind.REGISTRY:
        end = f"@{ref.digest}" if ref.digest else f":{ref.tag}"
        return f"docker://{ref.host}/{ref.repository}{end}"
    return str(ref)


def check_allowed(ref: ImageRef, allows: Iterable[str] | None) -> None:
    """See that a task may have such an image; None: it is an administrator who asks.

    Raises:
        Denied: it may not.
    """
    why = None if allows is None else imageref.refusal(imageref.need(ref), allows)
    if why is not None:
        raise Denied(
            why, field="image", hint="ask an administrator of the node, or use a registry", reason="not-allowed"
        )


async def look(ref: ImageRef, allows: Iterable[str] | None) -> Local:
    """Look at the files of a local reference.

    Raises:
        NotFound, UserError: they are not there, or are no image.
        Denied: where they really are is not below a directory that is allowed.
    """
    allowed = None if allows is None else imageref.local_prefixes(allows)
    real, stamp = await asyncio.to_thread(_look, ref, allowed)
    ref = replace(ref, path=real)
    if ref.kind is Kind.PATH:
        found = await errands.run("guess", {"path": real}, limit_s=GUESS_LIMIT_S)
        ref = replace(ref, kind=Kind(found["kind"]))
    return Local(ref, stamp)


def _look(ref: ImageRef, allowed: Sequence[str] | None) -> tuple[str, str]:
    try:
        real = os.path.realpath(ref.path, strict=True)
        if allowed is not None and not any(is_below(real, os.path.realpath(p)) for p in allowed):
            raise Denied(
                f"{ref.path} is really {real}, which is not below a directory that is allowed",
                field="image",
                hint="ask an administrator of the node",
                reason="not-allowed",
            )
        found = os.stat(real)  # noqa: PTH116 - a path as text
        if stat.S_ISDIR(found.st_mode):
            index = Path(real) / "index.json"
            if ref.kind in (Kind.OCI, Kind.PATH) and index.is_file():
                found = index.stat()
        elif not stat.S_ISREG(found.st_mode):
            raise UserError(f"{ref.path} is neither a file nor a directory", field="image")
    except FileNotFoundError:
        raise NotFound(
            f"there is no {ref.path} on this node", field="image", hint="paths are those of the node that is asked"
        ) from None
    except OSError as e:
        raise UserError(f"{ref.path} cannot be read: {e.strerror}", field="image", reason="unreadable") from None
    if ":" in real or "," in real or real == "/":
        raise UserError(f"{real} is no path that an image can have", field="image", hint="without ':' and ','")
    return real, f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}"


async def mirrored(ref: ImageRef, registries_conf: str) -> tuple[ImageRef, ...]:
    """Where the site has an image of a bare name.

    Raises:
        NotFound: no administrator has said where to look.
        UserError: registries.conf cannot be used.
    """
    hint = f"name its registry: docker://HOST/{ref}; or import one under this name"
    if not registries_conf:
        raise NotFound(f"this node has no image {ref}, and no mirror is set for bare names", field="image", hint=hint)
    searched, aliases = await asyncio.to_thread(_read_registries, Path(registries_conf))
    places = imageref.mirrored(ref, searched[:MIRRORS_MAX], aliases)
    if not places:
        raise NotFound(
            f"this node has no image {ref}, and {registries_conf} says of no mirror", field="image", hint=hint
        )
    return places


def _read_registries(path: Path) -> tuple[list[str], list[tuple[str, str]]]:
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(
            f"{path} cannot be used: {e}", field="registries_conf", hint="an administrator of the node must mend it"
        ) from None
    searched, aliases = found.get("unqualified-search-registries", []), found.get("aliases", {})
    if not isinstance(searched, list) or not isinstance(aliases, dict):
        raise UserError(f"{path} is not of the form it should be", field="registries_conf")
    return [str(s) for s in searched], [(str(k), str(v)) for k, v in aliases.items()]
