"""What proves who a client is: a credentials file, or a bearer token beside the authorities to believe.

A credentials file is `trust.credentials.UserCredentials` with a few remarks before it::

    # nodes: 10.0.0.5:7220,10.0.0.6:7220
    # bearer-file: /run/user/1000/oidc-token
    -----BEGIN PRIVATE KEY-----
    …

Remarks name the nodes that were told at login, so that no command needs `--node`, and the file of a bearer token, for
those who have no certificate; such a file holds the authorities' certificates only.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from spinetta import names
from spinetta.errors import Denied, UserError
from spinetta.trust import certificates
from spinetta.trust.credentials import UserCredentials, write_private
from spinetta.trust.dial import Dialer, Pems

Source: TypeAlias = "str | os.PathLike[str] | UserCredentials"
Bearer: TypeAlias = "str | os.PathLike[str] | Callable[[], str]"

FILE_BYTES_MAX = certificates.PEM_BYTES_MAX
BEARER_BYTES_MAX = 16 << 10  # gRPC's limit for all metadata of a call is 16 KiB by default
NODES_MAX = 16  # one that answers is enough
LOGIN = "log in with: spinetta login"
_BEGIN = "-----BEGIN "


@dataclass(frozen=True, slots=True)
class Stored:
    """What a credentials file holds.

    Attributes:
        credentials: None in a file for a bearer token.
        ca_pem: the authorities to believe.
        nodes: addresses that were told at login; may be empty.
        bearer_file: where the bearer token is; empty: there is a certificate.
    """

    ca_pem: bytes
    credentials: UserCredentials | None = None
    nodes: tuple[str, ...] = ()
    bearer_file: str = ""

    @property
    def cluster(self) -> str:
        """The trust domain."""
        return certificates.cluster_of(certificates.split_pem(self.ca_pem)[0])


def default_path() -> Path:
    """``~/.config/spinetta/credentials.pem``, whether or not it is there."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser())
    return home / "spinetta" / "credentials.pem"


def load(path: Path) -> Stored:
    """Read a credentials file.

    Raises:
        UserError: there is none, others may read it, or it is damaged.
    """
    text = _read(path, FILE_BYTES_MAX, "credentials")
    remarks = _remarks(text)
    nodes = tuple(names.check_address(a, "credentials") for a in remarks.get("nodes", "").split(",") if a.strip())
    bearer_file = remarks.get("bearer-file", "")
    if "PRIVATE KEY-----" in text or not bearer_file:
        credentials = UserCredentials.from_file(path)
        return Stored(credentials.ca_pem, credentials, nodes[:NODES_MAX])
    authorities = certificates.split_pem(text.encode())
    try:
        for one in authorities:
            certificates.cluster_of(one)
    except UserError as e:
        raise UserError(f"{path} is damaged: {e.message}", field="credentials", hint=LOGIN) from None
    if not authorities:
        raise UserError(f"{path} holds no certificate", field="credentials", hint=LOGIN)
    return Stored(b"".join(authorities), None, nodes[:NODES_MAX], bearer_file)


def save(path: Path, stored: Stored) -> None:
    """Write a credentials file, whole or not at all, for its owner alone.

    Raises:
        UserError: it cannot be written.
    """
    remarks = ""
    if stored.nodes:
        remarks += f"# nodes: {','.join(stored.nodes[:NODES_MAX])}\n"
    if stored.bearer_file:
        remarks += f"# bearer-file: {stored.bearer_file}\n"
    if stored.credentials is not None:
        stored.credentials.to_file(path, remarks)
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(path, remarks.encode() + stored.ca_pem.rstrip() + b"\n")
    except OSError as e:
        raise UserError(f"{path} cannot be written: {e.strerror}", field="credentials", hint="--credentials") from e


