"""Units of countables: which device files belong to one of them, which to all, and which units an attempt gets.

A node's setting names the device files of a countable. ``0:/dev/nvidia0`` belongs to the unit with the label 0, and who
is given that unit has it alone; ``/dev/nvidiactl``, without a label, goes to all who have some of the countable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from spinetta.errors import UserError
from spinetta.names import quoted

Setting = Sequence[tuple[str, Sequence[str]]]
"""By countable, what the setting names: paths, some with a label before them."""
Labels = tuple[tuple[str, tuple[str, ...]], ...]
"""By countable, labels of units, in their order."""
Grant = Mapping[str, Mapping[str, Sequence[str]]]
"""What one attempt has: by countable and label, the files of each unit."""

GPU = "gpu"
VARIABLE = "SPINETTA_DEVICES_"
CUDA_DEVICES, CUDA_ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
LABEL_CHARS_MAX = 64  # the identifier that a driver gives a card has 40
_LABELLED = re.compile(r"([^/:=]*):(/.*)", re.DOTALL)
_LABEL = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LABEL_CHARS_MAX - 1}}}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Devices:
    """The device files of one countable.

    Attributes:
        common: for all who have some of it.
        units: label and files of each, by label; empty: all who have some have all.
    """

    common: tuple[str, ...] = ()
    units: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Of all units."""
        return tuple(label for label, _ in self.units)

    def files(self, labels: Iterable[str]) -> tuple[str, ...]:
        """Of these units, and those that all have."""
        wanted = set(labels)
        return (*(path for label, paths in self.units if label in wanted for path in paths), *self.common)


@dataclass(frozen=True, slots=True)
class Short:
    """There are not as many free units as were asked for.

    Attributes:
        missing: label and path of units that are given to nobody, because the path is not there.
        is_lasting: because of those there would be too few even if nobody had any.
    """

    name: str
    wanted: int
    free: tuple[str, ...]
    missing: tuple[tuple[str, str], ...] = ()
    is_lasting: bool = False

    def __str__(self) -> str:
        free = f"only {', '.join(self.free)} {'is' if len(self.free) == 1 else 'are'}" if self.free else "none is"
        why = [f"{path} of {label} is not there" for label, path in self.missing]
        if not self.is_lasting:
            why.append("others have not been given back yet")
        return f"{self.wanted} of {self.name} wanted, and {free} free: {'; '.join(why)}"


def split(item: str) -> tuple[str, str]:
    """Label and path of one of the setting's items; the label of a path alone is empty."""
    found = _LABELLED.fullmatch(item)
    return (found[1], found[2]) if found else ("", item)


def is_labelled(item: str) -> bool:
    """Whether it is a path with a label before it."""
    return _LABELLED.fullmatch(item) is not None


def check_label(item: str, field: str) -> None:
    """Raise UserError when an item has a label that is none."""
    label = split(item)[0]
    if is_labelled(item) and not _LABEL.fullmatch(label):
        raise UserError(
            f"not a label of a unit: {quoted(label)}",
            field=field,
            hint=f"1 to {LABEL_CHARS_MAX} letters, digits and '._-', e.g. 0:/dev/nvidia0",
        )


def of_items(items: Iterable[str]) -> Devices:
    """The device files of a countable, as the setting names them."""
    common: list[str] = []
    units: dict[str, list[str]] = {}
    for item in items:
        label, path = split(item)
        (units.setdefault(label, []) if label else common).append(path)
    return Devices(tuple(common), tuple((label, tuple(units[label])) for label in in_order(units)))


def read(setting: Setting) -> dict[str, Devices]:
    """Those of all countables."""
    return {name: of_items(items) for name, items in setting}


def labels_of(setting: Setting) -> Labels:
    """All units of the node, of those countables that have some."""
    return tuple(sorted((name, found.labels) for name, found in read(setting).items() if found.units))


def in_order(labels: Iterable[str]) -> list[str]:
    """Numbers by their value, then the rest."""
    return sorted(labels, key=lambda text: (not text.isdecimal(), int(text) if text.isdecimal() else 0, text))


