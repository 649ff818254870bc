"""Which images there are, what they are called, and who uses them: in memory, and the same on the disk.

Nothing here waits: what is decided between two awaits of the store holds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from spinetta import eviction, imageref
from spinetta.errors import NotFound, RuntimeUnavailable, UserError
from spinetta.runtime.clocks import SteppedClock
from spinetta.runtime.images.records import ImageRecord
from spinetta.runtime.images.shelf import Shelf

log = logging.getLogger("spinetta.images")

ADVERTISED_MAX = 256  # digests in the node's record, which every node reads: 70 bytes each
SOURCES_MAX = 16  # digests by which registries have one image: one for each list of architectures that it is in
FRESH_S = 30.0  # what has just come does not go again before those who waited for it had it
PREFIX_MIN = 6  # characters of a digest that may name an image


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """An image as it is listed; times in milliseconds since 1970. `uses`: attempts that use it now."""

    record: ImageRecord
    used_ms: int
    uses: int


@dataclass(slots=True)
class Held:
    """An image. `handles`: calls that need it for a moment. `fresh_until_s`: of the steady clock, see `FRESH_S`."""

    record: ImageRecord
    used_s: float
    fresh_until_s: float = 0.0
    handles: int = 0


class Catalogue:
    """The images on a shelf.

    Args:
        shelf: where they are.
        wall_s: the wall clock.
    """

    def __init__(self, shelf: Shelf, wall_s: Callable[[], float]) -> None:
        self._shelf = shelf
        self._wall_s = wall_s
        self._clock = SteppedClock(wall_s, of="images")
        self._images: dict[str, Held] = {}
        self._names: dict[str, str] = {}
        self._uses: dict[str, str] = {}
        self._listeners: list[Callable[[], None]] = []

    def load(self, base: int, ids: int) -> None:
        """Look at the shelf; see `Shelf.open` and `Shelf.load`. Takes a while."""
        self._shelf.open()
        found = self._shelf.load(base, ids)
        self._images = {digest: Held(record, used_s) for digest, (record, used_s) in found.items()}
        latest: dict[str, int] = {}
        for digest, held in self._images.items():
            for name, about in held.record.names.items():
                if about.since_ms >= latest.get(name, -1):
                    latest[name], self._names[name] = about.since_ms, digest
        for digest, held in self._images.items():
            for name in held.record.names:
                if self._names[name] != digest:  # a crash came between giving and taking it
                    held.record = held.record.unnamed(name)
        for key, digest in self._shelf.used().items():
            if digest in self._images:
                self._uses[key] = digest
            else:
                self._shelf.unuse(key)

    # --- what there is ---

    def listen(self, callback: Callable[[], None]) -> None:
        """Have it called after each change."""
        self._listeners.append(callback)

    def changed(self) -> None:
        """Something has changed."""
        for callback in self._listeners:
            callback()

    def __contains__(self, digest: str) -> bool:
        return digest in self._images

    @property
    def uses(self) -> frozenset[str]:
        """Keys of attempts that use an image."""
        return frozenset(self._uses)

    def digests(self) -> tuple[str, ...]:
        """Digests by which this node or registries know what is here; the last used first."""
        found = dict.fromkeys(
            d for h in self._latest() if not h.record.marked for d in (h.record.digest, *h.record.sources)
        )
        return tuple(found)[:ADVERTISED_MAX]

    def images(self) -> list[ImageInfo]:
        """All, the last used first."""
        users: dict[str, int] = {}
        for digest in self._uses.values():
            users[digest] = users.get(digest, 0) + 1
        return [ImageInfo(h.record, int(h.used_s * 1000), users.get(h.record.digest, 0)) for h in self._latest()]

    def _latest(self) -> list[Held]:
        return sorted(self._images.values(), key=lambda h: (-h.used_s, h.record.digest))

    def held(self, digest: str) -> Held:
        """The image of a digest.

        Raises:
            RuntimeUnavailable: it is not here any more.
        """
        held = self._images.get(digest)
        if held is None:
            raise RuntimeUnavailable(f"the image {digest} was removed in the same moment")
        return held

    def record(self, digest: str) -> ImageRecord:
        """The same, its record."""
        return self.held(digest).record

    def by_name(self, name: str) -> str | None:
        """The digest of what is called so."""
        return self._names.get(name)

    def by_digest(self, digest: str) -> str | None:
        """Our digest of what this node, or a registry, knows by this one."""
        if digest in self._images:
            return digest
        return next((d for d, h in self._images.items() if digest in h.record.sources), None) if digest else None

    def find(self, text: str) -> ImageRecord:
        """The image of a digest, the beginning of one, or a name.

        Raises:
            NotFound: there is none.
            UserError: several begin so.
        """
        word = text.removeprefix("sha256:")
        if len(word) >= PREFIX_MIN and set(word) <= set("0123456789abcdef"):
            near = [
                h.record
                for h in self._images.values()
                if any(d.removeprefix("sha256:").startswith(word) for d in (h.record.digest, *h.record.sources))
            ]
            if len(near) == 1:
                return near[0]
            if near:
                raise UserError(
                    f"{len(near)} images begin with {text}", field="image", reason="ambiguous", hint="give more of it"
                )
        ref = imageref.parse(text)
        digest = self.by_name(str(ref)) or self.by_digest(ref.digest)
        if digest is None:
            raise NotFound(f"this node has no image {text}", field="image", hint="see: spinetta image list")
        return self._images[digest].record

    # --- changes ---

    def add(self, record: ImageRecord) -> None:
        """One has been put on the shelf."""
        self._images[record.digest] = Held(record, self._wall_s(), time.monotonic() + FRESH_S)

    def rewrite(self, record: ImageRecord) -> None:
        """In memory at once, so that nobody works with an older one; then on the disk.

        Raises:
            UserError: it cannot be written.
        """
        self._images[record.digest].record = record
        try:
            self._shelf.rewrite(record)  # a few kilobytes; in order, which threads would not keep
        except OSError as e:
            raise UserError(
                f"the record of image {record.digest} cannot be written: {e.strerror}",
                reason="unreadable",
                hint="see to the node's disk",
            ) from e
        self.changed()

    def name(self, digest: str, name: str, stamp: str) -> None:
        """Give an image a name, and take it from the one that had it. It is wanted: no more marked."""
        record = self.record(digest)
        now = record.names.get(name)
        if now is not None and now.stamp == stamp and not record.marked:
            return
        before = self._names.get(name)
        self._names[name] = digest
        named = replace(record.named(name, stamp, int(self._wall_s() * 1000)), marked=False)
        for forgotten in record.names.keys() - named.names.keys():
            self._names.pop(forgotten, None)
        self.rewrite(named)
        if before is not None and before != digest and before in self._images:
            self.rewrite(self._images[before].record.unnamed(name))

    def unname(self, digest: str, name: str) -> None:
        """Take a name from an image."""
        self._names.pop(name, None)
        self.rewrite(self.record(digest).unnamed(name))

    def add_source(self, digest: str, source: str) -> None:
        """A registry knows it by this digest."""
        record = self.record(digest)
        if source != digest and source not in record.sources:
            self.rewrite(replace(record, sources=(*record.sources, source)[-SOURCES_MAX:]))

    def use(self, key: str, digest: str) -> Held:
        """An attempt uses it."""
        held = self.held(digest)
        self._shelf.use(key, digest)
        self._uses[key] = digest
        self._touch(held)
        return held

    def unuse(self, key: str) -> bool:
        """It does so no more; False when it did not."""
        digest = self._uses.pop(key, None)
        self._shelf.unuse(key)
        if digest is None or digest not in self._images:
            return False
        self._touch(self._images[digest])
        return True

    def _touch(self, held: Held) -> None:
        held.used_s = self._wall_s()
        self._shelf.touch(held.record)

    def drop(self, digest: str) -> None:
        """Let go of one."""
        held = self._images.pop(digest)
        for name in held.record.names:
            if self._names.get(name) == digest:
                del self._names[name]
        self.discard(self._shelf.path(held.record))
        self.changed()

    def discard(self, path: Path) -> None:
        """Out of sight at once; if that cannot be, at the next start."""
        try:
            self._shelf.discard(path)
        except OSError as e:
            log.warning("%s cannot be put away: %s", path, e.strerror)

    def evict(self, keep_bytes: int, keep_s: float) -> list[str]:
        """Let go of what is too old or too much; see `eviction.choose`. Digests."""
        busy, steady_s = set(self._uses.values()), time.monotonic()
        clock, now_s = self._clock, self._clock.now_s()
        chosen = eviction.choose(
            map(_stored(busy, steady_s), self._images.values()), now_s=now_s, keep_bytes=keep_bytes, keep_s=keep_s,
            since_s=clock.set_at_s, known_s=clock.known_s,
        )  # fmt: skip
        for digest, why in chosen:
            names = ", ".join(sorted(self._images[digest].record.names)[:3])
            log.info("image %s (%s) goes: %s", digest, names or "without a name", why.value)
            self.drop(digest)
        return [digest for digest, _ in chosen]

    def keep_only(self, keys: Iterable[str]) -> list[str]:
        """Forget uses by other attempts; their keys."""
        gone = sorted(self._uses.keys() - set(keys))
        for key in gone:
            self.unuse(key)
        return gone


def _stored(busy: set[str], steady_s: float) -> Callable[[Held], eviction.Stored]:
    def of(held: Held) -> eviction.Stored:
        record = held.record
        is_fresh = steady_s < held.fresh_until_s and not record.marked
        return eviction.Stored(
            record.digest,
            record.size_bytes,
            held.used_s,
            is_held=record.digest in busy or held.handles > 0 or is_fresh,
            is_pinned=record.pinned,
            is_marked=record.marked,
        )

    return of
