"""The images of a node: had once however many want them, unpacked once, kept while they are used, then let go of.

All state is in memory and changed between two awaits; the directories say the same, see `shelf`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from spinetta import imageref
from spinetta.errors import NotFound, SpinettaError, UserError
from spinetta.imageref import ImageRef, Kind
from spinetta.runtime.images import errands, records, sources
from spinetta.runtime.images.catalogue import ADVERTISED_MAX, Catalogue, ImageInfo
from spinetta.runtime.images.errands import Tell
from spinetta.runtime.images.flights import Coming, Flights
from spinetta.runtime.images.limits import Limits
from spinetta.runtime.images.records import FILES, ROOTFS, ImageRecord
from spinetta.runtime.images.shelf import Shelf

log = logging.getLogger("spinetta.images")

FETCHES_MAX = 4  # at once: more share the same network
LOOK_LIMIT_S = 120.0  # for a registry to tell what it has
FETCH_LIMIT_S = 6 * 3600.0  # 100 GiB over 40 Mbit/s; what does not come at all ends sooner
UNPACK_LIMIT_S = 2 * 3600.0
VERIFY_LIMIT_S = 2 * 3600.0
SWEEP_EVERY_S = 60.0
CLOSE_LIMIT_S = 10.0
DEFAULT_IDS = 65536
NO_SPACE = "no-space"
EVERYTHING_BYTES = 1  # to keep: nothing that may go
TIDY_LIMIT_S = 600.0  # for what was let go of to be off the disk
UNSHIFTED = -1  # in a record: owners are as they were


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """What a store is told.

    Attributes:
        keep_bytes: of all images together, those in use and pinned included; 0: any amount.
        keep_s: how long one may be unused; 0: for ever.
        registries_conf: the site's, for skopeo and for bare names; empty: the machine's own, and no bare names.
        unpacks: images unpacked at once: each takes a processor and the disk.
        base: the host's id of containers' 0, for all of `ids`; None: not shifted, everything belongs to us.
        limits: how large an image may be.
    """

    keep_bytes: int = 50 << 30
    keep_s: float = 30 * 86400.0
    registries_conf: str = ""
    unpacks: int = 2
    base: int | None = None
    ids: int = DEFAULT_IDS
    limits: Limits = field(default_factory=Limits)


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
        self._wall_s = wall_s
        self._base = settings.base if settings.base is not None else UNSHIFTED
        self._settled = False  # whether it is known which of the attempts of an earlier daemon still run
        self._fetches = Flights[str]()
        self._unpacks = Flights[None]()
        self._fetching = asyncio.Semaphore(FETCHES_MAX)
        self._unpacking = asyncio.Semaphore(settings.unpacks)
        self._sources: set[str] = set()  # of images that are being fetched, as registries know them
        self._wanted = asyncio.Event()  # the sweeper
        self._tidy = asyncio.Event()  # nothing is left to be removed

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
        await asyncio.to_thread(store._catalogue.load, store._base, settings.ids)
        store._settled = not store._catalogue.uses
        sweeping = asyncio.create_task(store._sweep(), name="images")
        try:
            yield store
        finally:
            await store._fetches.close()
            await store._unpacks.close()
            sweeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sweeping

    # --- what there is ---

    def digests(self) -> tuple[str, ...]:
        """Digests of images that are here, by which this node or registries know them; the last used first."""
        return self._catalogue.digests()

    def coming(self) -> tuple[str, ...]:
        """Digests of images that are being fetched or unpacked, as far as they are known already."""
        return tuple(sorted({*self._unpacks.keys(), *self._sources}))[:ADVERTISED_MAX]

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
        digest = await self._get(ref, None if allows is None else tuple(allows), refresh=False, tell=tell)
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
            self._wanted.set()  # it may be marked, or too much

    def keep_only(self, keys: Iterable[str]) -> None:
        """These attempts, and no others of an earlier daemon, still use their images. Until then nothing goes."""
        self._catalogue.keep_only(keys)
        self._settled = True
        self._wanted.set()

    # --- for administrators ---

    async def pull(self, ref: ImageRef, *, name: str = "", tell: Tell = lambda _: None) -> ImageRecord:
        """Get an image, or see whether it is another one by now.

        Args:
            ref: which.
            name: to give it beside.
            tell: is told how far it is.
        """
        digest = await self._get(ref, None, refresh=True, tell=tell)
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
                    f"image {text} is in use by {uses} attempts",
                    field="image",
                    reason="in-use",
                    hint="--force has it removed when they have ended",
                )
            catalogue.rewrite(replace(record, marked=True, pinned=False))
            return catalogue.record(record.digest), "marked"
        catalogue.drop(record.digest)
        self._wanted.set()
        return record, "removed"

    def pin(self, text: str, pinned: bool) -> ImageRecord:
        """Keep an image whatever the limits say, or no more."""
        record = self.find(text)
        self._catalogue.rewrite(replace(record, pinned=pinned, marked=record.marked and not pinned))
        self._wanted.set()
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

    # --- getting one ---

    async def _get(self, ref: ImageRef, allows: tuple[str, ...] | None, *, refresh: bool, tell: Tell) -> str:
        """The digest of the image, which is here when this returns."""
        sources.check_allowed(ref, allows)
        if ref.digest and (known := self._catalogue.by_digest(ref.digest)):
            return known
        match ref.kind:
            case Kind.DIGEST:
                raise NotFound(
                    f"this node has no image {ref}",
                    field="image",
                    hint="pull it by its name, or see: spinetta image list",
                )
            case Kind.NAME:
                return await self._get_name(ref, refresh=refresh, tell=tell)
            case Kind.REGISTRY:
                known = self._catalogue.by_name(str(ref))
                if known is not None and not refresh:
                    return known
                return await self._fetch(ref, str(ref), "", tell)
            case _:
                local = await sources.look(ref, allows)
                name = str(local.ref)
                known = self._catalogue.by_name(name)
                fresh = known is not None and self._catalogue.record(known).names[name].stamp == local.stamp
                # A directory may have changed below without a sign of it at the top: who asks anew gets it anew.
                if known is not None and fresh and not (refresh and local.ref.kind is Kind.ROOTFS):
                    return known
                return await self._fetch(local.ref, name, local.stamp, tell)

    async def _get_name(self, ref: ImageRef, *, refresh: bool, tell: Tell) -> str:
        known = self._catalogue.by_name(str(ref))
        if known is not None and not refresh:
            return known
        try:
            places = await sources.mirrored(ref, self._settings.registries_conf)
        except NotFound:
            if known is not None:  # an administrator has named it so
                return known
            raise
        why: UserError | None = None
        for place in places:
            try:
                digest = await self._fetch(place, str(place), "", tell)
            except UserError as e:
                if not isinstance(e, NotFound) and e.reason != "registry-unreachable":
                    raise
                # One that does not answer may have it: that it is nowhere would be too much to say.
                why = e if why is None or isinstance(why, NotFound) else why
                continue
            self._catalogue.name(digest, str(ref), "")
            return digest
        raise why or NotFound(f"no mirror has an image {ref}", field="image")

    async def _fetch(self, ref: ImageRef, name: str, stamp: str, tell: Tell) -> str:
        return await self._fetches.join(
            f"{name} {stamp}".strip(),
            lambda coming: self._fetch_now(ref, name, stamp, coming),
            lambda coming: coming.listen(tell),
        )

    async def _fetch_now(self, ref: ImageRef, name: str, stamp: str, coming: Coming) -> str:
        try:
            return await self._fetch_once(ref, name, stamp, coming)
        except UserError as e:
            if e.reason != NO_SPACE or not await self._make_room():
                raise
        return await self._fetch_once(ref, name, stamp, coming)

    async def _fetch_once(self, ref: ImageRef, name: str, stamp: str, coming: Coming) -> str:
        try:
            staging = self._shelf.stage()
        except OSError as e:
            raise trouble(e) from e
        taken, source = False, ""

        def unpack(inner: Coming) -> Coroutine[Any, Any, None]:
            nonlocal taken
            taken = True  # the first one's is unpacked, and is its to throw away
            return self._unpack_now(staging, known, inner)

        try:
            async with self._fetching:
                told, source = await self._look(ref, staging, coming)
                known = self._catalogue.by_digest(source) or ""
                if not known:
                    self._expect(source, 1)
                    found = await errands.run("fetch", told, limit_s=FETCH_LIMIT_S, tell=coming.tell)
                    known = str(found["digest"])
            if known not in self._catalogue:
                await self._unpacks.join(known, unpack, lambda inner: inner.listen(coming.tell))
        finally:
            if not taken:
                self._discard(staging)
            self._expect(source, 0)
        if source:
            self._catalogue.add_source(known, source)
        self._catalogue.name(known, name, stamp)
        return known

    def _expect(self, source: str, how_many: int) -> None:
        """What a registry knows by this digest is coming, or not any more."""
        if source and (source in self._sources) != bool(how_many):
            (self._sources.add if how_many else self._sources.discard)(source)
            self._catalogue.changed()

    async def _make_room(self) -> bool:
        """Let go of all that nothing uses, as the disk is full; False when there is nothing of the sort."""
        if not self._catalogue.evict(EVERYTHING_BYTES, 0.0):
            return False
        log.warning("the disk is full: images that nothing uses have gone")
        self._tidy.clear()
        self._wanted.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TIDY_LIMIT_S):
                await self._tidy.wait()
        return True

    async def _look(self, ref: ImageRef, staging: Path, coming: Coming) -> tuple[dict[str, Any], str]:
        """What to tell the worker, and the digest that a registry has now, by which it is to be fetched."""
        told: dict[str, Any] = {
            "kind": ref.kind.value,
            "source": ref.path if ref.kind is Kind.ROOTFS else sources.skopeo_source(ref),
            "staging": str(staging),
            "policy": str(self._shelf.policy),
            "registries_conf": self._settings.registries_conf,
            "limits": asdict(self._settings.limits),
            "insecure": ref.on_loopback,
        }
        if ref.kind is not Kind.REGISTRY:
            return told, ""
        found = await errands.run("peek", told, limit_s=LOOK_LIMIT_S, tell=coming.tell)
        source = str(found["digest"])
        # By digest, so that a tag that moves meanwhile does not mix two images.
        told["source"] = sources.skopeo_source(replace(ref, tag="", digest=source))
        return {**told, "total": int(found["total"])}, source

    async def _unpack_now(self, staging: Path, digest: str, coming: Coming) -> None:
        self._catalogue.changed()
        base, ids = self._settings.base, self._settings.ids
        told = {
            "staging": str(staging),
            "limits": asdict(self._settings.limits),
            "base": base or 0,
            "ids": ids,
            "shift": base is not None,
        }
        try:
            async with self._unpacking:
                result = await errands.run("unpack", told, limit_s=UNPACK_LIMIT_S, tell=coming.tell)
            now_ms = int(self._wall_s() * 1000)
            record = records.from_result(digest, result, base=self._base, ids=ids, now_ms=now_ms)
            installing = asyncio.ensure_future(asyncio.to_thread(self._shelf.install, staging, record))
            try:
                await asyncio.shield(installing)
            except asyncio.CancelledError:
                await asyncio.wait((installing,))  # a thread cannot be called back: it is here then, and unused
                if installing.exception() is None:
                    self._catalogue.add(record)
                raise
            self._catalogue.add(record)
            log.info("image %s is here: %d files, %d bytes", digest, record.files, record.size_bytes)
        except OSError as e:
            raise trouble(e) from e
        finally:
            self._discard(staging)
            self._wanted.set()
            asyncio.get_running_loop().call_soon(self._catalogue.changed)  # when it is among those under way no more

    # --- letting go ---

    def _discard(self, path: Path) -> None:
        self._catalogue.discard(path)
        self._wanted.set()

    async def _sweep(self) -> None:
        """Remove what was discarded; evict after each change, and now and then."""
        stuck: set[Path] = set()
        while True:
            self._wanted.clear()
            try:
                if self._settled:
                    self._catalogue.evict(self._settings.keep_bytes, self._settings.keep_s)
                for path in [p for p in await asyncio.to_thread(self._shelf.discarded) if p not in stuck]:
                    if not await errands.remove(path) and await asyncio.to_thread(path.exists):
                        log.warning("%s cannot be removed whole; it is tried again when the node is restarted", path)
                        stuck.add(path)
                self._tidy.set()
            except OSError as e:  # no processes left, or the disk is gone: it may come back
                log.warning("images cannot be removed now: %s", e)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SWEEP_EVERY_S):
                    await self._wanted.wait()


def trouble(e: OSError) -> UserError:
    """What the disk says, as an error for whoever wanted an image."""
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            "there is no room on the node's disk for images",
            field="image",
            reason=NO_SPACE,
            hint="remove images (spinetta image list, rm), or lower image_keep",
        )
    return UserError(
        f"the node's images cannot be written to: {e.strerror}",
        field="image",
        reason="unreadable",
        hint="see to the node's disk",
    )


def _canonical(text: str) -> str:
    try:
        return str(imageref.parse(text))
    except SpinettaError:
        return text
