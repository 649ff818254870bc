"""What a node and a person keep on disk to prove who they are.

A node's files belong together: a key without its certificate, or a certificate of one authority beside the bundle of
another, would keep it out of its cluster for ever. So each change writes a whole new *generation* of files, and one
rename of a link makes it the current one::

    DATA/trust/            0700
      current -> 3/        what counts
      3/                   ca.pem, node.pem, node.key, sealing.key; of a voter also etcd-ca.pem, etcd.pem, etcd.key
      pending.pem          keys that a node waits for certificates for

After a crash at any point either all of a change is there or nothing of it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from spinetta.access import NodeRole
from spinetta.errors import UserError
from spinetta.trust import certificates, sealing

FILE_BYTES_MAX = certificates.PEM_BYTES_MAX
CURRENT = "current"
PENDING = "pending.pem"

_GENERATION = re.compile(r"[1-9][0-9]{0,17}", re.ASCII)
_KEY = re.compile(rb"-----BEGIN PRIVATE KEY-----\s.*?-----END PRIVATE KEY-----\s*", re.DOTALL)
_RESTORE = "restore it from a backup; or move the node's data directory away and join anew with a token"
_LOGIN = "log in anew with: spinetta login"


@dataclass(frozen=True, slots=True)
class EtcdPems:
    """What etcd on a voter needs: its own authorities' certificates, its certificate and key."""

    ca_pem: bytes
    cert_pem: bytes
    key_pem: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class EtcdFiles:
    """Where etcd finds them: paths that stay the same through every change."""

    ca: Path
    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class _State:
    serial: int
    ca_pem: bytes
    node_pem: bytes
    node_key_pem: bytes = field(repr=False)
    sealing_private: bytes = field(repr=False)
    etcd: EtcdPems | None
    identity: certificates.Identity

    def files(self) -> dict[str, bytes]:
        found = {
            "ca.pem": self.ca_pem,
            "node.pem": self.node_pem,
            "node.key": self.node_key_pem,
            "sealing.key": self.sealing_private,
        }
        if self.etcd is not None:
            found |= {
                "etcd-ca.pem": self.etcd.ca_pem,
                "etcd.pem": self.etcd.cert_pem,
                "etcd.key": self.etcd.key_pem,
            }
        return found


class NodeCredentials:
    """A node's credentials, as they are on disk. All reads come from memory; `update` writes, and blocks.

    Readers in other threads see either all of a change or nothing of it when they take what they need by one call
    (`pems`).
    """

    def __init__(self, directory: Path, state: _State) -> None:
        self.directory = directory
        self._state = state
        self._writing = threading.Lock()

    def __repr__(self) -> str:
        return f"NodeCredentials({self.name!r} of {self.cluster}, serial {self.serial})"

    @classmethod
    def load(cls, directory: Path) -> Self | None:
        """The credentials in DATA/trust; None when the node has none, i.e. its cluster is an open one.

        Files that others may read are closed to them.

        Raises:
            UserError: they are damaged, or cannot be read.
        """
        try:
            generation = (directory / CURRENT).readlink().name
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as e:
            raise _damaged(directory / CURRENT, f"it cannot be read: {e.strerror}") from e
        if not _GENERATION.fullmatch(generation):
            raise _damaged(directory / CURRENT, "it points elsewhere")
        _close_to_others(directory)
        return cls(directory, _load(directory / generation, int(generation)))

    @classmethod
    def create(
        cls,
        directory: Path,
        *,
        ca_pem: bytes,
        node_pem: bytes,
        node_key_pem: bytes,
        sealing_private: bytes,
        etcd: EtcdPems | None = None,
    ) -> Self:
        """Save a node's first credentials, or all new ones after it has joined anew.

        Raises:
            UserError: they do not fit together, or cannot be written (reason ``disk``).
        """
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
            serial = 1 + max(_generations(directory), default=0)
        except OSError as e:
            raise _unwritable(directory, e) from e
        state = _checked(serial, ca_pem, node_pem, node_key_pem, sealing_private, etcd)
        _save(directory, state)
        return cls(directory, state)

    def update(
        self,
        *,
        ca_pem: bytes | None = None,
        node_pem: bytes | None = None,
        node_key_pem: bytes | None = None,
        etcd: EtcdPems | None = None,
    ) -> bool:
        """Replace some of it, on disk and then here, as one change. False: it is all as it was, nothing was written.

        When etcd's certificate is renewed its key should stay: etcd reads the two files one after the other.

        Raises:
            UserError: the parts would not fit together, or they cannot be written. What was there still counts.
        """
        with self._writing:
            old = self._state
            new = _checked(
                old.serial,
                old.ca_pem if ca_pem is None else ca_pem,
                old.node_pem if node_pem is None else node_pem,
                old.node_key_pem if node_key_pem is None else node_key_pem,
                old.sealing_private,
                old.etcd if etcd is None else etcd,
            )
            if new == old:
                return False
            # Not just one more: a try that failed half-way may have left a directory behind.
            new = replace(new, serial=1 + max((old.serial, *_generations(self.directory))))
            _save(self.directory, new)
            self._state = new
            return True

    def pems(self) -> tuple[bytes, bytes, bytes]:
        """Bundle, certificate and key of one moment: what `dial` asks for."""
        state = self._state
        return state.ca_pem, state.node_pem, state.node_key_pem

    @property
    def serial(self) -> int:
        """Grows with every change."""
        return self._state.serial

    @property
    def cluster(self) -> str:
        """The trust domain."""
        return self._state.identity.cluster

    @property
    def name(self) -> str:
        """The node's name, as in its certificate."""
        return self._state.identity.name

    @property
    def role(self) -> NodeRole:
        """As in its certificate."""
        role = self._state.identity.role
        assert role is not None  # noqa: S101 - told by `_checked`
        return role

    @property
    def identity(self) -> certificates.Identity:
        """All that its certificate says."""
        return self._state.identity

    @property
    def ca_pem(self) -> bytes:
        """The authorities that are believed: a bundle."""
        return self._state.ca_pem

    @property
    def node_pem(self) -> bytes:
        """The node's certificate."""
        return self._state.node_pem

    @property
    def node_key_pem(self) -> bytes:
        """The key of its certificate."""
        return self._state.node_key_pem

    @property
    def sealing_private(self) -> bytes:
        """The key that secrets for this node are sealed to; it stays the same for the node's whole life."""
        return self._state.sealing_private

    @property
    def etcd_pems(self) -> EtcdPems | None:
        """Etcd's credentials; None on a worker."""
        return self._state.etcd

    @property
    def etcd(self) -> EtcdFiles | None:
        """Where etcd finds them; None on a worker."""
        if self._state.etcd is None:
            return None
        here = self.directory / CURRENT
        return EtcdFiles(here / "etcd-ca.pem", here / "etcd.pem", here / "etcd.key")


