"""Getting an image: found here, or fetched and unpacked, once for all who want it at the same time."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from spinetta.errors import NotFound, UserError
from spinetta.imageref import ImageRef, Kind
from spinetta.runtime.images import errands, records, sources
from spinetta.runtime.images.catalogue import Catalogue
from spinetta.runtime.images.errands import Tell
from spinetta.runtime.images.flights import Coming, Flights
from spinetta.runtime.images.limits import Limits
from spinetta.runtime.images.shelf import Shelf
from spinetta.runtime.images.sweeping import Sweeper

log = logging.getLogger("spinetta.images")

FETCHES_MAX = 4  # at once: more share the same network
LOOK_LIMIT_S = 120.0  # for a registry to tell what it has
FETCH_LIMIT_S = 6 * 3600.0  # 100 GiB over 40 Mbit/s; what does not come at all ends sooner
UNPACK_LIMIT_S = 2 * 3600.0
DEFAULT_IDS = 65536
NO_SPACE = "no-space"
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

    @property
    def recorded_base(self) -> int:
        """`base` as it is in records."""
        return UNSHIFTED if self.base is None else self.base


class Getter:
    """Gets images onto a shelf.

    Args:
        shelf: where they go.
        catalogue: what there is.
        sweeper: makes room.
        settings: see there.
        wall_s: the wall clock.
    """

    def __init__(
        self, shelf: Shelf, catalogue: Catalogue, sweeper: Sweeper, settings: StoreSettings, wall_s: Callable[[], float]
    ) -> None:
        self._shelf = shelf
        self._catalogue = catalogue
        self._sweeper = sweeper
        self._settings = settings
        self._wall_s = wall_s
        self._fetches = Flights[str]()
        self._unpacks = Flights[None]()
        self._fetching = asyncio.Semaphore(FETCHES_MAX)
        self._unpacking = asyncio.Semaphore(settings.unpacks)
        self._sources: set[str] = set()  # of images that are being fetched, as registries know them

    def coming(self) -> tuple[str, ...]:
        """Digests of images that are being fetched or unpacked, as far as they are known already."""
        return tuple(sorted({*self._unpacks.keys(), *self._sources}))

    async def close(self) -> None:
        """End all work. Whoever waits for it gets RuntimeUnavailable."""
        await self._fetches.close()
        await self._unpacks.close()

    async def get(self, ref: ImageRef, allows: tuple[str, ...] | None, *, refresh: bool, tell: Tell) -> str:
        """The digest of the image, which is here when this returns.

        Args:
            ref: which.
            allows: what tasks may have; None: an administrator asks.
            refresh: whether a name that is known is looked up anew.
            tell: is told how far it is.

        Raises:
            NotFound, Denied, UserError: it cannot be had.
            RuntimeUnavailable: not now.
        """
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
            if e.reason != NO_SPACE or not await self._sweeper.make_room():
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
                self._sweeper.discard(staging)
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
            record = records.from_result(digest, result, base=self._settings.recorded_base, ids=ids, now_ms=now_ms)
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
            self._sweeper.discard(staging)
            self._sweeper.look()
            asyncio.get_running_loop().call_soon(self._catalogue.changed)  # when it is among those under way no more


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
