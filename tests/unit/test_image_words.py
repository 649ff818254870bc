"""What is made of the words of skopeo and umoci."""

from __future__ import annotations

import pytest

from spinetta.runtime.images.tools import understood

OPEN = "initializing source oci-archive:/x.tar:: open /staging/oci1/index.json: no such file or directory"
LOAD = "initializing source docker-archive:/x.tar: loading tar component manifest.json: file does not exist"


@pytest.mark.parametrize(
    ("said", "reason", "words"),
    [
        (OPEN, "bad-image", "no archive of this kind"),
        (LOAD, "bad-image", "no archive of this kind"),
        ("reading manifest 9 in h/x: manifest unknown", "not-found", "there is no such image"),
        ("write /x: no space left on device", "no-space", "no room on the disk"),
        ("pinging container registry h: dial tcp: lookup h: no such host", "registry-unreachable", "cannot be reached"),
    ],
)
def test_what_they_mean(said: str, reason: str, words: str) -> None:
    found = understood("skopeo", f'time="2026" level=fatal msg="{said}"', 1)
    assert (found.reason, words in found.message) == (reason, True), found.message