def check(setting: Setting, field: str) -> None:
    """Raise UserError when a unit's file would be somebody else's as well."""
    owners: dict[str, str] = {}
    found = read(setting)
    for name, of in found.items():
        for label, paths in of.units:
            for path in paths:
                here = f"{name} {label}"
                if owners.setdefault(path, here) != here:
                    raise UserError(
                        f"{path} belongs to {owners[path]} and to {here}",
                        field=field,
                        hint="a file belongs to one unit; without a label all who have some of the countable get it",
                    )
    for name, of in found.items():
        for path in of.common:
            if path in owners:
                raise UserError(
                    f"{path} belongs to {owners[path]}, and to all who have some {name}",
                    field=field,
                    hint="name it once",
                )
    variables: dict[str, str] = {}
    for name, of in found.items():
        if of.units and variables.setdefault(variable(name), name) != name:
            raise UserError(
                f"tasks would be told of {variables[variable(name)]} and of {name} in the same variable",
                field=field,
                hint="call one of them something else",
            )


def offered(countables: Sequence[tuple[str, int]], setting: Setting) -> tuple[tuple[str, int], ...]:
    """What the node has to offer: of countables with units, as many as there are units."""
    units = {name: len(labels) for name, labels in labels_of(setting)}
    return tuple(sorted({**dict(countables), **units}.items()))


def check_counts(countables: Sequence[tuple[str, int]], setting: Setting, field: str) -> None:
    """Raise UserError when the node would offer another number of a countable than it has units."""
    said = dict(countables)
    for name, labels in labels_of(setting):
        if said.get(name, len(labels)) != len(labels):
            raise UserError(
                f"{said[name]} of {name} to offer, and devices names {len(labels)}: {', '.join(labels)}",
                field=field,
                hint=f"leave {name} out of countables: as many are offered as there are units",
            )


# --- who gets which --------------------------------------------------------------------------------------------------


def choose(
    wanted: Iterable[tuple[str, int]],
    devices: Mapping[str, Devices],
    taken: Iterable[Grant],
    is_there: Callable[[str], bool] = lambda _: True,
) -> dict[str, dict[str, tuple[str, ...]]] | Short:
    """Units for an attempt: of each countable that has units, the first ones that are free.

    A unit is free when nobody has one of its label, nor any of its files: those who run may have been given theirs
    under another setting. One with a file that is not there is given to nobody: a card that fell off the bus, which
    would else, always free, be given to each in turn.
    """
    held = list(taken)
    files = {path for grant in held for units in grant.values() for paths in units.values() for path in paths}
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for name, number in sorted(wanted):
        of = devices.get(name)
        if of is None or not of.units or not number:
            continue
        gone = {label for grant in held for label in grant.get(name, ())}
        missing = {label: path for label, paths in of.units for path in reversed(paths) if not is_there(path)}
        free = [
            (label, paths)
            for label, paths in of.units
            if label not in gone and label not in missing and files.isdisjoint(paths)
        ]
        if len(free) < number:
            is_lasting = bool(missing) and number > len(of.units) - len(missing)
            return Short(name, number, tuple(label for label, _ in free), tuple(missing.items()), is_lasting)
        found[name] = dict(free[:number])
    return found


def labels_in(grant: Grant) -> Labels:
    """What of units is in it."""
    return tuple((name, tuple(in_order(units))) for name, units in sorted(grant.items()))


def variable(name: str) -> str:
    """The variable that tells a task which units of a countable it has, e.g. ``SPINETTA_DEVICES_GPU``."""
    return VARIABLE + re.sub(r"[^A-Z0-9]", "_", name.upper())


def environment(labels: Labels, devices: Mapping[str, Devices], *, contained: bool) -> dict[str, str]:
    """What a task is told of its units. It wins over what the task says itself: only the node knows.

    CUDA numbers the cards that it can open. In a container those are the task's own, which are 0 and so on there; a
    plain process can open all, so it is told the labels, and that they count as the bus does. One that was given none
    is told that it has none. Labels that are no numbers are the cards' own identifiers, which mean the same everywhere.
    """
    given = dict(labels)
    told = {variable(name): ",".join(of) for name, of in given.items()}
    if GPU in devices and devices[GPU].units and (GPU in given or not contained):
        of = given.get(GPU, ())
        numbers = all(label.isdecimal() for label in of)
        told[CUDA_DEVICES] = ",".join(str(n) for n in range(len(of))) if contained and numbers else ",".join(of)
        if of and numbers and not contained:
            told[CUDA_ORDER] = "PCI_BUS_ID"
    return told
