"""Which attempt has which units, kept on disk: it outlives the daemon, as attempts do.

::

    units/KEY    JSON: by countable and label, the files of the units that an attempt has

All that is in it is written by this process alone. Calls block; they are short.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from spinetta import devices
from spinetta.errors import UserError
from spinetta.runtime.shim.wire import KEY

log = logging.getLogger("spinetta.node")

NEW = ".new"
Units = dict[str, dict[str, tuple[str, ...]]]


class UnitBook:
    """What the attempts of this node have.

    Args:
        directory: is made when there is first something to write down.
        of: the node's devices, by countable.
    """

    def __init__(self, directory: Path, of: Mapping[str, devices.Devices]) -> None:
        self._directory = directory
        self._of = dict(of)
        self._held: dict[str, Units] = {}

    def open(self) -> None:
        """Read what an earlier daemon has written.

        Raises:
            UserError: the directory cannot be read.
        """
        try:
            found = sorted(self._directory.iterdir()) if self._directory.is_dir() else []
            for path in found:
                if path.name.endswith(NEW):
                    path.unlink()
                elif KEY.match(path.name):
                    self._held[path.name] = self._read(path)
        except OSError as e:
            raise UserError(
                f"which attempts have which devices cannot be read in {self._directory}: {e.strerror}",
                hint="see to the disk, or set data_dir",
            ) from e

    @property
    def keys(self) -> frozenset[str]:
        """Of attempts that have some."""
        return frozenset(self._held)

    def labels(self, key: str) -> devices.Labels:
        """Those that an attempt has."""
        return devices.labels_in(self._held.get(key, {}))

    def acquire(self, key: str, wanted: Iterable[tuple[str, int]]) -> devices.Labels | devices.Short:
        """Units for an attempt, which are its own until `release`; the same when it asks again.

        OSError: it cannot be written down, and nothing is given.
        """
        if key in self._held:
            return self.labels(key)
        chosen = devices.choose(wanted, self._of, self._held.values(), os.path.exists)
        if isinstance(chosen, devices.Short):
            return chosen
        if chosen:
            # A power cut ends attempts, too: it need not be on the disk for that, but never half.
            self._directory.mkdir(mode=0o700, exist_ok=True)
            new = self._directory / f"{key}{NEW}"
            new.write_text(json.dumps(chosen))
            new.rename(self._directory / key)
            self._held[key] = chosen
        return devices.labels_in(chosen)

    def release(self, key: str) -> None:
        """The attempt has ended, and all of it is gone. May be repeated."""
        if key not in self._held:
            return
        try:
            (self._directory / key).unlink(missing_ok=True)
        except OSError as e:  # a mark too many: the next daemon knows what really runs
            log.warning("%s: %s", self._directory / key, e.strerror)
        del self._held[key]

    def _read(self, path: Path) -> Units:
        try:
            found = json.loads(path.read_bytes())
            return {
                str(name): {str(label): tuple(map(str, paths)) for label, paths in units.items()}
                for name, units in found.items()
            }
        except (ValueError, AttributeError, TypeError):
            # What it has is not known: until it is known to be gone nobody else gets anything.
            log.warning("%s is damaged: until that attempt has ended no units are given to others", path)
            return {name: dict(of.units) for name, of in self._of.items() if of.units}
