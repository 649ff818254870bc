# ruff: noqa: D102, N802 - RPCs are named, and told of, in the .proto file
"""Images: of this node, or passed on to the one that is meant."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import grpc.aio

from spinetta import imageref, names
from spinetta.errors import UserError
from spinetta.model import NodeId
from spinetta.node.hub import closing
from spinetta.node.port import NodePort
from spinetta.node.services import limits
from spinetta.node.services.desk import Asked, Desk
from spinetta.node.services.forwarding import is_for, passed_on
from spinetta.node.services.peers import FORWARDED, Peers
from spinetta.rights import Call
from spinetta.runtime.images.catalogue import ImageInfo
from spinetta.runtime.images.errands import Step, Tell
from spinetta.runtime.images.records import ImageRecord
from spinetta.runtime.images.store import ImageStore
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import api_pb2_grpc as rpc

T = TypeVar("T")
SHOWN_CHARS_MAX = 200  # of a reference, in the audit log


class Images:
    """The calls about images."""

    def __init__(self, port: NodePort, peers: Peers) -> None:
        self._port = port
        self._peers = peers

    async def pull(self, request: api.PullImageRequest, asked: Asked) -> AsyncIterator[api.ImageProgress]:
        """Get an image, and tell how far it is. It ends with the call, unless others want the same one.

        Raises:
            UserError, NotFound: it cannot be had.
        """
        is_me = is_for(self._port.name, request.node, asked)
        ref = imageref.parse(request.reference, "reference")
        name = str(imageref.parse_name(request.name, "name")) if request.name else ""
        if not is_me:
            async with closing(
                self._remote(request, lambda stub: stub.PullImage(request, metadata=(FORWARDED,)))
            ) as steps:
                async for step in steps:
                    yield step
            return
        store = self._images()
        record: ImageRecord | None = None
        async with closing(_steps(lambda tell: store.pull(ref, name=name, tell=tell))) as found:
            async for item in found:
                if isinstance(item, Step):
                    yield self._progress(item)
                else:
                    record = item
        yield api.ImageProgress(node=self._port.name, done=True, image=_image(_info(store, record)))

    async def verify(self, request: api.VerifyImageRequest, asked: Asked) -> AsyncIterator[api.ImageProgress]:
        """Compare an image with the list of its files.

        Raises:
            NotFound: no such image.
            UserError: it cannot be said.
        """
        if not is_for(self._port.name, request.node, asked):
            async with closing(
                self._remote(request, lambda stub: stub.VerifyImage(request, metadata=(FORWARDED,)))
            ) as steps:
                async for step in steps:
                    yield step
            return
        store = self._images()
        record = store.find(request.image)
        differences: list[str] = []
        async with closing(_steps(lambda tell: store.verify(request.image, tell))) as found:
            async for item in found:
                if isinstance(item, Step):
                    yield self._progress(item)
                else:
                    differences = item
        yield api.ImageProgress(
            node=self._port.name, done=True, image=_image(_info(store, record)), differences=differences
        )

    async def list(self, request: api.ListImagesRequest, asked: Asked) -> api.ListImagesResponse:
        """The images of a node."""
        if not is_for(self._port.name, request.node, asked):
            stub = await self._other(request.node)
            with passed_on(request.node):
                return await stub.ListImages(request, timeout=limits.FORWARD_TIMEOUT_S, metadata=(FORWARDED,))
        if self._port.images is None:
            return api.ListImagesResponse(node=self._port.name)
        found = self._port.images.images()
        shown = [_image(i) for i in found[: limits.IMAGES_SHOWN_MAX]]
        return api.ListImagesResponse(
            node=self._port.name, images=shown, omitted=len(found) - len(shown), has_store=True
        )

    async def remove(self, request: api.RemoveImageRequest, asked: Asked) -> api.RemoveImageResponse:
        """Remove one.

        Raises:
            NotFound: no such image.
            UserError: it is in use or pinned, and `force` is not given.
        """
        if not is_for(self._port.name, request.node, asked):
            stub = await self._other(request.node)
            with passed_on(request.node):
                return await stub.RemoveImage(request, timeout=limits.FORWARD_TIMEOUT_S, metadata=(FORWARDED,))
        store = self._images()
        record, what = store.remove(request.image, force=request.force)
        return api.RemoveImageResponse(node=self._port.name, what=what, image=_image(_info(store, record)))

    async def pin(self, request: api.PinImageRequest, asked: Asked) -> api.PinImageResponse:
        """Keep one, or no more.

        Raises:
            NotFound: no such image.
        """
        if not is_for(self._port.name, request.node, asked):
            stub = await self._other(request.node)
            with passed_on(request.node):
                return await stub.PinImage(request, timeout=limits.FORWARD_TIMEOUT_S, metadata=(FORWARDED,))
        store = self._images()
        record = store.pin(request.image, request.pinned)
        return api.PinImageResponse(node=self._port.name, image=_image(_info(store, record)))

    # --- inside ---

    def _images(self) -> ImageStore:
        if self._port.images is None:
            raise UserError(
                f"node {self._port.name} runs no containers, and keeps no images",
                field="node",
                reason="no-containers",
                hint="see why: spinetta doctor",
            )
        return self._port.images

    async def _other(self, name: str) -> rpc.SpinettaAsyncStub:
        names.check_node_name(name, "node")
        return await self._peers.stub(await self._peers.record(NodeId(name)))

    async def _remote(
        self,
        request: api.PullImageRequest | api.VerifyImageRequest,
        call: Callable[[rpc.SpinettaAsyncStub], grpc.aio.UnaryStreamCall[Any, api.ImageProgress]],
    ) -> AsyncIterator[api.ImageProgress]:
        stub = await self._other(request.node)
        with passed_on(request.node):
            stream = call(stub)
            try:
                async for step in stream:
                    yield step
            finally:
                stream.cancel()

    def _progress(self, step: Step) -> api.ImageProgress:
        return api.ImageProgress(
            node=self._port.name, phase=step.phase, done_bytes=max(step.done, 0), total_bytes=max(step.total, 0)
        )


async def _steps(work: Callable[[Tell], Coroutine[Any, Any, T]]) -> AsyncIterator[Step | T]:
    """How far the work is, each time that has changed, and its result; it ends when nobody listens any more."""
    latest: list[Step] = []
    told = asyncio.Event()

    def tell(step: Step) -> None:
        latest[:] = [step]
        told.set()

    task = asyncio.ensure_future(work(tell))
    try:
        while not task.done():
            waiting = asyncio.ensure_future(told.wait())
            await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            told.clear()
            if latest and not task.done():
                yield latest.pop()
        yield task.result()
    finally:
        task.cancel()
        await asyncio.wait((task,))


def _info(store: ImageStore, record: ImageRecord | None) -> ImageInfo:
    """How it stands now; of one that has just gone what is known."""
    if record is None:
        return ImageInfo(ImageRecord(""), 0, 0)
    found = next((i for i in store.images() if i.record.digest == record.digest), None)
    return found or ImageInfo(record, 0, 0)


def _image(info: ImageInfo) -> api.Image:
    r = info.record
    return api.Image(
        digest=r.digest,
        sources=r.sources,
        names=sorted(r.names),
        size_bytes=r.size_bytes,
        files=r.files,
        created_ms=r.created_ms,
        used_ms=info.used_ms,
        uses=info.uses,
        pinned=r.pinned,
        marked=r.marked,
        left_out=r.left_out,
        tree=r.tree,
        architecture=r.architecture,
        user_trouble=r.user_trouble,
    )


class ImageCalls(rpc.SpinettaServicer):
    """These calls, for the servicer that has all of them."""

    _desk: Desk
    _images: Images

    async def PullImage(self, request: api.PullImageRequest, context: Any) -> AsyncIterator[api.ImageProgress]:
        subject = f"pull {_subject(request.reference, request.node)}"
        async with closing(
            self._desk.stream(
                context, _right_to_pull(request), lambda asked: self._images.pull(request, asked), subject=subject
            )
        ) as steps:
            async for step in steps:
                yield step

    async def ListImages(self, request: api.ListImagesRequest, context: Any) -> api.ListImagesResponse:
        return await self._desk.answer(context, Call.IMAGES, lambda asked: self._images.list(request, asked))

    async def RemoveImage(self, request: api.RemoveImageRequest, context: Any) -> api.RemoveImageResponse:
        subject = f"remove {_subject(request.image, request.node)}"
        return await self._desk.answer(
            context, Call.IMAGE_CHANGE, lambda asked: self._images.remove(request, asked), subject=subject
        )

    async def PinImage(self, request: api.PinImageRequest, context: Any) -> api.PinImageResponse:
        subject = f"{'pin' if request.pinned else 'unpin'} {_subject(request.image, request.node)}"
        return await self._desk.answer(
            context, Call.IMAGE_CHANGE, lambda asked: self._images.pin(request, asked), subject=subject
        )

    async def VerifyImage(self, request: api.VerifyImageRequest, context: Any) -> AsyncIterator[api.ImageProgress]:
        subject = f"verify {_subject(request.image, request.node)}"
        async with closing(
            self._desk.stream(
                context, Call.IMAGE_CHANGE, lambda asked: self._images.verify(request, asked), subject=subject
            )
        ) as steps:
            async for step in steps:
                yield step


def _right_to_pull(request: api.PullImageRequest) -> Call:
    """Files of the node are read as root, which is more than to have an image of a registry."""
    try:
        return Call.IMAGE_IMPORT if imageref.parse(request.reference).is_local else Call.IMAGE_CHANGE
    except UserError:  # told when it is looked at by those who may
        return Call.IMAGE_CHANGE


def _subject(image: str, node: str) -> str:
    on = f" on {node[:64]}" if node else ""
    return f"{image[:SHOWN_CHARS_MAX]}{on}"
