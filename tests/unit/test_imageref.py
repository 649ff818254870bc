"""Image references: every form, what is near to one, and what must be allowed for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinetta import imageref
from spinetta.errors import UserError
from spinetta.imageref import ImageRef, Kind, mirrored, need, parse, parse_name, refusal

D = "sha256:" + "0a" * 32

GOOD = {
    "docker://reg.example:5000/lab/tool:1.2": ImageRef(
        Kind.REGISTRY, host="reg.example:5000", repository="lab/tool", tag="1.2"
    ),
    "docker://localhost/tool": ImageRef(Kind.REGISTRY, host="localhost", repository="tool", tag="latest"),
    f"docker://127.0.0.1:5000/a@{D}": ImageRef(Kind.REGISTRY, host="127.0.0.1:5000", repository="a", digest=D),
    f"docker://r.example/a:tag@{D}": ImageRef(Kind.REGISTRY, host="r.example", repository="a", digest=D),
    "docker://[::1]:5000/a:b": ImageRef(Kind.REGISTRY, host="[::1]:5000", repository="a", tag="b"),
    "oci:/srv/layout": ImageRef(Kind.OCI, path="/srv/layout"),
    "oci:/srv/layout:1.0": ImageRef(Kind.OCI, path="/srv/layout", tag="1.0"),
    "oci-archive:/srv/x.tar": ImageRef(Kind.OCI_ARCHIVE, path="/srv/x.tar"),
    "docker-archive:/srv/x.tar": ImageRef(Kind.DOCKER_ARCHIVE, path="/srv/x.tar"),
    "docker-archive:/srv/x.tar:a/b:c": ImageRef(Kind.DOCKER_ARCHIVE, path="/srv/x.tar", tag="a/b:c"),
    "rootfs:/srv/root.tar.gz": ImageRef(Kind.ROOTFS, path="/srv/root.tar.gz"),
    "rootfs:/srv/root/": ImageRef(Kind.ROOTFS, path="/srv/root"),
    "/srv/anything": ImageRef(Kind.PATH, path="/srv/anything"),
    "ubuntu:22.04": ImageRef(Kind.NAME, repository="ubuntu", tag="22.04"),
    "lab/tool": ImageRef(Kind.NAME, repository="lab/tool", tag="latest"),
    f"lab/tool@{D}": ImageRef(Kind.NAME, repository="lab/tool", digest=D),
    D: ImageRef(Kind.DIGEST, digest=D),
}


@pytest.mark.parametrize("text", GOOD)
def test_each_form_is_understood_and_its_canonical_form_means_the_same(text: str) -> None:
    found = parse(text)
    assert found == GOOD[text]
    assert parse(str(found)) == found


BAD = {
    "": "docker://HOST",
    "sha256": "docker://HOST",
    "rootfs": "e.g. rootfs:/PATH",
    "dir": "docker://HOST",
    " ubuntu": "docker://HOST",
    "a\nb": "docker://HOST",
    "Ubuntu:22.04": "did you mean 'ubuntu'?",
    "reg.example/tool:1": "did you mean docker://reg.example/tool:1?",
    "localhost:5000/tool": "did you mean docker://localhost:5000/tool?",
    "docker://ubuntu:22.04": "for an image of the site's mirror",
    "docker://ubuntu": "for an image of the site's mirror",
    "docker:/a/b": "docker://HOST/REPOSITORY:TAG",
    "dcoker://r.example/a": "did you mean 'docker'?",
    "https://r.example/a": "docker://",
    "docker-daemon:/x": "docker save",
    "oci-archve:/x.tar": "did you mean 'oci-archive'?",
    "oci:/srv/x.tar": "did you mean oci-archive:/srv/x.tar?",
    "oci:srv/x": "oci:/PATH",
    "oci:///srv/x": "oci:/PATH",
    "oci:/srv/x:a:b": "no ':' in the path",
    "oci:/srv/../etc": "without '.', '..'",
    "rootfs:/": "below it",
    "rootfs:/a:b": "rename it",
    "./x": "begin it with /",
    "../x": "begin it with /",
    "image.tar": "begin it with /",
    "docker-archive:/x.tar:noname": "NAME:TAG",
    "ubuntu:": "letters, digits",
    "ubuntu:a b": "letters, digits",
    "ubuntu@sha256:12": "64 of",
    "sha256:12": "64 of",
    "SHA256:" + "0a" * 32: "64 of",
    "docker://r.example/": "docker://HOST",
    "docker://r_x.example/a": "HOST or HOST:PORT",
    "docker://r.example/-o": "docker://HOST",
    "--all": "docker://HOST",
    "/" + "x" * 5000: "",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_none_is_refused_with_what_is_near(text: str) -> None:
    with pytest.raises(UserError) as e:
        parse(text)
    assert BAD[text] in e.value.hint
    assert e.value.field == "image"


@given(st.text(max_size=80) | st.text(alphabet="dockerinsha256:/@.-_a0", max_size=60))
def test_any_text_is_a_reference_or_a_users_error(text: str) -> None:
    try:
        found = parse(text)
    except UserError:
        return
    assert parse(str(found)) == found
    assert not str(found).startswith("-")


def test_a_name_for_an_image_is_a_plain_one() -> None:
    assert str(parse_name("lab/tool")) == "lab/tool:latest"
    for bad in (D, f"a@{D}", "/srv/x", "docker://r.example/a"):
        with pytest.raises(UserError):
            parse_name(bad)


@pytest.mark.parametrize(
    ("ref", "allows", "allowed"),
    [
        ("ubuntu:22.04", [], True),
        (D, [], True),
        ("docker://r.example/a:1", [], True),
        ("docker://r.example/a:1", ["image:docker://r.example"], True),
        ("docker://r.example/a:1", ["image:docker://r.example/a"], True),
        ("docker://r.example/ab:1", ["image:docker://r.example/a"], False),
        ("docker://r.example.evil/a:1", ["image:docker://r.example"], False),
        ("docker://other.example/a:1", ["image:docker://r.example", "image:/srv"], False),
        ("docker://other.example/a:1", ["image:/srv"], True),
        ("oci:/srv/images/x", [], False),
        ("oci:/srv/images/x", ["image:/srv/images"], True),
        ("oci:/srv/images/x", ["image:/srv/images/"], True),
        ("oci:/srv/images/x", ["image:/"], True),
        ("/srv/imagesx", ["image:/srv/images"], False),
        ("rootfs:/srv/images", ["image:/srv/images"], True),
        ("rootfs:/etc", ["mount:/etc", "user:root"], False),
    ],
)
def test_what_must_be_allowed(ref: str, allows: list[str], allowed: bool) -> None:
    assert (refusal(need(parse(ref)), allows) is None) is allowed


def test_directories_that_tasks_may_name_images_below() -> None:
    assert imageref.local_prefixes(["image:/a/", "image:docker://r", "mount:/b", "image:/"]) == ("/a", "/")


def test_bare_names_are_looked_for_where_the_site_says() -> None:
    ref = parse("tool:1")
    assert [str(r) for r in mirrored(ref, ["m1.site:5000", "m2.site/lab/"])] == [
        "docker://m1.site:5000/tool:1",
        "docker://m2.site/lab/tool:1",
    ]
    assert [str(r) for r in mirrored(ref, ["m1.site"], [("tool", "m3.site/x/tool")])] == ["docker://m3.site/x/tool:1"]
    assert mirrored(ref, []) == ()
    assert [str(r) for r in mirrored(parse(f"tool@{D}"), ["m.site"])] == [f"docker://m.site/tool@{D}"]
