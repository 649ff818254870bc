"""Image references: what people write, what it means, and what an administrator must have allowed for it.

::

    docker://HOST[:PORT]/REPOSITORY[:TAG|@sha256:…]   a registry
    oci:/PATH[:TAG]                                   an OCI layout, a directory
    oci-archive:/PATH[:TAG]                           the same as a tar file
    docker-archive:/PATH[:NAME:TAG]                   what `docker save` writes
    rootfs:/PATH                                      a root file system: a directory, or a tar file of one
    /PATH                                             any of these, guessed from what is there
    NAME[:TAG]                                        an image of the node's store, or of the site's mirror
    sha256:…                                          an image of the node's store
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spinetta.errors import UserError
from spinetta.names import did_you_mean, is_below, quoted

TEXT_MAX = 4096  # a path's own limit
DIGEST_TEXT = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"(?=.{{1,255}}\Z){_PART}(?:/{_PART})*", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", re.ASCII)
_HOST = re.compile(
    r"(?:\[[0-9a-fA-F:]{2,39}\]|[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})(?:\.[A-Za-z0-9][A-Za-z0-9-]{0,62})*)(?::\d{1,5})?",
    re.ASCII,
)
_LOOPBACK = re.compile(r"(?:localhost|127(?:\.\d{1,3}){3}|\[::1\])(?::\d{1,5})?", re.ASCII)
_PREFIX = re.compile(r"([A-Za-z][A-Za-z0-9+-]*):(?=/)", re.ASCII)
_ARCHIVE_ENDS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.zst", ".tar.bz2")
FORMS = "docker://HOST/REPOSITORY:TAG, oci:/PATH, oci-archive:/PATH, docker-archive:/PATH, rootfs:/PATH, or a name"
ALLOWANCE = "image:"
DEFAULT_TAG = "latest"


class Kind(enum.StrEnum):
    """Where an image comes from; the value is how such a reference begins, if it begins in a way of its own."""

    REGISTRY = "docker"
    OCI = "oci"
    OCI_ARCHIVE = "oci-archive"
    DOCKER_ARCHIVE = "docker-archive"
    ROOTFS = "rootfs"
    PATH = "path"  # to be guessed from what is there
    NAME = "name"
    DIGEST = "digest"


LOCAL = frozenset({Kind.OCI, Kind.OCI_ARCHIVE, Kind.DOCKER_ARCHIVE, Kind.ROOTFS, Kind.PATH})
"""Kinds that name files of the node."""

_OTHERS = {
    "docker-daemon": "save it: docker save NAME -o FILE.tar; then docker-archive:/FILE.tar",
    "containers-storage": "save it: podman save --format oci-archive NAME -o FILE.tar; then oci-archive:/FILE.tar",
    "dir": "make an OCI layout: skopeo copy dir:… oci:/PATH",
    "docker-tar": "write docker-archive:/PATH",
    "tarball": "write rootfs:/PATH",
    "http": "write docker://HOST/REPOSITORY:TAG",
    "https": "write docker://HOST/REPOSITORY:TAG",
}


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A reference, taken apart.

    Attributes:
        path: absolute, of local kinds.
        host: of a registry, with its port.
        repository: of a registry, or the name of a bare reference.
        tag: of a registry or name ``latest`` when nothing is said; of local kinds which one of it, empty: the only one.
        digest: ``sha256:…`` instead of a tag.
    """

    kind: Kind
    path: str = ""
    host: str = ""
    repository: str = ""
    tag: str = ""
    digest: str = ""

    @property
    def is_local(self) -> bool:
        """It names files of the node."""
        return self.kind in LOCAL

    @property
    def on_loopback(self) -> bool:
        """The registry is on this machine: plain HTTP is good enough."""
        return bool(_LOOPBACK.fullmatch(self.host))

    def __str__(self) -> str:
        """In its one canonical form; `parse` makes the same of it."""
        match self.kind:
            case Kind.DIGEST:
                return self.digest
            case Kind.PATH:
                return self.path
            case Kind.NAME | Kind.REGISTRY:
                name = self.repository if self.kind is Kind.NAME else f"docker://{self.host}/{self.repository}"
                return f"{name}@{self.digest}" if self.digest else f"{name}:{self.tag}"
            case _:
                return f"{self.kind.value}:{self.path}" + (f":{self.tag}" if self.tag else "")


