"""Sizes, durations and cores as people write them, and back.

Parsing is exact (decimal arithmetic) and strict: what is not understood is refused with the field's name and an
example, never guessed. `format_*` rounds for reading; `format_*_exact` parses back to the same value.
"""

from __future__ import annotations

import re
from decimal import Decimal

from spinetta.errors import UserError

BYTES_MAX = 1 << 60  # 1 EiB: below it every amount fits in a signed 64-bit number, also when a few are added
DURATION_MAX_S = 100 * 366 * 86400.0  # a century; callers have tighter limits of their own
CPU_MILLIS_MAX = 1_000_000_000  # a million cores
TEXT_MAX = 64  # characters: no honest amount is longer, and exponents of huge numbers cost time

_BINARY = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40, "pi": 1 << 50}
_DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_SIZE_UNITS = {
    "": 1,
    "b": 1,
    **_BINARY,
    **{unit + "b": n for unit, n in _BINARY.items()},
    **_DECIMAL,
    **{unit + "b": n for unit, n in _DECIMAL.items()},
}
_SIZE_HINT = "write a number with a unit: 500M or 1.5GB (powers of 1000), 2GiB (powers of 1024), or plain bytes"

_DURATION_UNITS = {
    "w": Decimal(604800),
    "d": Decimal(86400),
    "h": Decimal(3600),
    "m": Decimal(60),
    "s": Decimal(1),
    "ms": Decimal("0.001"),
}
_DURATION_HINT = "write 90s, 1h30m, 2d, or plain seconds"

_CPU_HINT = "write cores: 2, 0.5, or thousandths: 1500m"

_NUMBER = r"\d+(?:\.\d+)?|\.\d+"
_SIZE = re.compile(rf"({_NUMBER})\s*([A-Za-z]*)", re.ASCII)
_DURATION_PART = re.compile(rf"({_NUMBER})(ms|[wdhms])", re.ASCII)
_PLAIN = re.compile(_NUMBER, re.ASCII)
_CPU = re.compile(rf"({_NUMBER})(m?)", re.ASCII)


