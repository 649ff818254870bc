"""Which kind of cluster this node is of, and with what credentials: those it has, or the first ones of its life."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from spinetta import names
from spinetta.access import NodeRole
from spinetta.config import Settings
from spinetta.errors import UserError
from spinetta.node.enlist import enlist
from spinetta.node.founding import ADMIN_FILE, found_cluster
from spinetta.store.identity import Identity
from spinetta.trust import certificates
from spinetta.trust.credentials import NodeCredentials, PendingKeys

log = logging.getLogger("spinetta.node")

TRUST_DIR = "trust"
TOKEN_BYTES_MAX = 4096  # a token has about 150 characters


async def admit(settings: Settings, data_dir: Path, known: Identity | None) -> NodeCredentials | None:
    """This node's credentials; None in an open cluster, which speaks plain text on loopback.

    A node without any gets its first ones: with a join token from the cluster it joins, or by founding a secured
    cluster. A node that has been part of a cluster stays what it is.

    Raises:
        UserError: the settings and what is on disk contradict each other, or the cluster does not let it in.
    """
    directory = data_dir / TRUST_DIR
    found = NodeCredentials.load(directory)
    if found is not None:
        _check_same(settings, data_dir, found)
        if found.role is NodeRole.WORKER and certificates.expiry(found.node_pem)[1] <= time.time():
            return await _join_again(settings, found)
        return found
    off_loopback = [a for a in (settings.address, *settings.peers) if not names.is_loopback(a)]
    token = _token(settings)
    if known is not None and known.cluster_id:
        if settings.tls == "on" or token or off_loopback:
            raise UserError(
                f"this node belongs to an open cluster (its data is in {data_dir}), which speaks plain text on "
                "loopback only",
                field="node.tls",
                hint="found a secured cluster with another --data-dir, and submit what is needed there",
                reason="open-cluster",
            )
        return None
    if settings.tls != "on" and not token and not off_loopback:
        return None
    if not settings.peers:
        if token:
            raise UserError(
                "a join token is for a cluster that exists", field="node.peers", hint="name one of its nodes: --peers"
            )
        made = await found_cluster(directory, settings.name, settings.address)
        log.warning("a secured cluster is founded; its administrator's credentials: %s", data_dir / ADMIN_FILE)
        return made
    if not token and PendingKeys.are_in(directory):
        raise UserError(
            "this node has asked to be let in before, and was stopped before it had the answer",
            field="node.token",
            hint="the same command with the same token goes on from there, also when the node has been approved "
            "meanwhile and the token is used up",
            reason="no-token",
        )
    if not token:
        raise UserError(
            "a secured cluster lets in only who has a join token",
            field="node.token",
            hint="an administrator makes one: spinetta token create --role worker; give it with --token-file",
            reason="no-token",
        )
    return await enlist(
        settings.peers, token, name=settings.name, address=settings.address, directory=directory, say=log.warning
    )


async def _join_again(settings: Settings, found: NodeCredentials) -> NodeCredentials:
    """A worker that was off until its certificate had ended is let in again as the node that it was, by a token."""
    token = _token(settings)
    if not token or not settings.peers:
        raise UserError(
            f"the certificate of node {found.name} has ended while it was off",
            field="node.token",
            hint="join again, with --peers and a token (spinetta token create --role worker): it stays the same node",
            reason="expired",
        )
    return await enlist(
        settings.peers,
        token,
        name=settings.name,
        address=settings.address,
        directory=found.directory,
        say=log.warning,
        own=found,
    )


def _check_same(settings: Settings, data_dir: Path, found: NodeCredentials) -> None:
    if found.name != settings.name:
        raise UserError(
            f"the credentials in {data_dir} are of node {found.name}, not {settings.name}",
            field="node.name",
            hint=f"use --name {found.name}, or another --data-dir",
            reason="foreign-data",
        )
    if settings.tls == "off":
        raise UserError(
            f"this node belongs to a secured cluster (its credentials are in {data_dir})",
            field="node.tls",
            hint="leave --tls away, or use another --data-dir",
            reason="secured-cluster",
        )


def _token(settings: Settings) -> str:
    if not settings.token_file:
        return settings.token.strip()
    path = Path(settings.token_file)
    try:
        with path.open("rb") as file:
            data = file.read(TOKEN_BYTES_MAX + 1)
        text = data.decode("ascii").strip()
    except OSError as e:
        raise UserError(f"the token file {path} cannot be read: {e.strerror}", field="node.token_file") from e
    except UnicodeDecodeError:
        text = ""
    if not text or len(data) > TOKEN_BYTES_MAX:
        raise UserError(
            f"{path} holds no join token", field="node.token_file", hint="make one: spinetta token create --role worker"
        )
    return text
