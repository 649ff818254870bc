"""Keys of labels and secrets of tasks: the calls of service Trust that `enroll` and `access` leave to this module.

Nothing here ever sees what is in a secret: the caller has sealed it, and the node that runs the task opens it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from spinetta import confidential, keys, names, trustcodec, txn
from spinetta.access import MEMBERS, LabelKey, SecretRecord
from spinetta.errors import CorruptRecord, Denied, NotFound, OutcomeUnknown, StoreUnavailable, UserError
from spinetta.match import uncleared
from spinetta.model import Revision
from spinetta.node.labeldesk import LABELS_MAX, DirectDesk, state_to_pb
from spinetta.node.port import NodePort
from spinetta.node.services.desk import Asked
from spinetta.node.services.sealing import check_fresh, label_keys, no_key, open_cluster
from spinetta.rights import Call, CallerKind
from spinetta.v1 import trust_pb2 as pb

NAMED_MAX = 8  # labels in a line of the audit log
PAGE_SECRETS = 50  # 3.5 MB of the store at the most in one message
LISTED_MAX = 5000  # of all owners, without content: about 1 MB
TRIES_MAX = 5


class SecretDesk:
    """Answers the calls; `Asked` says who asks, and checks what it may."""

    def __init__(self, port: NodePort) -> None:
        self._port = port
        self._labels = DirectDesk(port.store, port.name)

    # --- keys of labels --------------------------------------------------------------------------------------------

    async def get_label_keys(self, asked: Asked, request: pb.GetLabelKeysRequest) -> pb.GetLabelKeysResponse:
        """Public keys to seal to: of the labels named, or of all that the caller is cleared for.

        Raises:
            Denied: not cleared for one of them.
            UserError: there is no such key.
        """
        self._check_secured("clearance labels", "labels")
        labels = sorted(set(request.labels) or {*asked.caller.clearances, MEMBERS})
        if len(labels) > LABELS_MAX:
            raise UserError(f"{len(labels)} labels", field="labels", hint=f"at most {LABELS_MAX}", reason="too-large")
        for label in labels:
            names.check_clearance(label, "labels")
        asked.subject = f"labels {', '.join(labels[:NAMED_MAX])}"
        await asked.check(clearance=uncleared(labels, ()))
        known = await label_keys(self._port.store, labels)
        answer = pb.GetLabelKeysResponse()
        for label in labels:
            key = known.get(label)
            if key is None:
                if request.labels:
                    raise no_key(label, "labels")
                continue
            latest = key.latest
            answer.keys.add(
                label=label, generation=latest.number, public_key=latest.public_key, nodes=len(latest.wraps)
            )
        return answer

    async def get_label_states(self, asked: Asked, request: pb.GetLabelStatesRequest) -> pb.GetLabelStatesResponse:
        """For a node: how the keys of its labels stand, and who should have them.

        Raises:
            Denied: it is no node.
        """
        del request
        self._check_node(asked)
        states = await self._labels.states(sorted({*asked.caller.clearances, MEMBERS}))
        return pb.GetLabelStatesResponse(states=[state_to_pb(s) for s in states])

    async def update_label_key(self, asked: Asked, request: pb.UpdateLabelKeyRequest) -> pb.UpdateLabelKeyResponse:
        """For a node: a new record of a label's key.

        Raises:
            Denied: it is no node, or may not make it that.
        """
        self._check_node(asked)
        names.check_clearance(request.key.label, "key.label")
        try:
            key = trustcodec.from_pb(LabelKey, request.key)
        except ValueError as e:
            raise UserError(f"not the key of a label: {e}", field="key") from None
        asked.subject = f"label {key.label}"
        changed = await self._labels.update_for(asked.caller.name, key, Revision(request.revision))
        return pb.UpdateLabelKeyResponse(changed=changed)

    # --- secrets ---------------------------------------------------------------------------------------------------

    async def put_secret(self, asked: Asked, request: pb.PutSecretRequest) -> pb.PutSecretResponse:
        """Store a secret, in the place of one of that name.

        Raises:
            Denied: it is not the caller's, or has labels that the caller is not cleared for.
            UserError: it cannot be taken; reason ``stale-label-key``: seal it again.
        """
        self._check_secured("secrets", "secret")
        secret = trustcodec.from_pb(SecretRecord, request.secret)
        owner, name = self._whose(asked, secret.owner), secret.name
        names.check_secret_name(name, "secret.name")
        labels = tuple(sorted(set(secret.labels)))
        if not labels or labels != secret.labels:
            raise UserError(
                "a secret needs labels, sorted, each once", field="secret.labels", hint=f"{MEMBERS!r} if no other"
            )
        confidential.check_clearance(labels, "secret.labels")
        confidential.check_envelope(secret.envelope, labels, confidential.SEALED_SECRET_BYTES_MAX, "secret.envelope")
        asked.subject = f"secret {owner}/{name}"
        await asked.check(owner=owner, clearance=uncleared(labels, ()))
        check_fresh(secret.envelope, await label_keys(self._port.store, labels), "secret.envelope")
        where = keys.secret(owner, name)
        for _ in range(TRIES_MAX):
            entry = (await self._port.store.read([where])).entries[where]
            if entry is None:
                await self._check_room(owner)
            record = replace(
                secret,
                owner=owner,
                version=_version(entry.value) + 1 if entry is not None else 1,
                created_ms=self._port.wall_ms(),
                created_by=asked.caller.title,
            )
            seen = txn.RevisionIs(where, entry.modified if entry is not None else Revision(0))
            body = txn.Txn(when=(*asked.caller.guards, seen), then=(txn.Put(where, trustcodec.encode(record)),))
            done = await self._port.store.commit(body)
            if isinstance(done, txn.Committed):
                asked.revision = done.revision
                return pb.PutSecretResponse(version=record.version)
            await asked.again()
        raise StoreUnavailable(f"secret {name} is being changed by others all the time")

    async def list_secrets(self, asked: Asked, request: pb.ListSecretsRequest) -> pb.ListSecretsResponse:
        """Secrets without what is in them: of an owner, or of all that the caller may see."""
        self._check_secured("secrets", "owner")
        names.check_owner(request.owner, "owner")
        if request.owner:
            await asked.check(owner=request.owner)
            owners: Iterable[str] = (request.owner,)
        elif asked.may(Call.SECRETS, owner=""):  # of anybody
            owners = ("",)
        else:
            await asked.check()
            owners = sorted({asked.caller.name, *asked.caller.projects})
        answer = pb.ListSecretsResponse()
        for owner in owners:
            await self._list(keys.secrets_of(owner) if owner else keys.SECRET, answer)
        return answer

    async def _list(self, prefix: str, answer: pb.ListSecretsResponse) -> None:
        after = ""
        while len(answer.secrets) < LISTED_MAX:
            page = await self._port.store.list(prefix, after=after, limit=PAGE_SECRETS)
            for entry in page.entries:
                try:
                    message = trustcodec.to_pb(trustcodec.decode(SecretRecord, entry.value))
                except CorruptRecord:
                    continue
                message.ClearField("envelope")
                answer.secrets.append(message)
            if not page.more or not page.entries:
                return
            after = page.entries[-1].key

    async def remove_secret(self, asked: Asked, request: pb.RemoveSecretRequest) -> pb.RemoveSecretResponse:
        """Forget a secret: tasks that ask for it fail to start.

        Raises:
            NotFound: there is none.
            Denied: it is not the caller's.
        """
        self._check_secured("secrets", "owner")
        owner = self._whose(asked, request.owner)
        names.check_secret_name(request.name, "name")
        asked.subject = f"secret {owner}/{request.name}"
        await asked.check(owner=owner)
        where = keys.secret(owner, request.name)
        unsure = False
        for _ in range(TRIES_MAX):
            entry = (await self._port.store.read([where])).entries[where]
            if entry is None:
                if unsure:
                    return pb.RemoveSecretResponse()
                raise NotFound(f"there is no secret {request.name} of {owner}", field="name")
            body = txn.Txn(
                when=(*asked.caller.guards, txn.RevisionIs(where, entry.modified)), then=(txn.Delete(where),)
            )
            try:
                done = await self._port.store.commit(body)
            except OutcomeUnknown:
                unsure = True
                continue
            if isinstance(done, txn.Committed):
                asked.revision = done.revision
                return pb.RemoveSecretResponse()
            await asked.again()
        raise StoreUnavailable(f"secret {request.name} is being changed by others all the time")

    # --- checks ----------------------------------------------------------------------------------------------------

    def _check_secured(self, what: str, field: str) -> None:
        if self._port.credentials is None:
            raise open_cluster(what, field)

    def _check_node(self, asked: Asked) -> None:
        self._check_secured("clearance labels", "")
        if asked.caller.kind is not CallerKind.NODE:
            raise Denied(f"{asked.caller.title} may not keep the keys of labels", hint="this is for nodes")

    def _whose(self, asked: Asked, owner: str) -> str:
        """The owner named, or the caller; a secret is always somebody's."""
        names.check_owner(owner, "owner")
        whose = owner or (asked.caller.name if asked.caller.kind is CallerKind.USER else "")
        if not whose:
            raise UserError("whose secret?", field="owner", hint="name its owner")
        return whose

    async def _check_room(self, owner: str) -> None:
        page = await self._port.store.list(
            keys.secrets_of(owner), limit=confidential.SECRETS_PER_OWNER_MAX, keys_only=True
        )
        if len(page.entries) >= confidential.SECRETS_PER_OWNER_MAX:
            raise UserError(
                f"{owner} has {len(page.entries)} secrets",
                field="secret.name",
                hint=f"at most {confidential.SECRETS_PER_OWNER_MAX}; remove some",
                reason="too-many",
            )


def _version(value: bytes) -> int:
    try:
        return trustcodec.decode(SecretRecord, value).version
    except CorruptRecord:
        return 0  # a bad record is replaced like any other