def _text(value: object, field: str, what: str, hint: str) -> str:
    """The value as stripped text. Numbers come from YAML and JSON files; booleans are numbers there by accident."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"{what} must be text or a number, not {type(value).__name__}", field=field, hint=hint)
    # repr of a float may be 1e-05 or nan: Decimal would take it, the patterns refuse it, which is what we want.
    text = value.strip() if isinstance(value, str) else repr(value)
    if not text:
        raise UserError(f"{what} is empty", field=field, hint=hint)
    if len(text) > TEXT_MAX:
        raise UserError(f"{what} has {len(text)} characters, at most {TEXT_MAX} make sense", field=field, hint=hint)
    if text.startswith("-") and len(text) > 1:
        raise UserError(f"{what} must not be negative: {text!r}", field=field, hint=hint)
    return text


def parse_bytes(value: str | float, field: str = "") -> int:
    """An amount of bytes: ``2GiB``, ``500M``, ``1.5G``, ``4096``.

    ``K M G T P`` (with or without ``B``) are powers of 1000, ``Ki Mi Gi Ti Pi`` powers of 1024; case does not matter.

    Raises:
        UserError: not understood, negative, not a whole number of bytes, or more than `BYTES_MAX`.
    """
    text = _text(value, field, "a size", _SIZE_HINT)
    found = _SIZE.fullmatch(text)
    if found is None:
        raise UserError(f"not a size: {text!r}", field=field, hint=_SIZE_HINT)
    factor = _SIZE_UNITS.get(found[2].lower())
    if factor is None:
        raise UserError(f"unknown unit {found[2]!r} in size {text!r}", field=field, hint=_SIZE_HINT)
    amount = Decimal(found[1]) * factor
    if amount != amount.to_integral_value():
        raise UserError(f"not a whole number of bytes: {text!r}", field=field, hint=_SIZE_HINT)
    if amount > BYTES_MAX:
        raise UserError(f"too large: {text!r} is over 1 EiB", field=field, hint=_SIZE_HINT)
    return int(amount)


def parse_duration(value: str | float, field: str = "") -> float:
    """A duration in seconds: ``1h30m``, ``90s``, ``2d``, ``1.5h``, ``250ms``, or plain seconds.

    Units ``w d h m s ms``, from the largest to the smallest, each at most once.

    Raises:
        UserError: not understood, negative, or more than `DURATION_MAX_S`.
    """
    text = _text(value, field, "a duration", _DURATION_HINT)
    if _PLAIN.fullmatch(text):
        total = Decimal(text)
    else:
        total, at, last = Decimal(0), 0, Decimal("Infinity")
        lowered = text.lower().replace(" ", "")
        while at < len(lowered):
            part = _DURATION_PART.match(lowered, at)
            if part is None:
                raise UserError(f"not a duration: {text!r}", field=field, hint=_DURATION_HINT)
            unit_s = _DURATION_UNITS[part[2]]
            if unit_s >= last:
                raise UserError(
                    f"units out of order in duration {text!r}", field=field, hint="largest first, each once: 1h30m"
                )
            total, at, last = total + Decimal(part[1]) * unit_s, part.end(), unit_s
    if total > Decimal(DURATION_MAX_S):
        raise UserError(f"too long: {text!r} is over a century", field=field, hint=_DURATION_HINT)
    return float(total)


def parse_cpus(value: str | float, field: str = "") -> int:
    """Cores in thousandths: ``0.5`` is 500, ``2`` is 2000, ``1500m`` is 1500.

    Raises:
        UserError: not understood, negative, finer than a thousandth, or more than `CPU_MILLIS_MAX`.
    """
    text = _text(value, field, "a number of cores", _CPU_HINT)
    found = _CPU.fullmatch(text)
    if found is None:
        raise UserError(f"not a number of cores: {text!r}", field=field, hint=_CPU_HINT)
    millis = Decimal(found[1]) * (1 if found[2] else 1000)
    if millis != millis.to_integral_value():
        raise UserError(f"finer than a thousandth of a core: {text!r}", field=field, hint=_CPU_HINT)
    if millis > CPU_MILLIS_MAX:
        raise UserError(f"too large: {text!r} is over a million cores", field=field, hint=_CPU_HINT)
    return int(millis)


def format_bytes(n: int) -> str:
    """For reading: at most four digits, powers of 1024, e.g. ``1.5GiB``, ``512MiB``, ``0B``."""
    sign, size = ("-" if n < 0 else ""), abs(n)
    for unit, factor in (("PiB", 1 << 50), ("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{sign}{_short(Decimal(size) / factor)}{unit}"
    return f"{sign}{size}B"


def format_bytes_exact(n: int) -> str:
    """The shortest form that `parse_bytes` reads back as the same number."""
    for unit, factor in (("PiB", 1 << 50), ("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n and n % factor == 0:
            return f"{n // factor}{unit}"
    return str(n)


def format_duration(seconds: float) -> str:
    """For reading: the two largest units, e.g. ``2d3h``, ``1h30m``, ``4m05s``, ``1.25s``, ``40ms``."""
    sign, s = ("-" if seconds < 0 else ""), abs(seconds)
    if s < 1:
        return f"{sign}{round(s * 1000)}ms" if s else "0s"
    if s < 10:
        return f"{sign}{_short(Decimal(str(round(s, 2))))}s"
    whole = round(s)
    if whole < 60:
        return f"{sign}{whole}s"
    if whole < 3600:
        return f"{sign}{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{sign}{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{sign}{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_duration_exact(seconds: float) -> str:
    """A form that `parse_duration` reads back as the same number of seconds, e.g. ``1h30m``, ``1.5s``.

    Raises:
        ValueError: negative or not finite, which no duration is.
    """
    exact = Decimal(repr(seconds))
    if not exact.is_finite() or exact < 0:
        raise ValueError(f"not a duration: {seconds!r}")
    if exact != exact.to_integral_value():
        return f"{exact:f}s"
    rest, text = int(exact), ""
    for unit, unit_s in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        amount, rest = divmod(rest, unit_s)
        if amount:
            text += f"{amount}{unit}"
    return text or "0s"


def format_cpus(millis: int) -> str:
    """Cores, exactly: ``2``, ``0.5``, ``1.25``. `parse_cpus` reads it back."""
    return f"{Decimal(millis) / 1000:f}"


def _short(number: Decimal) -> str:
    """Three or four digits, no trailing zeros."""
    places = 0 if number >= 100 else 1 if number >= 10 else 2
    text = f"{number:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
