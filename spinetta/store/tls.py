"""The certificate files as a client of etcd uses them: read anew for each connection, because they are renewed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from spinetta.errors import StoreUnavailable
from spinetta.store.process import EtcdTls

TlsSource = Callable[[], EtcdTls]
"""Where the files are, asked for each connection."""

# What every etcd certificate is for. Members are dialled at addresses, which their certificates need not name.
SERVER_NAME = "etcd.spinetta.internal"
FILE_BYTES_MAX = 256 << 10  # a certificate has about 1 KB; a bundle holds two CAs while they are exchanged


@dataclass(frozen=True, slots=True)
class Material:
    """What the files held at one moment. Certificate and key fit each other.

    Attributes:
        not_before_s, not_after_s: when the certificate is good, seconds since 1970.
        origin: the certificate's file, to be named in messages.
    """

    ca_pem: bytes
    cert_pem: bytes
    key_pem: bytes = field(repr=False)
    not_before_s: float
    not_after_s: float
    origin: Path

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel."""
        return grpc.ssl_channel_credentials(
            root_certificates=self.ca_pem, private_key=self.key_pem, certificate_chain=self.cert_pem
        )

    def trouble(self, now_s: float) -> str:
        """Why no connection can come about with these, if they are the reason; else empty."""
        if self.not_before_s <= now_s < self.not_after_s:
            return ""
        early = now_s < self.not_before_s
        at = datetime.fromtimestamp(self.not_before_s if early else self.not_after_s, UTC).isoformat(timespec="seconds")
        if early:
            return f"the etcd certificate in {self.origin} is good only from {at} on: see to this machine's clock"
        return f"the etcd certificate in {self.origin} ended at {at}"


def read(tls: EtcdTls) -> Material:
    """Read the files.

    Raises:
        StoreUnavailable: they cannot be read or do not fit each other, as for a moment while they are being replaced.
    """
    found = []
    for path in (tls.ca_file, tls.cert_file, tls.key_file):
        try:
            with path.open("rb") as file:
                found.append(file.read(FILE_BYTES_MAX))
        except OSError as error:
            raise StoreUnavailable(f"no connection to etcd without {path}: {error.strerror}") from error
    ca_pem, cert_pem, key_pem = found
    try:
        certificate = x509.load_pem_x509_certificate(cert_pem)
        fits = load_pem_private_key(key_pem, None).public_key() == certificate.public_key()
        x509.load_pem_x509_certificates(ca_pem)
    except (ValueError, TypeError) as error:  # TypeError: a key under a password
        # Without the cause's text: it may quote what it could not parse.
        raise StoreUnavailable(
            f"{tls.ca_file}, {tls.cert_file} or {tls.key_file} holds something else than certificates and a key"
        ) from error
    if not fits:
        raise StoreUnavailable(f"the certificate in {tls.cert_file} is not for the key in {tls.key_file}")
    since_s, until_s = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    return Material(ca_pem, cert_pem, key_pem, since_s, until_s, tls.cert_file)
