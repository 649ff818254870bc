"""What a node and a person keep on disk to prove who they are.

A node's are several files that change as one, see `generations`; a person's are one file.
"""

from __future__ import annotations

import contextlib
import re
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Self

from spinetta.access import NodeRole
from spinetta.errors import UserError
from spinetta.trust import certificates, files, generations, sealing
from spinetta.trust.files import write_private as write_private

PENDING = "pending.pem"

_ALWAYS = ("ca.pem", "node.pem", "node.key", "sealing.key")
_ETCD = ("etcd-ca.pem", "etcd.pem", "etcd.key")
_KEY = re.compile(rb"-----BEGIN PRIVATE KEY-----\s.*?-----END PRIVATE KEY-----\s*", re.DOTALL)


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
        always = (self.ca_pem, self.node_pem, self.node_key_pem, self.sealing_private)
        etcd = () if self.etcd is None else (self.etcd.ca_pem, self.etcd.cert_pem, self.etcd.key_pem)
        return dict(zip((*_ALWAYS, *_ETCD), always + etcd, strict=False))


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
        before = None
        while (serial := generations.current(directory)) is not None:
            try:
                files.close_to_others(directory)
                return cls(directory, _load(directory / str(serial), serial))
            except OSError as e:
                raise files.unreadable(directory, e) from e
            except UserError:
                if before == serial:
                    raise
                before = serial  # another process may have changed them meanwhile: only if not it is an error
        return None

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
        state = _checked(0, ca_pem, node_pem, node_key_pem, sealing_private, etcd)
        return cls(directory, replace(state, serial=generations.save(directory, state.files(), 0)))

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
            if (new.identity.cluster, new.identity.name) != (old.identity.cluster, old.identity.name):
                raise UserError("this certificate is another node's", reason="bad-credentials")
            self._state = replace(new, serial=generations.save(self.directory, new.files(), old.serial))
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
        here = self.directory / generations.CURRENT
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
        data = files.read_private(path, repair=True, hint="remove it, and join anew")
        if data is not None:
            found = [m.group() for m in _KEY.finditer(data)]
            try:
                if len(found) != 3:
                    raise UserError("it should hold three keys")
                certificates.load_key(found[0])
                certificates.load_key(found[1])
                return cls(found[0], found[1], sealing.from_pem(found[2]))
            except UserError as e:
                raise files.damaged(path, e.message, "remove it, and join anew") from None
        keys = (certificates.key_pem(certificates.new_key()), certificates.key_pem(certificates.new_key()))
        private = sealing.new_sealing_key()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.close_to_others(directory)
            files.write_private(path, keys[0] + keys[1] + sealing.to_pem(private))
        except OSError as e:
            raise files.unwritable(path, e) from e
        return cls(*keys, private)

    @staticmethod
    def are_in(directory: Path) -> bool:
        """Whether there are some: this node has asked to be let in, and has had no answer yet."""
        return (directory / PENDING).exists()

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
        data = files.read_private(path, repair=False, hint=files.LOGIN)
        if data is None:
            raise UserError(f"there is no file {path}", hint=files.LOGIN, reason="no-credentials")
        chain: list[bytes] = []
        authorities: list[bytes] = []
        try:
            for one in certificates.split_pem(data):
                certificate = certificates.load_certificate(one)
                # An authority certified by its predecessor belongs to the chain that is shown to others.
                is_believed = certificates.is_authority(certificate) and certificate.issuer == certificate.subject
                (authorities if is_believed else chain).append(one)
            keys = _KEY.findall(data)
            if len(keys) != 1 or not chain or not authorities:
                raise UserError("it should hold a key, its certificate and the certificates of the cluster")
            return cls.create(b"".join(authorities), b"".join(chain), keys[0])
        except UserError as e:
            raise files.damaged(path, e.message, files.LOGIN) from None

    def to_file(self, path: Path, remarks: str = "") -> None:
        """Write them, whole or not at all. `remarks`: lines that begin with ``#``, put first; for whoever reads them.

        Raises:
            UserError: they cannot be written.
        """
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            parts = (self.key_pem, self.cert_pem, self.ca_pem)
            files.write_private(path, remarks.encode() + b"".join(p.rstrip() + b"\n" for p in parts))
        except OSError as e:
            raise files.unwritable(path, e) from e


def _load(directory: Path, serial: int) -> _State:
    found = {n: files.read_private(directory / n, repair=True, hint=files.RESTORE) for n in (*_ALWAYS, *_ETCD)}
    missing = [n for n in _ALWAYS if found[n] is None]
    if not missing and any(found[n] is not None for n in _ETCD):
        missing = [n for n in _ETCD if found[n] is None]
    if missing:
        raise files.damaged(directory / missing[0], "it is missing")
    ca_pem, node_pem, key_pem, private, *etcd = (data for data in found.values() if data is not None)
    try:
        return _checked(serial, ca_pem, node_pem, key_pem, private, EtcdPems(*etcd) if etcd else None)
    except UserError as e:
        raise files.damaged(directory, e.message) from None


def _checked(
    serial: int, ca_pem: bytes, node_pem: bytes, node_key_pem: bytes, sealing_private: bytes, etcd: EtcdPems | None
) -> _State:
    identity = _fit(ca_pem, node_pem, node_key_pem, "node")
    sealing.public_of(sealing_private)
    if etcd is not None:
        _fit_bundle(etcd.ca_pem, identity.cluster, "etcd")
        _fit_key(etcd.cert_pem, etcd.key_pem)
    return _State(serial, ca_pem, node_pem, node_key_pem, sealing_private, etcd, identity)


def _fit(ca_pem: bytes, cert_pem: bytes, key_pem: bytes, kind: str) -> certificates.Identity:
    """Whom the certificate names. It may have expired, and its authority may be believed no more: others decide."""
    identity = certificates.describe(cert_pem)
    if identity.kind != kind:
        raise UserError(f"this is the certificate of a {identity.kind}, not of a {kind}", reason="bad-credentials")
    _fit_key(cert_pem, key_pem)
    _fit_bundle(ca_pem, identity.cluster, "cluster")
    return identity


def _fit_bundle(ca_pem: bytes, cluster: str, kind: Literal["cluster", "etcd"]) -> None:
    bundle = certificates.split_pem(ca_pem)
    if not bundle or any(certificates.cluster_of(one, kind) != cluster for one in bundle):
        raise UserError(f"the {kind} authorities' certificates are not this cluster's", reason="bad-credentials")


def _fit_key(cert_pem: bytes, key_pem: bytes) -> None:
    if certificates.authority_hash(cert_pem) != certificates.public_key_hash(certificates.load_key(key_pem)):
        raise UserError("the certificate is not for this key", reason="bad-credentials")
