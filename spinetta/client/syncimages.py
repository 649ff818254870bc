"""`AsyncImages` for programs without asyncio: ``client.images`` of `spinetta.client.Client`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from spinetta.client.images import AsyncImages, NodeImages, Pulled, Removed, Tell, Verified

T = TypeVar("T")


class Images:
    """Methods, arguments and errors are those of `AsyncImages`. `tell` is called in another thread."""

    def __init__(self, images: AsyncImages, run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self._images = images
        self._run = run

    def pull(self, reference: str, *, name: str = "", node: str = "", tell: Tell = lambda _: None) -> Pulled:
        """Have a node get an image."""
        found: Pulled = self._run(self._images.pull(reference, name=name, node=node, tell=tell))
        return found

    def verify(self, image: str, *, node: str = "", tell: Tell = lambda _: None) -> Verified:
        """Compare an image with the list of its files."""
        found: Verified = self._run(self._images.verify(image, node=node, tell=tell))
        return found

    def list(self, node: str = "") -> NodeImages:
        """The images of a node."""
        found: NodeImages = self._run(self._images.list(node))
        return found

    def remove(self, image: str, *, force: bool = False, node: str = "") -> Removed:
        """Remove an image."""
        found: Removed = self._run(self._images.remove(image, force=force, node=node))
        return found

    def pin(self, image: str, pinned: bool = True, *, node: str = "") -> Pulled:
        """Keep an image, or no more."""
        found: Pulled = self._run(self._images.pin(image, pinned, node=node))
        return found
