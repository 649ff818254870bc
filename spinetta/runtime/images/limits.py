"""Limits of images, each with its reason. The worker knows nothing else of the package."""

from __future__ import annotations

from dataclasses import dataclass

MANIFEST_BYTES_MAX = 4 << 20  # as registries and skopeo have it
LAYERS_MAX = 512  # Docker makes 127 at most
NAME_BYTES_MAX = 2048  # of a path inside: with the store's own part it stays below the kernel's 4096
COMPONENT_BYTES_MAX = 255  # the file system's own
DEPTH_MAX = 128  # directories inside each other; real images have about 20
WORKER_MEMORY_BYTES = 2 << 30  # of address space: a header of a tar file may claim any size
FREE_MIN_BYTES = 256 << 20  # left for others: the daemon and its etcd write to the same disk
PASSWD_BYTES_MAX = 4 << 20  # of an image's /etc/passwd: 50,000 users
STALL_S = 180.0  # nothing comes from a registry, or is written, for so long: given up
POLL_S = 0.2  # between looks at what has come
SAID_CHARS_MAX = 600  # of what a tool says when it fails


@dataclass(frozen=True, slots=True)
class Limits:
    """How large an image may be.

    Attributes:
        bytes_max: of all its files, and of what is fetched for it: larger ones are data, which belongs in mounts.
        file_bytes_max: of one file.
        files_max: inodes: a disk has so many; the largest scientific images have about 500,000.
        free_min_bytes: free on the disk when it is unpacked, at least.
    """

    bytes_max: int = 100 << 30
    file_bytes_max: int = 50 << 30
    files_max: int = 2_000_000
    free_min_bytes: int = FREE_MIN_BYTES


class Refused(Exception):
    """Something is wrong with an image, or with the machine; `reason` a stable word, `hint` what to do."""

    def __init__(self, message: str, *, reason: str = "bad-image", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.hint = hint


def no_space(where: str = "") -> Refused:
    """The disk is full, or nearly."""
    return Refused(
        f"there is no room on the disk{f' for {where}' if where else ''}",
        reason="no-space",
        hint="remove images (spinetta image list, rm), or lower image_keep",
    )
