"""Certificates as answers: signed by the cluster's present authority, with the bundles to believe."""

from __future__ import annotations

from spinetta.access import NodeRole
from spinetta.errors import UserError
from spinetta.node.keyring import Keyring, Known, Signer
from spinetta.node.port import NodePort
from spinetta.node.services.desk import ask_a_voter
from spinetta.v1 import trust_pb2 as pb


def node_certificates(
    keyring: Signer,
    known: Known,
    *,
    name: str,
    role: NodeRole,
    address: str,
    csr: bytes,
    etcd_csr: bytes,
    now_s: float,
    lifetime_s: float,
) -> pb.Certificates:
    """A node's certificate, and its etcd's if it may be a voter and has asked for one.

    Raises:
        UserError: a request or the address cannot be used.
    """
    made = _bundle(keyring, known)
    made.certificate = keyring.sign_node(known, csr, name=name, role=role, now_s=now_s, lifetime_s=lifetime_s)
    if role is NodeRole.VOTER:
        made.etcd_ca_bundle = known.etcd.bundle
        made.etcd_generation = known.etcd.generation
        if etcd_csr:
            made.etcd_certificate = keyring.sign_etcd(
                known, etcd_csr, name=name, address=address, now_s=now_s, lifetime_s=lifetime_s
            )
    return made


def user_certificates(
    keyring: Signer, known: Known, *, name: str, csr: bytes, now_s: float, lifetime_s: float
) -> pb.Certificates:
    """A person's certificate.

    Raises:
        UserError: the request cannot be used.
    """
    made = _bundle(keyring, known)
    made.certificate = keyring.sign_user(known, csr, name=name, now_s=now_s, lifetime_s=lifetime_s)
    return made


def _bundle(keyring: Signer, known: Known) -> pb.Certificates:
    return pb.Certificates(cluster=keyring.cluster, ca_bundle=known.cluster.bundle, generation=known.cluster.generation)


def needs_keyring(keyring: Keyring | None, port: NodePort) -> Keyring:
    """The keyring.

    Raises:
        UserError: this node has none: it is a worker, or the cluster is an open one.
    """
    if keyring is not None:
        return keyring
    if port.credentials is None:
        raise open_cluster()
    raise ask_a_voter(port)


def open_cluster() -> UserError:
    """What is asked for exists in secured clusters only."""
    return UserError(
        "this cluster is an open one: there are no certificates, tokens or rights in it",
        hint="found a secured cluster: spinetta node join --tls on",
        reason="open-cluster",
    )
