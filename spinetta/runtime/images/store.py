"""The images of a node: had once however many want them, unpacked once, kept while they are used, then let go of.

All state is in memory and changed between two awaits; the directories say the same, see `shelf`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from spinetta import imageref
from spinetta.errors import SpinettaError, UserError
from spinetta.imageref import ImageRef
from spinetta.runtime.images import errands
from spinetta.runtime.images.catalogue import ADVERTISED_MAX, Catalogue, ImageInfo
from spinetta.runtime.images.errands import Tell
from spinetta.runtime.images.getting import Getter, StoreSettings, trouble
from spinetta.runtime.images.records import FILES, ROOTFS, ImageRecord
from spinetta.runtime.images.shelf import Shelf
from spinetta.runtime.images.sweeping import Sweeper

__all__ = ["ImageStore", "PreparedImage", "StoreSettings"]

VERIFY_LIMIT_S = 2 * 3600.0


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """An image that is ready for a container.

    Attributes:
        rootfs: its root file system; nothing in it may be changed.
        user: uid and gid inside, of its USER; None: it names none.
        groups: further ones of that user.
        user_trouble: why its USER means nothing, if that is so.
        architecture: which machines it is for, as Go names them, e.g. ``amd64``; empty: it does not say.
    """

    digest: str
    rootfs: Path
    env: tuple[str, ...]
    entrypoint: tuple[str, ...]
    cmd: tuple[str, ...]
    user: tuple[int, int] | None
    groups: tuple[int, ...]
    workdir: str
    user_trouble: str = ""
    stop_signal: str = ""
    architecture: str = ""


class ImageStore:
    """See the module. Made by `open`."""

    def __init__(self, directory: Path, settings: StoreSettings, *, wall_s: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._shelf = Shelf(directory, settings.base)
        self._catalogue = Catalogue(self._shelf, wall_s)
        self._sweeper = Sweeper(self._shelf, self._catalogue, settings.keep_bytes, settings.keep_s)
        self._getter = Getter(self._shelf, self._catalogue, self._sweeper, settings, wall_s)

    @classmethod
    @asynccontextmanager
    async def open(
        cls, directory: Path, settings: StoreSettings, *, wall_s: Callable[[], float] = time.time
    ) -> AsyncIterator[ImageStore]:
        """The store in a directory, cleaned of what was left half done; work under way ends with the context.

        Raises:
            UserError: the directory cannot be used.
        """
        store = cls(directory, settings, wall_s=wall_s)
        await asyncio.to_thread(store._catalogue.load, settings.recorded_base, settings.ids)
        store._sweeper.settled = not store._catalogue.uses
        sweeping = asyncio.create_task(store._sweeper.run(), name="images")
        try:
            yield store
        finally:
            await store._getter.close()
            sweeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sweeping

    # --- what there is ---

    def digests(self) -> tuple[str, ...]:
        """Digests of images that are here, by which this node or registries know them; the last used first."""
        return self._catalogue.digests()

    def coming(self) -> tuple[str, ...]:
        """Digests of images that are being fetched or unpacked, as far as they are known already."""
        return self._getter.coming()[:ADVERTISED_MAX]

    def listen(self, callback: Callable[[], None]) -> None:
        """Have it called, in the event loop, after each change of what `digests` or `coming` tell."""
        self._catalogue.listen(callback)

    def images(self) -> list[ImageInfo]:
        """All images, the last used first."""
        return self._catalogue.images()

    def find(self, text: str) -> ImageRecord:
        """The image of a digest, the beginning of one, or a name; see `Catalogue.find`."""
        return self._catalogue.find(text)

    # --- for tasks ---

    @asynccontextmanager
    async def use(
        self, ref: ImageRef, key: str, *, allows: Iterable[str] | None = None
    ) -> AsyncIterator[PreparedImage]:
        """The image, kept for as long as the context lasts. See `acquire`."""
        prepared = await self.acquire(ref, key, allows=allows)
        try:
            yield prepared
        finally:
            self.release(key)

    async def acquire(
        self, ref: ImageRef, key: str, *, allows: Iterable[str] | None = None, tell: Tell = lambda _: None
    ) -> PreparedImage:
        """The image, fetched and unpacked if it is not here, kept until `release` of the key. May be repeated.

        A registry's tag that is here already is not asked for again; `pull` does that.

        Args:
            ref: which.
            key: the attempt's; the use outlives the daemon.
            allows: what tasks may have here (see `imageref.need`); None: an administrator asks.
            tell: is told how far it is.

        Raises:
            NotFound, Denied, UserError: it cannot be had. For a reason in `errands.TRANSIENT` another try may succeed.
            RuntimeUnavailable: not now.
        """
        digest = await self._getter.get(ref, None if allows is None else tuple(allows), refresh=False, tell=tell)
        try:
            record = self._catalogue.use(key, digest).record
        except OSError as e:
            raise trouble(e) from e
        return PreparedImage(
            digest,
            self._shelf.path(record) / ROOTFS,
            record.env,
            record.entrypoint,
            record.cmd,
            (record.user[0], record.user[1]) if record.user is not None else None,
            record.user[2:] if record.user is not None else (),
            record.workdir,
            record.user_trouble,
            record.stop_signal,
            record.architecture,
        )

    def release(self, key: str) -> None:
        """The attempt has ended, and all that it had mounted is gone. May be repeated."""
        if self._catalogue.unuse(key):
            self._sweeper.look()  # it may be marked, or too much

    def keep_only(self, keys: Iterable[str]) -> None:
        """These attempts, and no others of an earlier daemon, still use their images. Until then nothing goes."""
        self._catalogue.keep_only(keys)
        self._sweeper.settled = True
        self._sweeper.look()

    # --- for administrators ---

    async def pull(self, ref: ImageRef, *, name: str = "", tell: Tell = lambda _: None) -> ImageRecord:
        """Get an image, or see whether it is another one by now.

        Args:
            ref: which.
            name: to give it beside.
            tell: is told how far it is.
        """
        digest = await self._getter.get(ref, None, refresh=True, tell=tell)
        if name:
            self._catalogue.name(digest, name, "")
        return self._catalogue.record(digest)

    def remove(self, text: str, *, force: bool = False) -> tuple[ImageRecord, str]:
        """Remove an image, or the name that was given if it has others; what became of it.

        Returns ``removed``, ``unnamed`` or, with `force` while it is in use, ``marked``: removed when nothing uses it.

        Raises:
            UserError: it is in use (reason ``in-use``) or pinned (``pinned``), and `force` is not given.
        """
        catalogue, record = self._catalogue, self.find(text)
        name = next((n for n in record.names if n in (text, _canonical(text))), None)
        if name is not None and len(record.names) > 1 and not force:
            catalogue.unname(record.digest, name)
            return catalogue.record(record.digest), "unnamed"
        if record.pinned and not force:
            raise UserError(
                f"image {text} is pinned", field="image", reason="pinned", hint="spinetta image unpin, or --force"
            )
        uses = next(i.uses for i in catalogue.images() if i.record.digest == record.digest)
        if uses or catalogue.held(record.digest).handles:
            if not force:
                raise UserError(
                    f"image {text} is in use by {uses} attempt{'s' * (uses > 1)}"
                    if uses
                    else f"image {text} is being verified",
                    field="image",
                    reason="in-use",
                    hint="--force has it removed when they have ended",
                )
            catalogue.rewrite(replace(record, marked=True, pinned=False))
            return catalogue.record(record.digest), "marked"
        catalogue.drop(record.digest)
        self._sweeper.look()
        return record, "removed"

    def pin(self, text: str, pinned: bool) -> ImageRecord:
        """Keep an image whatever the limits say, or no more."""
        record = self.find(text)
        self._catalogue.rewrite(replace(record, pinned=pinned, marked=record.marked and not pinned))
        self._sweeper.look()
        return self._catalogue.record(record.digest)

    async def verify(self, text: str, tell: Tell = lambda _: None) -> list[str]:
        """How an image differs from what was unpacked, file by file, in words; empty: in nothing.

        Raises:
            UserError: it cannot be said (reason ``damaged``: its list itself is not what it was).
        """
        record = self.find(text)
        held, path = self._catalogue.held(record.digest), self._shelf.path(record)
        told = {
            "root": str(path / ROOTFS),
            "listing": str(path / FILES),
            "base": max(record.base, 0),
            "tree": record.tree,
            "total": record.size_bytes,
        }
        held.handles += 1
        try:
            found = await errands.run("verify", told, limit_s=VERIFY_LIMIT_S, tell=tell)
        finally:
            held.handles -= 1
        return [str(d) for d in found["differences"]]


def _canonical(text: str) -> str:
    try:
        return str(imageref.parse(text))
    except SpinettaError:
        return text