@dataclass(frozen=True, slots=True)
class PendingKeys:
    """Keys that have been sent to be certified. Kept, so that a node that restarts while it waits to be approved
    is still the one that has asked."""

    node_key_pem: bytes = field(repr=False)
    etcd_key_pem: bytes = field(repr=False)
    sealing_private: bytes = field(repr=False)

    @classmethod
    def load_or_create(cls, directory: Path) -> Self:
        """The keys in DATA/trust that wait for certificates; new ones, saved, when there are none.

        Raises:
            UserError: they are damaged, or cannot be read or written.
        """
        path = directory / PENDING
        data = _read_private(path, missing_ok=True)
        if data is not None:
            found = [m.group() for m in _KEY.finditer(data)]
            try:
                if len(found) != 3:
                    raise UserError("it should hold three keys")
                certificates.load_key(found[0])
                certificates.load_key(found[1])
                return cls(found[0], found[1], sealing.from_pem(found[2]))
            except UserError as e:
                raise _damaged(path, e.message, "remove it, and join anew") from None
        keys = (certificates.key_pem(certificates.new_key()), certificates.key_pem(certificates.new_key()))
        private = sealing.new_sealing_key()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
            write_private(path, keys[0] + keys[1] + sealing.to_pem(private))
        except OSError as e:
            raise _unwritable(path, e) from e
        return cls(*keys, private)

    @staticmethod
    def forget(directory: Path) -> None:
        """Remove them, once they are in the credentials or will not be certified. May be done twice."""
        with contextlib.suppress(FileNotFoundError):
            (directory / PENDING).unlink()