class CredentialsFile:
    """A credentials file that is read again when it has changed, e.g. after a renewal by another program."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = _stamp(path)
        self.stored = load(path)

    def pems(self) -> Pems:
        """Authorities, certificate and key as they are now; while the file cannot be read, as they were."""
        self._look()
        own = self.stored.credentials
        assert own is not None  # noqa: S101 - `dialer` asks only then
        return own.ca_pem, own.cert_pem, own.key_pem

    def _look(self) -> None:
        try:
            now = _stamp(self.path)
            if now != self._seen:
                found = load(self.path)
                if found.credentials is not None:
                    self.stored = found
                self._seen = now
        except UserError:  # removed or half-way through an edit by hand: what we have may still be good
            return


def check_private(path: Path) -> None:
    """Refuse a bearer token's file that is to be kept in use and that others may read.

    Raises:
        UserError: they may, or it cannot be looked at.
    """
    try:
        mode = path.stat().st_mode
    except OSError as e:
        raise _unreadable(path, e, "bearer_file") from e
    if stat.S_ISREG(mode) and mode & 0o077:
        raise UserError(
            f"others may read {path}", field="bearer_file", hint=f"chmod 600 {path}; whoever read the token can use it"
        )


def bearer_reader(path: Path) -> Callable[[], str]:
    """Reads a bearer token's file at each call: whoever renews it puts a new one there."""

    def read() -> str:
        return check_bearer(_read(path, BEARER_BYTES_MAX, "bearer_file"), str(path))

    return read


def check_bearer(text: str, where: str) -> str:
    """The token, without white space around it.

    Raises:
        UserError: it is none.
    """
    token = text.strip()
    if not token or not token.isascii() or any(c.isspace() or not c.isprintable() for c in token):
        raise UserError(
            f"{where} holds no bearer token",
            field="bearer_file",
            hint="one word: the token as the issuer gave it",
            reason="unauthenticated",
        )
    return token


def make_dialer(credentials: Source | None, bearer: Bearer | None) -> Dialer:
    """How to reach nodes: with a certificate, with a bearer token, or (with neither) in plain text on loopback.

    With both, the bearer token says who is calling, and the credentials only which authorities to believe.

    Raises:
        UserError: what is named cannot be used.
    """
    if credentials is None:
        if bearer is not None:
            raise UserError(
                "a bearer token alone does not tell which authorities to believe",
                field="bearer_file",
                hint="spinetta login --bearer-file FILE --keep-bearer saves them; or name them with --credentials",
            )
        return Dialer.open()
    if isinstance(credentials, UserCredentials):
        fixed = (credentials.ca_pem, credentials.cert_pem, credentials.key_pem)
        if bearer is not None:
            return Dialer.bearer(credentials.ca_pem, _token(bearer))
        return Dialer.secured(lambda: fixed)
    file = CredentialsFile(Path(credentials))
    if bearer is None and file.stored.credentials is None:
        bearer = file.stored.bearer_file
        check_private(Path(bearer))
    if bearer is not None:
        return Dialer.bearer(file.stored.ca_pem, _token(bearer))
    return Dialer.secured(file.pems)


def _token(bearer: Bearer) -> Callable[[], str]:
    if callable(bearer):
        return bearer
    reader = bearer_reader(Path(bearer))
    reader()  # a missing file is told now, not as a failed call
    return reader


def _remarks(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in text.partition(_BEGIN)[0].splitlines():
        key, colon, value = line.removeprefix("#").partition(":")
        if line.startswith("#") and colon:
            found[key.strip()] = value.strip()
    return found


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError as e:
        raise _unreadable(path, e, "credentials") from e
    return found.st_mtime_ns, found.st_ino, found.st_size


def _read(path: Path, bytes_max: int, field: str) -> str:
    """A small text file of ours alone."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(bytes_max + 1)
    except OSError as e:
        raise _unreadable(path, e, field) from e
    if field == "credentials" and stat.S_ISREG(mode) and mode & 0o077:
        raise UserError(f"others may read {path}", field=field, hint=f"chmod 600 {path}, and log in anew")
    if len(data) > bytes_max:
        raise UserError(f"{path} is larger than {bytes_max >> 10} KiB", field=field, hint="is it the right file?")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text", field=field, hint="is it the right file?") from None


def _unreadable(path: Path, error: OSError, field: str) -> UserError:
    if isinstance(error, FileNotFoundError):
        return Denied(f"there is no file {path}", field=field, hint=LOGIN, reason="unauthenticated")
    return UserError(f"{path} cannot be read: {error.strerror}", field=field, hint="check its permissions")


def check_reachable(addresses: Sequence[str], dialer: Dialer) -> None:
    """Refuse addresses off loopback for whom has no credentials: plain text is not spoken there.

    Raises:
        Denied: with reason ``unauthenticated``.
    """
    if dialer.is_secured:
        return
    for address in addresses:
        if not names.is_loopback(address):
            raise Denied(
                f"you have no credentials for the cluster at {names.quoted(address)}, and plain text is not spoken off "
                "loopback",
                hint=f"spinetta login --node {address} --token-file FILE; or name those you have with --credentials",
                reason="unauthenticated",
            )
