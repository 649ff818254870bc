"""Opening what was sealed for this node: the payload and the secrets of a task that it runs.

The private keys of labels are kept in memory only, and only as long as the daemon lives. Which of them this node may
have is decided by whoever wraps them for it; see `labels`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from spinetta import keys, labelkeys, payload, trustcodec, validate
from spinetta.access import Envelope, LabelGeneration, LabelKey, SecretRecord, Wrap
from spinetta.errors import CorruptRecord, SpinettaError, StoreUnavailable, UserError
from spinetta.labelkeys import key_id
from spinetta.match import uncleared
from spinetta.model import NodeId, Reason, TaskSpec
from spinetta.node.trouble import Teller
from spinetta.store.protocol import READ_KEYS_MAX, Store
from spinetta.trust.envelope import KeyMissing, open_envelope
from spinetta.trust.sealing import SealBroken, public_of, seal, unseal

log = logging.getLogger("spinetta.node")

KEPT_MAX = 512  # private keys: 32 bytes each, of more labels and generations than a node ever has
WAIT_S = 20.0  # for a key that is being handed to this node: whoever does it looks every few seconds
AGAIN_S = 0.5


class CannotOpen(SpinettaError):
    """A task cannot be started with what was sealed for it. The message tells nothing of what is in it.

    Attributes:
        reason: what the attempt ended with: the task's fault, or only this node's.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Opened:
    """What a task is started with. `private`: messages about it must not name what it runs."""

    spec: TaskSpec = field(repr=False)
    secrets: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)
    private: bool = False


def wrap_info(label: str, number: int) -> bytes:
    """What the private key of a label's generation is sealed for."""
    return payload.framed("label", label, str(number))


def wrap_for(label: str, number: int, private: bytes, node: str, sealing_key: bytes) -> Wrap:
    """The private key of a label's generation, for one node.

    Raises:
        UserError: its sealing key is none.
    """
    return Wrap(node, seal(private, sealing_key, wrap_info(label, number)), key_id(sealing_key))