@dataclass(frozen=True, slots=True)
class UserCredentials:
    """A person's credentials: one file, which only its owner may read."""

    ca_pem: bytes
    cert_pem: bytes
    key_pem: bytes = field(repr=False)
    name: str
    cluster: str

    @classmethod
    def create(cls, ca_pem: bytes, cert_pem: bytes, key_pem: bytes) -> Self:
        """From their parts.

        Raises:
            UserError: they do not fit together.
        """
        identity = _fit(ca_pem, cert_pem, key_pem, "user")
        return cls(ca_pem, cert_pem, key_pem, identity.name, identity.cluster)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read them.

        Raises:
            UserError: there is no such file, others may read it, or it is damaged.
        """
        data = _read_private(path, repair=False)
        assert data is not None  # noqa: S101 - only when `missing_ok`
        leaves: list[bytes] = []
        authorities: list[bytes] = []
        try:
            for one in certificates.split_pem(data):
                certificate = certificates.load_certificate(one)
                (authorities if certificates.is_authority(certificate) else leaves).append(one)
            keys = _KEY.findall(data)
            if len(keys) != 1 or len(leaves) != 1 or not authorities:
                raise UserError("it should hold a key, its certificate and the certificates of the cluster")
            return cls.create(b"".join(authorities), leaves[0], keys[0])
        except UserError as e:
            raise _damaged(path, e.message, _LOGIN) from None

    def to_file(self, path: Path) -> None:
        """Write them, whole or not at all.

        Raises:
            UserError: they cannot be written.
        """
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private(path, b"".join(p.rstrip() + b"\n" for p in (self.key_pem, self.cert_pem, self.ca_pem)))
        except OSError as e:
            raise _unwritable(path, e) from e


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, whole or not at all, also through a power cut.

    Raises:
        OSError: it could not be written; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        _write_new(temporary, data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _load(directory: Path, serial: int) -> _State:
    def part(name: str, *, missing_ok: bool = False) -> bytes | None:
        return _read_private(directory / name, missing_ok=missing_ok, hint=_RESTORE)

    ca_pem, node_pem, key_pem, private = (part(n) for n in ("ca.pem", "node.pem", "node.key", "sealing.key"))
    etcd_ca = part("etcd-ca.pem", missing_ok=True)
    etcd = None
    if etcd_ca is not None:
        etcd = EtcdPems(etcd_ca, part("etcd.pem") or b"", part("etcd.key") or b"")
    try:
        return _checked(serial, ca_pem or b"", node_pem or b"", key_pem or b"", private or b"", etcd)
    except UserError as e:
        raise _damaged(directory, e.message) from None


def _checked(
    serial: int, ca_pem: bytes, node_pem: bytes, node_key_pem: bytes, sealing_private: bytes, etcd: EtcdPems | None
) -> _State:
    identity = _fit(ca_pem, node_pem, node_key_pem, "node")
    sealing.public_of(sealing_private)
    if etcd is not None:
        if certificates.cluster_of(etcd.ca_pem) != identity.cluster:
            raise UserError("the certificates of etcd's authorities are another cluster's", reason="bad-credentials")
        _fit_key(etcd.cert_pem, etcd.key_pem)
    return _State(serial, ca_pem, node_pem, node_key_pem, sealing_private, etcd, identity)


def _fit(ca_pem: bytes, cert_pem: bytes, key_pem: bytes, kind: str) -> certificates.Identity:
    """Whom the certificate names. It may have expired, and its authority may be believed no more: others decide."""
    identity = certificates.describe(cert_pem)
    if identity.kind != kind:
        raise UserError(f"this is the certificate of a {identity.kind}, not of a {kind}", reason="bad-credentials")
    _fit_key(cert_pem, key_pem)
    bundle = certificates.split_pem(ca_pem)
    if not bundle or any(certificates.cluster_of(one) != identity.cluster for one in bundle):
        raise UserError("the authorities' certificates are not this cluster's", reason="bad-credentials")
    return identity


def _fit_key(cert_pem: bytes, key_pem: bytes) -> None:
    if certificates.authority_hash(cert_pem) != certificates.public_key_hash(certificates.load_key(key_pem)):
        raise UserError("the certificate is not for this key", reason="bad-credentials")


def _generations(directory: Path) -> list[int]:
    return [int(p.name) for p in directory.iterdir() if _GENERATION.fullmatch(p.name)]


def _save(directory: Path, state: _State) -> None:
    """Write a generation, make it the current one, and remove those before."""
    target = directory / str(state.serial)
    link = directory / f".{CURRENT}.{state.serial}"
    try:
        target.mkdir(mode=0o700)
        for name, data in state.files().items():
            _write_new(target / name, data)
        _sync_directory(target)
        link.unlink(missing_ok=True)
        link.symlink_to(target.name, target_is_directory=True)
        _sync_directory(directory)  # the files, before anything points to them
        link.replace(directory / CURRENT)
    except OSError as e:
        shutil.rmtree(target, ignore_errors=True)
        link.unlink(missing_ok=True)
        raise _unwritable(directory, e) from e
    with contextlib.suppress(OSError):  # from here on the change counts: leftovers are for the next one to remove
        _sync_directory(directory)
        for old in _generations(directory):
            if old != state.serial:
                shutil.rmtree(directory / str(old), ignore_errors=True)


def _write_new(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(fd, "wb") as file:  # noqa: PTH123 - a descriptor, so that it is 0600 from the start
        file.write(data)
        file.flush()
        os.fsync(fd)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _close_to_others(directory: Path) -> None:
    with contextlib.suppress(OSError):  # of another user: reading the files will tell
        if stat.S_IMODE(directory.stat().st_mode) & 0o077:
            directory.chmod(0o700)


def _read_private(path: Path, *, missing_ok: bool = False, repair: bool = True, hint: str = _RESTORE) -> bytes | None:
    """A small file that only its owner may read; with `repair`, one that others may read is closed to them."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno())
            if mode.st_mode & 0o077:
                if not repair:
                    raise UserError(
                        f"{path} holds a private key, and others may read it",
                        hint=f"if nobody has: chmod 600 {path}; otherwise {_LOGIN}",
                        reason="readable-key",
                    )
                os.fchmod(file.fileno(), 0o600)
            data = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        if missing_ok:
            return None
        hint = hint if repair else _LOGIN
        raise UserError(f"there is no file {path}", hint=hint, reason="no-credentials") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}", reason="bad-credentials") from e
    if len(data) > FILE_BYTES_MAX:
        raise _damaged(path, "it is too large", hint)
    return data


def _damaged(path: Path, why: str, hint: str = _RESTORE) -> UserError:
    return UserError(f"{path} is damaged: {why}", hint=hint, reason="bad-credentials")


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"credentials cannot be written to {path}: {error.strerror}",
        hint="use a place that you may write to, on a disk with room",
        reason="disk",
    )
