"""What a task needs, what a node allows, and whether the two meet: by value, tricky paths among them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinetta import codec, container, messages, validate
from spinetta.container import (
    CAPABILITIES,
    MOUNTS_MAX,
    PATH_CHARS_MAX,
    TMP_BYTES_MAX,
    ContainerSpec,
    Mount,
    check_allowance,
    check_allowances,
    check_container,
    check_path,
    needs,
    refusals,
)
from spinetta.errors import UserError
from spinetta.match import Obstacle, why_never
from spinetta.model import QueueHint, Resources
from tests.builders import BIG, contained, mounted, spec

IMAGE = ContainerSpec("tools")

NEEDS = [
    (None, ()),
    (IMAGE, ("container",)),
    (ContainerSpec("sha256:" + "0" * 64), ("container",)),
    (replace(IMAGE, network="host"), ("container", "network:host")),
    (replace(IMAGE, network="bridge", writable=True, tmp_bytes=1), ("container", "network:bridge")),
    (replace(IMAGE, capabilities=("CHOWN", "KILL")), ("capability:CHOWN", "capability:KILL", "container")),
    (replace(IMAGE, user="root"), ("container", "user:root")),
    (replace(IMAGE, user="0"), ("container", "user:root")),
    (replace(IMAGE, user="0:0"), ("container", "user:root")),
    (replace(IMAGE, user="0:7"), ("container", "user:root")),
    (replace(IMAGE, user="1000:0"), ("container",)),  # a group is not the user that may do what root may
    (mounted("/data"), ("container", "mount:/data")),
    (mounted("/data:/in:rw"), ("container", "mount-rw:/data")),
    (mounted("/b", "/a"), ("container", "mount:/a", "mount:/b")),
    (ContainerSpec("/srv/i/a.tar"), ("container", "image:/srv/i/a.tar")),
    (ContainerSpec("oci:/srv/i/a:1.2"), ("container", "image:/srv/i/a")),
    (ContainerSpec("oci-archive:/srv/a.tar"), ("container", "image:/srv/a.tar")),
    (ContainerSpec("docker-archive:/srv/a.tar:x:1"), ("container", "image:/srv/a.tar")),
    (ContainerSpec("rootfs:/srv/root"), ("container", "image:/srv/root")),
]


@pytest.mark.parametrize(("asked", "words"), NEEDS)
def test_what_a_task_needs(asked: ContainerSpec | None, words: tuple[str, ...]) -> None:
    assert needs(asked) == words


def test_an_image_that_is_no_reference_is_allowed_nowhere() -> None:
    """Written past every client: not a plain process by mistake, and not a container either."""
    for image in ("oci:/srv/../etc", "/srv/../etc", "-x", "dir:/x"):
        asked = needs(ContainerSpec(image))
        assert refusals(asked, ("container", "image:/srv", "image:/etc")) != []


ALLOWED = [
    # a task that asks for nothing is a process
    ((), (), []),
    ((), ("process",), []),
    ((), ("container", "process"), []),
    ((), ("container",), ["process"]),
    # a node of a version before containers says nothing, and runs processes
    (("container",), (), ["container"]),
    (("container",), ("process",), ["container"]),
    (("container",), ("container",), []),
    (("container", "network:host"), ("container",), ["network:host"]),
    (("container", "network:host"), ("container", "network:host"), []),
    (("container", "network:host"), ("container", "network:bridge"), ["network:host"]),
    (("container", "network:bridge"), ("container", "network:host"), ["network:bridge"]),
    (("capability:KILL", "container"), ("capability:CHOWN", "container"), ["capability:KILL"]),
    (("container", "user:root"), ("container", "user:root"), []),
    (("container", "network:host", "user:root"), ("container",), ["network:host", "user:root"]),
    # words that nobody knows are not granted: they are of a newer version
    (("container", "gravity:none"), ("container", "process"), ["gravity:none"]),
    (("gravity:none",), ("process",), ["gravity:none"]),
]
PATHS = [
    # need, allowed, granted
    ("mount:/data", "mount:/data", True),
    ("mount:/data/x/y", "mount:/data", True),
    ("mount:/database", "mount:/data", False),  # begins alike, and is another
    ("mount:/data-2/x", "mount:/data", False),
    ("mount:/data.d", "mount:/data", False),
    ("mount:/dat", "mount:/data", False),
    ("mount:/", "mount:/data", False),
    ("mount:", "mount:/data", False),
    ("mount:data/x", "mount:/data", False),
    ("mount:/data/../etc", "mount:/data", False),
    ("mount:/data/..", "mount:/data", False),
    ("mount:/data/x/../../etc/shadow", "mount:/data", False),
    ("mount:/data/./x", "mount:/data", False),  # lawful perhaps, and never written by our clients
    ("mount:/data//x", "mount:/data", False),
    ("mount://data/x", "mount:/data", False),
    ("mount:/data/", "mount:/data", False),
    ("mount:/DATA/x", "mount:/data", False),
    ("mount:/data/..x", "mount:/data", True),  # a name like any other
    ("mount:/data/x:y", "mount:/data", True),
    ("mount:/data\n/x", "mount:/data", False),
    # what may be written may be read; not the other way round
    ("mount:/data/x", "mount-rw:/data", True),
    ("mount-rw:/data/x", "mount-rw:/data", True),
    ("mount-rw:/data/x", "mount:/data", False),
    ("mount-rw:/data/../etc", "mount-rw:/data", False),
    # kinds do not stand for one another
    ("image:/data/x", "mount:/data", False),
    ("mount:/data/x", "image:/data", False),
    ("image:/srv/i/a.tar", "image:/srv/i", True),
    ("image:/srv/i", "image:/srv/i", True),
    ("image:/srv/images", "image:/srv/i", False),
]


@pytest.mark.parametrize(("wanted", "allows", "refused"), ALLOWED)
def test_what_a_node_refuses(wanted: tuple[str, ...], allows: tuple[str, ...], refused: list[str]) -> None:
    assert refusals(wanted, allows) == refused


@pytest.mark.parametrize(("need", "allowed", "granted"), PATHS)
def test_paths(need: str, allowed: str, granted: bool) -> None:
    assert refusals(("container", need), ("container", allowed)) == ([] if granted else [need])


names_of_folders = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=5)
paths = st.lists(names_of_folders | st.sampled_from([".", "..", "a"]), min_size=1, max_size=6).map(
    lambda parts: "/" + "/".join(parts)
)


@given(paths, paths)
def test_what_is_granted_lies_below_what_is_allowed(wanted: str, top: str) -> None:
    """As the kernel would walk it, without links."""
    if refusals(("container", f"mount:{wanted}"), ("container", f"mount:{top}")) == [] and wanted != top:
        walked: list[str] = []
        for part in wanted.split("/")[1:]:
            if part == "..":
                walked = walked[:-1]
            elif part not in ("", "."):
                walked.append(part)
        assert walked[: top.count("/")] == top.split("/")[1:]


@given(st.lists(st.sampled_from([*(n for n, _, _ in PATHS), "container", "network:host"])), st.data())
def test_more_allowances_never_refuse_more(wanted: list[str], data: st.DataObject) -> None:
    words = st.lists(st.sampled_from([*(a for _, a, _ in PATHS), "container", "process", "network:host"]), min_size=1)
    some, others = data.draw(words), data.draw(words)
    assert set(refusals(wanted, [*some, *others])) <= set(refusals(wanted, some))


# --- well formed? ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        IMAGE,
        replace(IMAGE, user="root"),
        replace(IMAGE, user="65534:65534"),
        replace(IMAGE, capabilities=tuple(sorted(CAPABILITIES))),
        replace(IMAGE, tmp_bytes=TMP_BYTES_MAX),
        mounted(*(f"/d{i}" for i in range(MOUNTS_MAX))),
        mounted("/data:/devices", "/data/x:/process", "/run/x:/runner"),  # begin like what is reserved
        ContainerSpec("docker://r.example/a/b:1"),
    ],
)
def test_good(asked: ContainerSpec) -> None:
    check_container(asked, "container")
    validate.check_spec(spec(1, container=asked), "")


@pytest.mark.parametrize(
    ("asked", "field", "words"),
    [
        (replace(IMAGE, image=""), "image", "a container needs an image"),
        (replace(IMAGE, image="x" * 1025), "image", "1025 characters"),
        (replace(IMAGE, image="a b"), "image", "not"),
        (replace(IMAGE, image="--root"), "image", "not"),
        (replace(IMAGE, image="/srv/../etc"), "image", "not a plain path"),
        (replace(IMAGE, network="vpn"), "network", "no network is called 'vpn'"),
        (replace(IMAGE, network=""), "network", "no network is called ''"),
        (replace(IMAGE, user="me"), "user", "not a user of a container: 'me'"),
        (replace(IMAGE, user="1:2:3"), "user", "not a user"),
        (replace(IMAGE, user="-1"), "user", "not a user"),
        (replace(IMAGE, user="65535"), "user", "not a user"),
        (replace(IMAGE, user="1:65535"), "user", "not a user"),
        (replace(IMAGE, user="٣"), "user", "not a user"),  # a digit, elsewhere
        (replace(IMAGE, user="1\n"), "user", "not a user"),
        (replace(IMAGE, capabilities=("CAP_KILL",)), "capabilities", "no capability is called 'CAP_KILL'"),
        (replace(IMAGE, capabilities=("ALL",)), "capabilities", "no capability is called 'ALL'"),
        (replace(IMAGE, capabilities=("KILL",) * 42), "capabilities", "more capabilities than there are"),
        (replace(IMAGE, tmp_bytes=-1), "tmp_bytes", "-1 is out of range"),
        (replace(IMAGE, tmp_bytes=TMP_BYTES_MAX + 1), "tmp_bytes", "is out of range"),
        (mounted(*(f"/d{i}" for i in range(MOUNTS_MAX + 1))), "mounts", "65 mounts"),
        (mounted(*(f"/{'x' * 2000}{i}:/y{i}" for i in range(5))), "mounts", "the paths of all mounts have 10025 bytes"),
        (mounted("/a:/x", "/b:/x"), "mounts[1].target", "two mounts at '/x'"),
        (mounted("/a:/proc"), "mounts", "would hide /proc"),
        (mounted("/a:/sys/fs/cgroup"), "mounts", "would hide /sys"),
        (mounted("/a:/dev/shm"), "mounts", "would hide /dev"),
        (mounted("/a:/.spinetta/init"), "mounts", "would hide /.spinetta"),
        (mounted("/a:/run/secrets/spinetta"), "mounts", "would hide /run/secrets/spinetta"),
        (mounted("/a:/run"), "mounts", "would hide /run/secrets/spinetta"),
        (mounted("/a:/x", "/b:/x/y"), "mounts", "one would be within the other"),
        (mounted("/a:/"), "mounts[0].target", "not a plain absolute path: '/'"),
        (mounted("/"), "mounts[0].source", "not a plain absolute path: '/'"),
        (mounted("data:/x"), "mounts[0].source", "not a plain absolute path: 'data'"),
        (mounted("/data/..:/x"), "mounts[0].source", "not a plain absolute path"),
        (mounted("/data:/x/../proc"), "mounts[0].target", "not a plain absolute path"),
    ],
)
def test_bad(asked: ContainerSpec, field: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        validate.check_spec(spec(1, container=asked), "tasks[3]")
    assert words in caught.value.message
    assert caught.value.field == f"tasks[3].container.{field}"


@pytest.mark.parametrize(
    "path", ["", "/", "//", "//a", "/a/", "/a//b", "/a/./b", "/a/../b", "a", "/a\0", "/a\n", "/\x1b[2J"]
)
def test_no_plain_paths(path: str) -> None:
    with pytest.raises(UserError):
        check_path(path, "here")


def test_paths_have_an_end() -> None:
    check_path("/" + "x" * (PATH_CHARS_MAX - 1), "here")
    with pytest.raises(UserError, match="4097 characters"):
        check_path("/" + "x" * PATH_CHARS_MAX, "here")


@given(st.text(max_size=30))
def test_what_is_taken_for_an_allowance_grants_itself(word: str) -> None:
    try:
        check_allowance(word)
    except UserError:
        return
    assert refusals(("container", word), ("container", word)) == []


@pytest.mark.parametrize(
    ("image", "writable"),
    [("/srv", "/srv"), ("/srv/images", "/srv"), ("/srv", "/srv/images/new"), ("/srv/a.tar", "/srv")],
)
def test_no_task_may_write_where_others_name_images(image: str, writable: str) -> None:
    words = [f"image:{image}", "mount:/srv", f"mount-rw:{writable}", "mount-rw:/out"]
    with pytest.raises(UserError, match=f"tasks may write to {writable}, and name what is in {image}"):
        check_allowances(words, "here")


def test_images_beside_what_tasks_may_write_to_are_fine() -> None:
    check_allowances(["image:/srv/images", "image:docker://r.example/srv", "mount:/srv", "mount-rw:/srv/images2"])


# --- on the way ------------------------------------------------------------------------------------------------------

WHOLE = ContainerSpec(
    "docker://r.example/a:1",
    "host",
    True,
    "7:8",
    ("CHOWN", "KILL"),
    (Mount("/a", "/a"), Mount("/b", "/x", True)),
    1 << 20,
)


@pytest.mark.parametrize("asked", [None, IMAGE, WHOLE])
def test_it_survives_the_record(asked: ContainerSpec | None) -> None:
    there = messages.spec_from_pb(messages.spec_to_pb(spec(1, container=asked, keep_scratch_s=60.0)))
    assert (there.container, there.keep_scratch_s) == (asked, 60.0)


def test_the_hint_says_all_that_matching_needs() -> None:
    made = codec.decode_hint(codec.encode_hint(QueueHint.of(spec(1, container=WHOLE))))
    assert made is not None
    assert (made.needs, made.image) == (needs(WHOLE), WHOLE.image)


def test_no_hint_is_large() -> None:
    """Every hungry node reads them, hundreds in one message."""
    sources = tuple(Mount(f"/{i:03}" + "ä" * 30, f"/{i:03}") for i in range(MOUNTS_MAX))
    most = ContainerSpec("/" + "x" * 1023, "host", True, "root", tuple(sorted(CAPABILITIES)), sources)
    check_container(most, "")
    assert len(codec.encode_hint(QueueHint.of(spec(1, container=most)))) < 12 << 10


def test_records_are_read_in_normal_form() -> None:
    m = messages.container_to_pb(WHOLE)
    del m.capabilities[:], m.mounts[:]
    m.capabilities.extend(("KILL", "CHOWN", "KILL"))
    m.mounts.extend(messages.container_to_pb(mounted("/b:/x:rw")).mounts)
    m.mounts.extend(messages.container_to_pb(mounted("/a")).mounts)
    assert messages.container_from_pb(m) == WHOLE


def test_match_says_what_is_missing() -> None:
    def said(task: ContainerSpec | None, *allows: str) -> str:
        found = why_never(QueueHint.of(spec(1, container=task)), BIG, frozenset(), (), allows)
        assert found is not None
        assert found.obstacle is Obstacle.NOT_ALLOWED
        return found.detail

    assert said(IMAGE, "process") == said(IMAGE) == said(WHOLE, "process") == "the node runs no containers"
    assert said(None, "container") == "the node runs tasks in containers only, and this one names no image"
    assert (
        said(contained(network="host", user="root"), "container") == "the node does not allow network:host, user:root"
    )
    for allows in ((), ("process",), ("process", "container")):
        assert why_never(QueueHint.of(spec(1)), BIG, frozenset(), (), allows) is None


def test_what_is_not_allowed_is_said_before_what_is_too_large() -> None:
    huge = QueueHint.of(spec(1, Resources.of(1 << 40), container=IMAGE))
    found = why_never(huge, BIG, frozenset(), (), ("process",))
    assert found is not None
    assert found.obstacle is Obstacle.NOT_ALLOWED


def test_every_network_but_none_has_to_be_allowed() -> None:
    for network in container.NETWORKS:
        asked = needs(replace(IMAGE, network=network))
        assert refusals(asked, ("container",)) == ([] if network == "none" else [f"network:{network}"])