class Vault:
    """The keys of labels that this node can open."""

    def __init__(self, store: Store, me: NodeId, sealing_private: Callable[[], bytes]) -> None:
        self._store = store
        self._me = me
        self._sealing_private = sealing_private
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._teller = Teller(log)

    def __repr__(self) -> str:
        return f"<vault of {self._me}: {len(self._kept)} keys>"

    def private_of(self, label: str, number: int) -> bytes | None:
        """A private key that is known here by now."""
        return self._kept.get((label, number))

    def _take(self, label: str, number: int, private: bytes) -> None:
        self._kept[label, number] = private
        while len(self._kept) > KEPT_MAX:
            self._kept.popitem(last=False)

    def learn(self, key: LabelKey) -> None:
        """Open what of a label's key is wrapped for this node."""
        for generation in key.generations:
            known = self._kept.get((key.label, generation.number))
            if known is None or public_of(known) != generation.public_key:
                private = self._unwrapped(key.label, generation)
                if private is not None:
                    self._take(key.label, generation.number, private)

    def _unwrapped(self, label: str, generation: LabelGeneration) -> bytes | None:
        mine = self._sealing_private()
        wanted = key_id(public_of(mine))
        for wrap in generation.wraps:
            if wrap.node != self._me or wrap.key_id != wanted:
                continue
            try:
                private = unseal(wrap.sealed, mine, wrap_info(label, generation.number))
                if public_of(private) == generation.public_key:
                    return private
            except UserError:
                pass
            words = f"what is wrapped for this node as key {generation.number} of label {label} is no such key"
            self._teller.tell(words, logging.WARNING)
        return None

    async def learn_from_store(self, labels: Sequence[str]) -> dict[str, LabelKey]:
        """Look up the keys of labels; their records.

        Raises:
            StoreUnavailable: it cannot be said now.
        """
        found: dict[str, LabelKey] = {}
        wanted = [keys.label(label) for label in labels]
        for entry in (await self._store.read(wanted)).entries.values():
            if entry is None:
                continue
            try:
                key = labelkeys.stored(entry.key.removeprefix(keys.LABEL), entry.value)
            except CorruptRecord as e:
                self._teller.tell(f"{entry.key}: {e}", logging.WARNING)
                continue
            self.learn(key)
            found[key.label] = key
        return found

    # --- opening ---------------------------------------------------------------------------------------------------

    async def open_task(self, spec: TaskSpec) -> Opened:
        """The specification with its payload, and its secrets' files. Waits a little for keys that are on their way.

        Raises:
            CannotOpen: a key is not to be had, a secret does not exist, or something does not open.
        """
        try:
            whole = spec if spec.sealed is None else await self._open_payload(spec)
            return Opened(whole, await self._open_secrets(spec), private=spec.sealed is not None)
        except (StoreUnavailable, UserError) as e:  # the latter: the gateway shows a worker what concerns it only
            raise CannotOpen(Reason.NODE_UNFIT, f"the keys or secrets cannot be read now: {e}") from None

    async def _open_payload(self, spec: TaskSpec) -> TaskSpec:
        assert spec.sealed is not None  # noqa: S101 - the caller looked
        purpose = payload.task_purpose(spec.id, spec.clearance)
        content = await self.open(spec.sealed, spec.clearance, purpose, "what the task runs")
        try:
            whole = payload.with_payload(spec, content)
            validate.check_payload(whole, "")
        except CorruptRecord as e:
            raise CannotOpen(Reason.SPAWN_FAILED, str(e)) from None
        except UserError as e:  # its words may quote the payload
            raise CannotOpen(Reason.SPAWN_FAILED, f"what was sealed cannot be run: its {e.field} is unlawful") from None
        return whole

    async def _open_secrets(self, spec: TaskSpec) -> tuple[tuple[str, bytes], ...]:
        if not spec.secrets:
            return ()
        if not spec.owner:
            raise CannotOpen(Reason.SPAWN_FAILED, "a task without an owner has no secrets")
        where = {name: keys.secret(spec.owner, name) for name, _ in spec.secrets}
        if len(where) > READ_KEYS_MAX:  # nothing that was submitted
            raise CannotOpen(Reason.SPAWN_FAILED, f"{len(where)} secrets: at most {READ_KEYS_MAX}")
        found = (await self._store.read(sorted(set(where.values())))).entries
        contents: dict[str, bytes] = {}
        for name, key in where.items():
            entry = found.get(key)
            if entry is None:
                raise CannotOpen(Reason.SPAWN_FAILED, f"there is no secret {name} of {spec.owner}")
            try:
                record = trustcodec.decode(SecretRecord, entry.value)
            except CorruptRecord:
                raise CannotOpen(Reason.SPAWN_FAILED, f"the record of secret {name} cannot be read") from None
            lacking = uncleared(record.labels, spec.clearance)
            if lacking:
                raise CannotOpen(
                    Reason.SPAWN_FAILED, f"secret {name} is for tasks with clearance {', '.join(lacking)} only"
                )
            # Bound to the key it lies under, not to what the record says of itself.
            purpose = payload.secret_purpose(spec.owner, name, record.labels)
            contents[name] = await self.open(record.envelope, record.labels, purpose, f"secret {name}")
        return tuple((file, contents[name]) for name, file in spec.secrets)

    async def open(self, envelope: Envelope, labels: Sequence[str], purpose: bytes, what: str) -> bytes:
        """The content of an envelope.

        Raises:
            CannotOpen: `what` cannot be opened here, or by anybody.
            StoreUnavailable: the keys cannot be read now.
        """
        if len(labels) > READ_KEYS_MAX:
            raise CannotOpen(Reason.SPAWN_FAILED, f"{what} carries {len(labels)} labels: at most {READ_KEYS_MAX}")
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    try:
                        return open_envelope(envelope, labels, purpose, self.private_of)
                    except KeyMissing:
                        known = await self.learn_from_store(labels)
                    try:
                        return open_envelope(envelope, labels, purpose, self.private_of)
                    except KeyMissing as e:
                        # To give it back would only make this node take it again, and again.
                        if _is_lost(known.get(e.label), e.generation):
                            raise CannotOpen(
                                Reason.SPAWN_FAILED, f"{what} cannot be opened by anybody: its key is lost"
                            ) from None
                        await asyncio.sleep(AGAIN_S)
        except TimeoutError:
            pass
        except SealBroken:
            raise CannotOpen(Reason.SPAWN_FAILED, f"{what} does not open: the seal is broken") from None
        raise CannotOpen(Reason.NODE_UNFIT, f"{what} cannot be opened here: this node has not got the keys (yet)")


def _is_lost(key: LabelKey | None, number: int) -> bool:
    """No node that may have it has this key: it has been dropped, or went with the last one that was cleared."""
    if key is None:
        return False  # perhaps it is only about to be made
    generation = next((g for g in key.generations if g.number == number), None)
    return number <= key.latest.number and (generation is None or not generation.wraps)
