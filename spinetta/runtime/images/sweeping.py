"""What is let go of, and how it leaves the disk."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

from spinetta.runtime import removing
from spinetta.runtime.images.catalogue import Catalogue
from spinetta.runtime.images.shelf import Shelf

log = logging.getLogger("spinetta.images")

SWEEP_EVERY_S = 60.0
TIDY_LIMIT_S = 600.0  # for what was let go of to be off the disk
EVERYTHING_BYTES = 1  # to keep: nothing that may go


class Sweeper:
    """Lets go of images by age and size, and removes what was thrown away.

    Args:
        shelf: where it is.
        catalogue: what there is.
        keep_bytes, keep_s: see `eviction.choose`.
    """

    def __init__(self, shelf: Shelf, catalogue: Catalogue, keep_bytes: int, keep_s: float) -> None:
        self._shelf = shelf
        self._catalogue = catalogue
        self._keep_bytes = keep_bytes
        self._keep_s = keep_s
        self._wanted = asyncio.Event()
        self._tidy = asyncio.Event()  # nothing is left to be removed
        self.settled = False
        """Whether it is known which attempts of an earlier daemon still run: until then nothing goes by age or size."""

    def look(self) -> None:
        """Something may be too much now."""
        self._wanted.set()

    def discard(self, path: Path) -> None:
        """Out of sight at once, removed by and by."""
        self._catalogue.discard(path)
        self.look()

    async def make_room(self) -> bool:
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

    async def run(self) -> None:
        """Remove what was discarded; evict after each change, and now and then. Until cancelled."""
        stuck: set[Path] = set()
        while True:
            self._wanted.clear()
            try:
                if self.settled:
                    self._catalogue.evict(self._keep_bytes, self._keep_s)
                for path in [p for p in await asyncio.to_thread(self._shelf.discarded) if p not in stuck]:
                    if not await removing.remove(path) and await asyncio.to_thread(path.exists):
                        log.warning("%s cannot be removed whole; it is tried again when the node is restarted", path)
                        stuck.add(path)
                if not self._wanted.is_set():  # else more has been thrown away meanwhile
                    self._tidy.set()
            except OSError as e:  # no processes left, or the disk is gone: it may come back
                log.warning("images cannot be removed now: %s", e)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SWEEP_EVERY_S):
                    await self._wanted.wait()
