"""Records of trust survive being stored, field by field."""

from __future__ import annotations

import enum
import typing
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinetta import access, trustcodec
from spinetta.errors import CorruptRecord

KINDS = sorted(trustcodec._MESSAGES, key=lambda k: k.__name__)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_a_record_and_its_message_have_the_same_fields(kind: type) -> None:
    message = trustcodec._MESSAGES[kind]
    assert {f.name for f in fields(kind)} == {f.name for f in message.DESCRIPTOR.fields}


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
@given(data=st.data())
def test_what_is_stored_is_read_back(kind: type, data: st.DataObject) -> None:
    value = data.draw(_of(kind))
    assert trustcodec.decode(kind, trustcodec.encode(value)) == value


def _of(kind: type) -> st.SearchStrategy[object]:
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{name: _field(hint) for name, hint in hints.items()})


def _field(hint: Any) -> st.SearchStrategy[Any]:
    if typing.get_origin(hint) is tuple:
        return st.lists(_field(typing.get_args(hint)[0]), max_size=2).map(tuple)
    if hint in trustcodec._MESSAGES:
        return _of(hint)
    if issubclass(hint, enum.IntEnum):
        return st.sampled_from(list(hint))
    plain: dict[type, st.SearchStrategy[Any]] = {
        bool: st.booleans(), int: st.integers(0, 2**31 - 1), float: st.floats(0, 1e9), str: st.text(max_size=9),
        bytes: st.binary(max_size=9),
    }  # fmt: skip
    return plain[hint]


def test_a_role_of_a_newer_version_is_corrupt_and_not_absent() -> None:
    message = trustcodec.to_pb(access.NodeAcl("n", access.NodeRole.VOTER))
    message.role = 77
    with pytest.raises(CorruptRecord):
        trustcodec.decode(access.NodeAcl, message.SerializeToString())


def test_garbage_is_corrupt() -> None:
    with pytest.raises(CorruptRecord):
        trustcodec.decode(access.UserAcl, b"\xff\xff\xff")