def parse(text: str, field: str = "image") -> ImageRef:
    """A reference from what somebody wrote.

    Raises:
        UserError: it is none; says what is near.
    """
    if len(text) > TEXT_MAX:
        raise UserError(f"an image reference of {len(text)} characters", field=field, reason="too-large")
    if not text or text != text.strip() or not text.isprintable():
        raise UserError(f"not an image reference: {quoted(text)}", field=field, hint=FORMS)
    if DIGEST_TEXT.fullmatch(text):
        return ImageRef(Kind.DIGEST, digest=text)
    if text.lower().startswith("sha256:"):
        raise UserError(f"not a digest: {quoted(text)}", field=field, hint="sha256: and 64 of 0-9 a-f")
    if text.startswith("docker://"):
        return _registry(text, field)
    if text.startswith("/"):
        return ImageRef(Kind.PATH, path=_path(text, field))
    begins = _PREFIX.match(text)
    if begins is not None:
        return _local(begins[1], text[begins.end() :], text, field)
    if text.startswith(("./", "../", "~")) or text in (".", ".."):
        raise UserError(f"not an absolute path: {quoted(text)}", field=field, hint="begin it with /")
    if text.partition(":")[0] in {k.value for k in LOCAL if k is not Kind.PATH}:
        raise UserError(
            f"not an absolute path: {quoted(text)}", field=field, hint=f"e.g. {text.partition(':')[0]}:/PATH"
        )
    return _name(text, field)


def parse_name(text: str, field: str = "name") -> ImageRef:
    """A name that an administrator gives an image: NAME or NAME:TAG.

    Raises:
        UserError: it is none.
    """
    found = parse(text, field)
    if found.kind is not Kind.NAME or found.digest:
        raise UserError(f"not a name for an image: {quoted(text)}", field=field, hint="e.g. tools/aligner:1.2")
    return found


def _path(text: str, field: str) -> str:
    path = text.rstrip("/") or "/"
    if any(part in (".", "..") for part in path.split("/")) or "//" in path:
        raise UserError(f"not a plain path: {quoted(path)}", field=field, hint="without '.', '..' and '//'")
    if path == "/":
        raise UserError("the machine's own root is no image", field=field, hint="name a directory below it")
    return path


def _local(word: str, rest: str, text: str, field: str) -> ImageRef:
    if rest.startswith("//") and word not in _OTHERS:
        if word == "docker" or word not in {k.value for k in LOCAL}:
            near = did_you_mean(word, [Kind.REGISTRY.value, *(k.value for k in LOCAL if k is not Kind.PATH)])
            raise UserError(f"there is no kind of image {quoted(word)}", field=field, hint=near)
        raise UserError(f"{word} has one slash: {quoted(text)}", field=field, hint=f"write {word}:/PATH")
    kinds = {k.value: k for k in LOCAL if k is not Kind.PATH}
    if word in _OTHERS:
        raise UserError(f"images cannot be had from {quoted(word)}", field=field, hint=_OTHERS[word])
    if word == Kind.REGISTRY.value:
        raise UserError(f"docker has two slashes: {quoted(text)}", field=field, hint="docker://HOST/REPOSITORY:TAG")
    if word not in kinds:
        near = did_you_mean(word, [Kind.REGISTRY.value, *kinds])
        raise UserError(f"there is no kind of image {quoted(word)}", field=field, hint=near)
    kind = kinds[word]
    path, colon, tag = rest.partition(":")
    if kind is Kind.ROOTFS and colon:
        raise UserError("a root file system has no tags, and its path no ':'", field=field, hint="rename it")
    if colon and kind is Kind.DOCKER_ARCHIVE:
        name, _, inner = tag.partition(":")
        if not (_REPOSITORY.fullmatch(name.partition("/")[2] or name) and _TAG.fullmatch(inner)):
            raise UserError(f"not NAME:TAG: {quoted(tag)}", field=field, hint="docker-archive:/PATH:NAME:TAG")
    elif colon and not _TAG.fullmatch(tag):
        raise UserError(f"not a tag: {quoted(tag)}", field=field, hint=f"{word}:/PATH:TAG, and no ':' in the path")
    if kind is Kind.OCI and path.endswith(_ARCHIVE_ENDS):
        raise UserError(f"{quoted(path)} looks like a tar file", field=field, hint=f"did you mean oci-archive:{rest}?")
    return ImageRef(kind, path=_path(path, field), tag=tag)


def _registry(text: str, field: str) -> ImageRef:
    rest = text.removeprefix("docker://")
    host, slash, remote = rest.partition("/")
    if not slash or not (_is_host(host) or host == "localhost"):
        hint = f"docker://HOST/REPOSITORY:TAG; for an image of the site's mirror: {quoted(rest)}"
        raise UserError(f"no registry is named in {quoted(text)}", field=field, hint=hint)
    if not _HOST.fullmatch(host):
        raise UserError(f"not a registry's host: {quoted(host)}", field=field, hint="HOST or HOST:PORT")
    repository, tag, digest = _split(remote, text, field)
    return ImageRef(Kind.REGISTRY, host=host.lower(), repository=repository, tag=tag, digest=digest)


