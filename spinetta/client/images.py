"""Images on nodes, for programs: ``client.images``."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spinetta.client.requests import node_or_empty
from spinetta.errors import StoreUnavailable
from spinetta.v1 import api_pb2 as api

if TYPE_CHECKING:
    from spinetta.client.channels import Nodes


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """An image that a node has; times in milliseconds since 1970.

    Attributes:
        digest: of its manifest on nodes; `sources`: those by which registries have it.
        names: references it was got by, and what administrators call it.
        uses: attempts that use it now.
        marked: it goes as soon as nothing uses it.
        left_out: devices and sockets that it had.
        tree: digest of the list of its files: the same files have the same.
        user_trouble: why the user that it names means nothing; mostly empty.
    """

    digest: str
    sources: tuple[str, ...]
    names: tuple[str, ...]
    size_bytes: int
    files: int
    created_ms: int
    used_ms: int
    uses: int
    pinned: bool
    marked: bool
    left_out: int
    tree: str
    architecture: str
    user_trouble: str


@dataclass(frozen=True, slots=True)
class ImageStep:
    """How far a pull or a check is; `total_bytes` 0: not known."""

    phase: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class NodeImages:
    """The images of one node; `omitted`: how many more it has; `has_store`: whether it runs containers at all."""

    node: str
    images: tuple[ImageInfo, ...]
    omitted: int = 0
    has_store: bool = True


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a node has now."""

    node: str
    image: ImageInfo


@dataclass(frozen=True, slots=True)
class Removed:
    """What became of an image: ``removed``, ``unnamed`` (it has other names) or ``marked`` (it is in use still)."""

    node: str
    what: str
    image: ImageInfo


@dataclass(frozen=True, slots=True)
class Verified:
    """How an image differs from what was unpacked, in words; nothing: in nothing."""

    node: str
    image: ImageInfo
    differences: tuple[str, ...]


Tell = Callable[[ImageStep], None]


class AsyncImages:
    """Images on one node: `node` is its name, empty: the one that is asked.

    Errors as of `AsyncClient`; `Denied` in a secured cluster to those who are neither operator nor admin (who may see).
    """

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes

    async def pull(self, reference: str, *, name: str = "", node: str = "", tell: Tell = lambda _: None) -> Pulled:
        """Have a node get an image, or see whether it is another one by now. Leaving ends it, unless a task wants it.

        Args:
            reference: e.g. ``docker://HOST/REPOSITORY:TAG``, or files of the node: ``oci-archive:/PATH``.
            name: to call it by as well.
            node: which.
            tell: is told how far it is.
        """
        request = api.PullImageRequest(reference=reference, name=name, node=node_or_empty(node))
        async with contextlib.aclosing(self._nodes.stream(lambda stub: stub.PullImage, request, writes=True)) as steps:
            last = await _last(steps, tell)
        return Pulled(last.node, image_info(last.image))

    async def verify(self, image: str, *, node: str = "", tell: Tell = lambda _: None) -> Verified:
        """Compare an image with the list of its files made when it was unpacked."""
        request = api.VerifyImageRequest(image=image, node=node_or_empty(node))
        async with contextlib.aclosing(self._nodes.stream(lambda stub: stub.VerifyImage, request)) as steps:
            last = await _last(steps, tell)
        return Verified(last.node, image_info(last.image), tuple(last.differences))

    async def list(self, node: str = "") -> NodeImages:
        """The images of a node, the last used first."""
        request = api.ListImagesRequest(node=node_or_empty(node))
        m = await self._nodes.call(lambda stub: stub.ListImages, request)
        return NodeImages(m.node, tuple(image_info(i) for i in m.images), m.omitted, m.has_store)

    async def remove(self, image: str, *, force: bool = False, node: str = "") -> Removed:
        """Remove an image by name, digest, or the beginning of one; of several names only that one.

        `force`: one in use goes when nothing uses it any more; a pinned one goes, too.
        """
        request = api.RemoveImageRequest(image=image, force=force, node=node_or_empty(node))
        m = await self._nodes.call(lambda stub: stub.RemoveImage, request, writes=True)
        return Removed(m.node, m.what, image_info(m.image))

    async def pin(self, image: str, pinned: bool = True, *, node: str = "") -> Pulled:
        """Keep an image whatever the node's limits say, or no more."""
        request = api.PinImageRequest(image=image, pinned=pinned, node=node_or_empty(node))
        m = await self._nodes.call(lambda stub: stub.PinImage, request, writes=True)
        return Pulled(m.node, image_info(m.image))


async def _last(steps: AsyncIterator[api.ImageProgress], tell: Tell) -> api.ImageProgress:
    async for m in steps:
        if m.done:
            return m
        tell(ImageStep(m.phase, m.done_bytes, m.total_bytes))
    raise StoreUnavailable("the node broke off before it was done", hint="try again")


def image_info(m: api.Image) -> ImageInfo:
    """An image as the API tells it."""
    return ImageInfo(
        m.digest,
        tuple(m.sources),
        tuple(m.names),
        m.size_bytes,
        m.files,
        m.created_ms,
        m.used_ms,
        m.uses,
        m.pinned,
        m.marked,
        m.left_out,
        m.tree,
        m.architecture,
        m.user_trouble,
    )
