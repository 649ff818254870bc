"""Units of countables: how the setting is read, who gets which, and what a task is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinetta import devices
from spinetta.cli.configure import _text
from spinetta.config import resolve
from spinetta.devices import Devices, Short, choose, environment, labels_in, offered, read
from spinetta.errors import UserError
from spinetta.node import detect
from spinetta.options import NODE_OPTIONS, parse_devices
from tests.unit.test_config import DEFAULTS

TWO = Devices(("/dev/nvidiactl",), (("0", ("/dev/nvidia0",)), ("1", ("/dev/nvidia1",))))
CARD = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"


@pytest.mark.parametrize(
    "given_",
    [
        {"gpu": "0:/dev/nvidia0,1:/dev/nvidia1,/dev/nvidiactl"},
        {"gpu": ["/dev/nvidiactl", "1:/dev/nvidia1", "0:/dev/nvidia0", "0:/dev/nvidia0"]},
        "gpu=0:/dev/nvidia0,1:/dev/nvidia1,/dev/nvidiactl",
        "gpu=/dev/nvidiactl,gpu=1:/dev/nvidia1, 0:/dev/nvidia0",
    ],
)
def test_units_and_what_all_have(given_: Any) -> None:
    setting = parse_devices(given_)
    assert read(setting) == {"gpu": TWO}
    assert devices.labels_of(setting) == (("gpu", ("0", "1")),)
    option = next(o for o in NODE_OPTIONS if o.key == "devices")
    assert parse_devices(_text(option, setting)) == setting


def test_a_unit_has_several_files_and_a_path_may_have_a_colon() -> None:
    setting = parse_devices({"gpu": [f"{CARD}:/dev/a:b", f"{CARD}:/dev/c", "/dev/0:/x", "10:/dev/d=e", "9:/dev/f"]})
    assert read(setting)["gpu"] == Devices(
        ("/dev/0:/x",), (("9", ("/dev/f",)), ("10", ("/dev/d=e",)), (CARD, ("/dev/a:b", "/dev/c")))
    )
    assert read(setting)["gpu"].files(["10", CARD]) == ("/dev/d=e", "/dev/a:b", "/dev/c", "/dev/0:/x")
    assert parse_devices("gpu=10:/dev/d=e,11:/dev/g=h") == (("gpu", ("10:/dev/d=e", "11:/dev/g=h")),)


def test_settings_from_before_mean_what_they_did() -> None:
    setting = parse_devices("gpu=/dev/nvidia0,/dev/nvidiactl")
    assert read(setting) == {"gpu": Devices(("/dev/nvidia0", "/dev/nvidiactl"), ())}
    assert (devices.labels_of(setting), offered((("gpu", 2),), setting)) == ((), (("gpu", 2),))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gpu=:/dev/a", "not a label of a unit: ''"),
        ("gpu=a b:/dev/a", "not a label of a unit: 'a b'"),
        ("gpu=-1:/dev/a", "not a label of a unit"),
        (f"gpu={'x' * 65}:/dev/a", "not a label of a unit"),
        ("gpu=0:/etc/passwd", "not a device: '/etc/passwd'"),
        ("gpu=0:/dev/../etc/passwd", "not a plain absolute path"),
        ("gpu=0:dev/a", "not a plain absolute path: '0:dev/a'"),
        ("0:/dev/a", "not NAME=PATH: '0:/dev/a'"),
        ("gpu=0:/dev/a,1:/dev/a", "/dev/a belongs to gpu 0 and to gpu 1"),
        ("gpu=0:/dev/a,fpga=0:/dev/a", "/dev/a belongs to fpga 0 and to gpu 0"),
        ("gpu=0:/dev/a,/dev/a", "/dev/a belongs to gpu 0, and to all who have some gpu"),
        ("gpu=0:/dev/a,fpga=/dev/a", "/dev/a belongs to gpu 0, and to all who have some fpga"),
        ("a.b=0:/dev/a,a-b=0:/dev/b", "told of a-b and of a.b in the same variable"),
    ],
)
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve({"devices": text}, {}, [], DEFAULTS)
    assert words in str(caught.value)
    assert caught.value.field == "node.devices"


def test_as_many_are_offered_as_there_are_units(tmp_path: Path) -> None:
    flags = {"devices": "gpu=0:/dev/a,1:/dev/b", "data_dir": str(tmp_path)}
    for countables, found in (("", {"gpu": 2}), ("gpu=2", {"gpu": 2}), ("fpga=3", {"gpu": 2, "fpga": 3})):
        settings = resolve({**flags, "countables": countables}, {}, [], DEFAULTS).settings
        assert dict(detect.capacity(settings)[0].countables) == found
    with pytest.raises(UserError, match="3 of gpu to offer, and devices names 2: 0, 1") as caught:
        resolve({**flags, "countables": "gpu=3"}, {}, [], DEFAULTS)
    assert caught.value.field == "node.countables"


# --- who gets which --------------------------------------------------------------------------------------------------


def test_the_first_that_are_free() -> None:
    of = {"gpu": TWO, "fpga": Devices(("/dev/fpga",))}
    first = choose((("fpga", 1), ("gpu", 1), ("other", 5)), of, ())
    assert first == {"gpu": {"0": ("/dev/nvidia0",)}}
    assert not isinstance(first, Short)
    second = choose((("gpu", 1),), of, (first,))
    assert second == {"gpu": {"1": ("/dev/nvidia1",)}}
    assert choose((("gpu", 1),), of, (second,)) == first
    short = choose((("gpu", 2),), of, (second,))
    assert short == Short("gpu", 2, ("0",))
    assert str(short) == "2 of gpu wanted, and only 0 is free: others have not been given back yet"
    assert str(Short("gpu", 1, ())) == "1 of gpu wanted, and none is free: others have not been given back yet"
    assert choose((("gpu", 0),), of, (first,)) == choose((), of, ()) == {}


def test_a_file_that_somebody_has_is_not_given_under_another_label() -> None:
    before = {"gpu": {"a": ("/dev/nvidia0",)}}  # as the setting was when it was given
    assert choose((("gpu", 1),), {"gpu": TWO}, (before,)) == {"gpu": {"1": ("/dev/nvidia1",)}}
    assert choose((("gpu", 2),), {"gpu": TWO}, (before,)) == Short("gpu", 2, ("1",))


def test_one_whose_file_is_gone_is_given_to_nobody() -> None:
    of, gone = {"gpu": TWO}, {"/dev/nvidia0"}
    first = choose((("gpu", 1),), of, (), lambda path: path not in gone)
    assert first == {"gpu": {"1": ("/dev/nvidia1",)}}
    lasting = choose((("gpu", 2),), of, (), lambda path: path not in gone)
    assert lasting == Short("gpu", 2, ("1",), (("0", "/dev/nvidia0"),), is_lasting=True)
    assert str(lasting) == "2 of gpu wanted, and only 1 is free: /dev/nvidia0 of 0 is not there"
    assert not isinstance(first, Short)
    taken = choose((("gpu", 1),), of, (first,), lambda path: path not in gone)
    assert isinstance(taken, Short)
    assert not taken.is_lasting
    assert str(taken) == (
        "1 of gpu wanted, and none is free: /dev/nvidia0 of 0 is not there; others have not been given back yet"
    )


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 3), st.booleans()), max_size=30))
def test_no_unit_is_ever_given_twice(steps: list[tuple[str, int, bool]]) -> None:
    of = {"gpu": devices.of_items(f"{n}:/dev/g{n}" for n in range(5))}
    held: dict[str, Any] = {}
    for key, number, gives_back in steps:
        if gives_back or key in held:
            held.pop(key, None)
            continue
        found = choose((("gpu", number),), of, held.values())
        used = [label for grant in held.values() for label in grant["gpu"]]
        assert isinstance(found, Short) == (5 - len(used) < number)
        if not isinstance(found, Short):
            assert len(found["gpu"]) == number
            assert not set(used) & set(found["gpu"])
            held[key] = found


# --- what a task is told ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "contained", "told"),
    [
        (("1",), True, {"SPINETTA_DEVICES_GPU": "1", "CUDA_VISIBLE_DEVICES": "0"}),  # the only one that it can open
        (("1", "3"), True, {"SPINETTA_DEVICES_GPU": "1,3", "CUDA_VISIBLE_DEVICES": "0,1"}),
        (("1",), False, {"SPINETTA_DEVICES_GPU": "1", "CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}),
        ((CARD,), True, {"SPINETTA_DEVICES_GPU": CARD, "CUDA_VISIBLE_DEVICES": CARD}),
        ((CARD,), False, {"SPINETTA_DEVICES_GPU": CARD, "CUDA_VISIBLE_DEVICES": CARD}),
        ((), True, {}),  # there is none in its /dev
        ((), False, {"CUDA_VISIBLE_DEVICES": ""}),
    ],
)
def test_what_a_task_is_told(labels: tuple[str, ...], contained: bool, told: dict[str, str]) -> None:
    assert environment((("gpu", labels),) if labels else (), {"gpu": TWO}, contained=contained) == told


def test_other_countables_and_nodes_without_units() -> None:
    of = {"fpga-x": devices.of_items(["b:/dev/b"])}
    assert environment((("fpga-x", ("b",)),), of, contained=False) == {"SPINETTA_DEVICES_FPGA_X": "b"}
    assert environment((), {"gpu": Devices(("/dev/nvidia0",))}, contained=False) == {}
    assert labels_in({"gpu": {"10": (), "9": ()}}) == (("gpu", ("9", "10")),)