def _is_host(word: str) -> bool:
    """As others tell a registry's host from the first part of a name."""
    return "." in word or ":" in word or word == "localhost"


def _name(text: str, field: str) -> ImageRef:
    first, slash, _ = text.partition("/")
    if slash and _is_host(first):
        raise UserError(f"not an image reference: {quoted(text)}", field=field, hint=f"did you mean docker://{text}?")
    repository, tag, digest = _split(text, text, field)
    if not slash and not digest and repository.endswith(_ARCHIVE_ENDS):
        raise UserError(f"not an absolute path: {quoted(text)}", field=field, hint="begin it with /")
    if repository in {"sha256", *_OTHERS}:  # with a tag it would mean something else
        raise UserError(f"not the name of an image: {quoted(repository)}", field=field, hint=FORMS)
    return ImageRef(Kind.NAME, repository=repository, tag=tag, digest=digest)


def _split(remote: str, text: str, field: str) -> tuple[str, str, str]:
    name, at, digest = remote.partition("@")
    if at and not DIGEST_TEXT.fullmatch(digest):
        raise UserError(f"not a digest: {quoted(digest)}", field=field, hint="sha256: and 64 of 0-9 a-f")
    repository, colon, tag = name.partition(":")
    if at:  # both may be said: then the digest counts
        tag = ""
    elif colon and not _TAG.fullmatch(tag):
        raise UserError(f"not a tag: {quoted(tag)} in {quoted(text)}", field=field, hint="letters, digits and '._-'")
    if not _REPOSITORY.fullmatch(repository):
        lower = repository.lower()
        near = f"did you mean {lower!r}?" if _REPOSITORY.fullmatch(lower) else FORMS
        raise UserError(f"not the name of an image: {quoted(repository)}", field=field, hint=near)
    return repository, tag or ("" if at else DEFAULT_TAG), digest


# --- what a task may ask for -----------------------------------------------------------------------------------------


def need(ref: ImageRef) -> str:
    """What a node's administrator must have allowed for a task with this image; empty: nothing in particular.

    ``image:/PATH`` for files of the node: they are read as root. ``image:docker://HOST/REPOSITORY`` for registries.
    """
    if ref.is_local:
        return f"{ALLOWANCE}{ref.path}"
    if ref.kind is Kind.REGISTRY:
        return f"{ALLOWANCE}docker://{ref.host}/{ref.repository}"
    return ""


def refusal(needed: str, allows: Iterable[str]) -> str | None:
    """Why what `need` says is not allowed by these allowances; None when it is.

    Files must be named by one, by themselves or by a directory above. Registries are all allowed, unless allowances
    name some (``image:docker://HOST`` or ``image:docker://HOST/PREFIX``).
    """
    if not needed.startswith(ALLOWANCE):
        return None
    wanted = needed.removeprefix(ALLOWANCE)
    named = [a.removeprefix(ALLOWANCE).rstrip("/") for a in allows if a.startswith(ALLOWANCE)]
    if wanted.startswith("docker://"):
        registries = [n for n in named if n.startswith("docker://")]
        if not registries or any(is_below(wanted, top) for top in registries):
            return None
        return f"images of {wanted.removeprefix('docker://')} are not allowed there"
    if any(is_below(wanted, top) for top in named if not top.startswith("docker://")):
        return None
    return f"the image {wanted} is not below a directory that is allowed there (allow {ALLOWANCE}/DIRECTORY)"


def local_prefixes(allows: Iterable[str]) -> tuple[str, ...]:
    """The directories below which tasks may name images."""
    named = (a.removeprefix(ALLOWANCE) for a in allows if a.startswith(ALLOWANCE))
    return tuple(n.rstrip("/") or "/" for n in named if n.startswith("/"))


def mirrored(ref: ImageRef, searched: Sequence[str], aliases: Iterable[tuple[str, str]] = ()) -> tuple[ImageRef, ...]:
    """Where the site has an image of a bare name, the first first.

    Args:
        ref: of kind NAME.
        searched: ``unqualified-search-registries`` of registries.conf: HOST, or HOST/PREFIX.
        aliases: its ``[aliases]``: a name and HOST/REPOSITORY, which then is the only place.
    """
    of_alias = dict(aliases).get(ref.repository)
    places = [of_alias] if of_alias else [f"{place.rstrip('/')}/{ref.repository}" for place in searched]
    end = f"@{ref.digest}" if ref.digest else f":{ref.tag}"
    return tuple(parse(f"docker://{place}{end}", "registries_conf") for place in places)
