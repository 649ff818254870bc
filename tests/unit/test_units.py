import contextlib
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spinetta import units
from spinetta.errors import UserError


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("0", 0),
        ("4096", 4096),
        ("10B", 10),
        ("500M", 500_000_000),
        ("500MB", 500_000_000),
        ("1.5G", 1_500_000_000),
        ("2GiB", 2 << 30),
        ("2gib", 2 << 30),
        ("2Gi", 2 << 30),
        ("0.5KiB", 512),
        (".5KiB", 512),
        ("1 TiB", 1 << 40),
        (1024, 1024),
        ("1024PiB", 1 << 60),
    ],
)
def test_sizes(text: str, n: int) -> None:
    assert units.parse_bytes(text) == n


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a size is empty"),
        ("GiB", "not a size: 'GiB'"),
        ("2 Q", "unknown unit 'Q' in size '2 Q'"),
        ("-1", "a size must not be negative: '-1'"),
        ("1.5", "not a whole number of bytes: '1.5'"),
        ("0.3KiB", "not a whole number of bytes"),
        ("1025PiB", "too large: '1025PiB' is over 1 EiB"),
        ("1e9", "not a size: '1e9'"),
        ("٣GiB", "not a size"),
        ("9" * 65, "a size has 65 characters, at most 64 make sense"),
        (True, "a size must be text or a number, not bool"),
        (None, "a size must be text or a number, not NoneType"),
        (float("nan"), "not a size: 'nan'"),
    ],
)
def test_sizes_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        units.parse_bytes(text, "memory")
    assert message in caught.value.message
    assert caught.value.field == "memory"
    assert "2GiB" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "s"),
    [
        ("90", 90),
        ("90s", 90),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("2d", 172800),
        ("1w", 604800),
        ("1.5h", 5400),
        ("250ms", 0.25),
        ("1m250ms", 60.25),
        ("0", 0),
        (0.5, 0.5),
        (30, 30),
    ],
)
def test_durations(text: str, s: float) -> None:
    assert units.parse_duration(text) == s


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("soon", "not a duration: 'soon'"),
        ("1h30", "not a duration: '1h30'"),
        ("30m1h", "units out of order in duration '30m1h'"),
        ("1h1h", "units out of order"),
        ("-5s", "a duration must not be negative: '-5s'"),
        ("101w5000000d", "too long"),
        ("inf", "not a duration: 'inf'"),
        (float("inf"), "not a duration: 'inf'"),
        ("", "a duration is empty"),
    ],
)
def test_durations_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        units.parse_duration(text, "time")
    assert message in caught.value.message
    assert caught.value.field == "time"


@pytest.mark.parametrize(
    ("text", "millis"), [("2", 2000), ("0.5", 500), ("1500m", 1500), (2, 2000), (0.25, 250), ("0", 0), ("2.0", 2000)]
)
def test_cpus(text: str, millis: int) -> None:
    assert units.parse_cpus(text) == millis


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.0005", "finer than a thousandth of a core"),
        ("0.5m", "finer than a thousandth of a core"),
        ("two", "not a number of cores: 'two'"),
        ("-1", "must not be negative"),
        ("1000001", "over a million cores"),
    ],
)
def test_cpus_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        units.parse_cpus(text, "cpus")
    assert message in caught.value.message


@given(st.integers(0, units.BYTES_MAX))
@example(units.BYTES_MAX)
def test_bytes_round_trip(n: int) -> None:
    assert units.parse_bytes(units.format_bytes_exact(n)) == n


@given(st.integers(0, units.BYTES_MAX))
def test_bytes_for_reading_are_close_and_short(n: int) -> None:
    text = units.format_bytes(n)
    unit = text.lstrip("0123456789.")
    amount = float(text[: -len(unit)])
    factor = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "PiB": 1 << 50}[unit]
    assert math.isclose(amount * factor, n, rel_tol=0.006, abs_tol=0)
    assert len(text) <= 8


@given(st.floats(0, units.DURATION_MAX_S))
@example(5e-324)
def test_duration_round_trip(s: float) -> None:
    text = units.format_duration_exact(s)
    if len(text) <= units.TEXT_MAX:
        assert units.parse_duration(text) == s


@given(st.integers(0, units.CPU_MILLIS_MAX))
def test_cpus_round_trip(millis: int) -> None:
    assert units.parse_cpus(units.format_cpus(millis)) == millis


@given(st.text(max_size=80))
def test_no_text_does_more_than_a_user_error(text: str) -> None:
    for parse in (units.parse_bytes, units.parse_duration, units.parse_cpus):
        with contextlib.suppress(UserError):
            assert parse(text) >= 0


@pytest.mark.parametrize(
    ("s", "text"),
    [
        (0, "0s"),
        (0.04, "40ms"),
        (1.25, "1.25s"),
        (42.4, "42s"),
        (245, "4m05s"),
        (5400, "1h30m"),
        (183600, "2d03h"),
        (-5, "-5s"),
    ],
)
def test_durations_for_reading(s: float, text: str) -> None:
    assert units.format_duration(s) == text


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0B"), (1536, "1.5KiB"), (1 << 30, "1GiB"), (123 << 20, "123MiB"), (-1024, "-1KiB")]
)
def test_bytes_for_reading(n: int, text: str) -> None:
    assert units.format_bytes(n) == text


@pytest.mark.parametrize(
    ("millis", "text"), [(0, "0"), (500, "0.5"), (2000, "2"), (1250, "1.25"), (10000, "10"), (100000000, "100000")]
)
def test_cpus_for_reading(millis: int, text: str) -> None:
    assert units.format_cpus(millis) == text
