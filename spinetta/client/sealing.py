"""Sealing on the caller's side: what a labelled task runs leaves this process only for who is cleared for it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spinetta import confidential, names, payload, trustcodec
from spinetta.access import MEMBERS, SecretRecord
from spinetta.client.channels import Nodes
from spinetta.errors import InvariantViolation, UserError
from spinetta.model import TaskId, TaskSpec
from spinetta.trust.envelope import Box, LabelPublicKey, seal_envelope
from spinetta.v1 import trust_pb2 as trust

STALE = "stale-label-key"  # sealed to a key that has been replaced meanwhile
TRIES_MAX = 3  # a key is replaced when a node loses its clearance, not thrice in a row
SEALED_PER_TURN = 40  # before others get a turn: about 5 ms
KEPT_MAX = 4096  # boxes of tasks submitted by this process
KEPT_BYTES_MAX = 64 << 20


@dataclass(frozen=True, slots=True)
class _Sealed:
    clear: TaskSpec
    box: Box
    spec: TaskSpec


class Sealer:
    """Seals specifications to the keys of their labels.

    Each is sealed once: submitted again, it is the same bytes, so that the cluster can tell that it is the same task.
    Another process that submits the same command under the same id is refused, for what is sealed cannot be compared.
    """

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._kept: OrderedDict[TaskId, _Sealed] = OrderedDict()
        self._kept_bytes = 0

    async def keys(self, labels: Iterable[str]) -> list[LabelPublicKey]:
        """The public keys to seal to now.

        Raises:
            UserError: a label has no key, or is not for this caller.
        """
        wanted = sorted(set(labels))
        request = trust.GetLabelKeysRequest(labels=wanted)
        answer = await self._nodes.trust(lambda stub: stub.GetLabelKeys, request)
        found = {k.label: LabelPublicKey(k.label, k.generation, k.public_key) for k in answer.keys}
        for label in wanted:
            if label not in found:
                raise UserError(f"there is no key for label {names.quoted(label)}", field="clearance")
        return [found[label] for label in wanted]

    async def seal(self, specs: Sequence[TaskSpec], *, anew: bool = False) -> list[TaskSpec]:
        """The specifications as they may be sent; those without a label, or sealed already, as they are.

        `anew`: keys have been replaced: the same content with shares for the present ones.

        Raises:
            UserError: as `keys`.
        """
        todo = [s for s in specs if s.clearance and s.sealed is None]
        fresh = [s for s in todo if anew or self._as_kept(s) is None]
        if fresh:
            keys = {k.label: k for k in await self.keys({label for s in fresh for label in s.clearance})}
            for i, spec in enumerate(fresh):
                kept = self._as_kept(spec)
                purpose = payload.task_purpose(spec.id, spec.clearance)
                box = kept.box if kept is not None else Box.of(payload.encode_payload(spec), purpose)
                envelope = box.envelope([keys[label] for label in spec.clearance])
                self._keep(_Sealed(spec, box, payload.hollow(spec, envelope)))
                if i % SEALED_PER_TURN == SEALED_PER_TURN - 1:
                    await asyncio.sleep(0)
        sealed = {s.id: k.spec for s in todo if (k := self._as_kept(s)) is not None}
        if len(sealed) != len(todo):
            raise InvariantViolation("a sealed task was let go before it was submitted")
        return [sealed.get(s.id, s) for s in specs]

    def _as_kept(self, spec: TaskSpec) -> _Sealed | None:
        kept = self._kept.get(spec.id)
        return kept if kept is not None and kept.clear == spec else None

    def _keep(self, sealed: _Sealed) -> None:
        old = self._kept.pop(sealed.clear.id, None)
        if old is not None:
            self._kept_bytes -= len(old.box.ciphertext)
        self._kept[sealed.clear.id] = sealed
        self._kept_bytes += len(sealed.box.ciphertext)

    def trim(self) -> None:
        """Let go of the oldest, once nothing of a submit is under way."""
        while len(self._kept) > KEPT_MAX or self._kept_bytes > KEPT_BYTES_MAX:
            _, old = self._kept.popitem(last=False)
            self._kept_bytes -= len(old.box.ciphertext)

    # --- secrets -------------------------------------------------------------------------------------------------

    async def put_secret(self, name: str, content: bytes, *, owner: str = "", labels: Sequence[str] = ()) -> int:
        """Store a secret for tasks, in the place of one of that name; its version.

        Args:
            name: what tasks ask for.
            content: at most 64 KiB; leaves this process sealed only.
            owner: whose tasks get it: oneself when empty, or a project.
            labels: tasks must carry all of these to get it. None: any task of the owner, on any approved node.

        Raises:
            UserError: names the argument; `Denied` for what is not one's own.
        """
        names.check_secret_name(name, "name")
        names.check_owner(owner, "owner")
        confidential.check_clearance(labels, "labels")
        if len(content) > confidential.SECRET_BYTES_MAX:
            raise UserError(
                f"the secret has {len(content)} bytes",
                field="content",
                hint=f"at most {confidential.SECRET_BYTES_MAX}; put data in files",
                reason="too-large",
            )
        whose = owner or (await self._nodes.trust(lambda stub: stub.WhoAmI, trust.WhoAmIRequest())).name
        sealed_to = tuple(sorted(set(labels))) or (MEMBERS,)
        for _ in range(TRIES_MAX - 1):
            try:
                return await self._put(whose, name, content, sealed_to)
            except UserError as e:
                if e.reason != STALE:
                    raise
        return await self._put(whose, name, content, sealed_to)

    async def _put(self, owner: str, name: str, content: bytes, labels: tuple[str, ...]) -> int:
        purpose = payload.secret_purpose(owner, name, labels)
        envelope = seal_envelope(content, await self.keys(labels), purpose)
        request = trust.PutSecretRequest(secret=trustcodec.to_pb(SecretRecord(owner, name, labels, envelope)))
        return (await self._nodes.trust(lambda stub: stub.PutSecret, request, writes=True)).version
