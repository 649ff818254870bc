"""What may be sealed, and given as a secret: the limits, each with its reason, and the checks. Part of `validate`."""

from __future__ import annotations

from collections.abc import Sequence

from spinetta import names
from spinetta.access import MEMBERS, Envelope
from spinetta.errors import UserError
from spinetta.model import TaskSpec

CLEARANCE_LABELS_MAX = 8  # each is a key to look up and a share to open; more than a few is a mistake
SECRETS_MAX = 32  # of one task: files on a small tmpfs
SECRET_BYTES_MAX = 64 << 10  # of one secret: a key, a certificate, a token; data belongs in files
SECRETS_PER_OWNER_MAX = 256  # 16 MiB of the store for one owner at the very most
SEALED_BYTES_MAX = 384 << 10  # of a payload: command and environment of 256 KiB, labels, name, directory, framing
SEALED_SECRET_BYTES_MAX = SECRET_BYTES_MAX + 64
SHARE_BYTES_MAX = 128  # a sealed share has 81
GENERATION_MAX = 1 << 31  # of a label's key
NONCE_BYTES = 12


def check_clearance(labels: Sequence[str], field: str) -> None:
    """Raise UserError unless these are few lawful labels, each once."""
    if len(labels) > CLEARANCE_LABELS_MAX:
        raise UserError(
            f"{len(labels)} clearance labels", field=field, hint=f"at most {CLEARANCE_LABELS_MAX}", reason="too-large"
        )
    for i, label in enumerate(labels):
        names.check_clearance(label, f"{field}[{i}]")
    if len(set(labels)) != len(labels):
        raise UserError("a clearance label is given twice", field=field, hint="give each once")


def check_envelope(envelope: Envelope, labels: Sequence[str], bytes_max: int, field: str) -> None:
    """Raise UserError unless an envelope has one share for each of these labels, and lawful sizes."""
    if sorted(share.label for share in envelope.shares) != sorted(labels):
        raise UserError(
            "the envelope is not sealed to exactly these labels", field=field, hint="one share for each label"
        )
    for share in envelope.shares:
        if not 1 <= share.generation <= GENERATION_MAX or not 0 < len(share.sealed) <= SHARE_BYTES_MAX:
            raise UserError(f"the share for {share.label} is none", field=field, hint="seal it again")
    if len(envelope.nonce) != NONCE_BYTES or not envelope.ciphertext:
        raise UserError("the envelope is none", field=field, hint="seal it again")
    if len(envelope.ciphertext) > bytes_max:
        raise UserError(
            f"{len(envelope.ciphertext)} sealed bytes", field=field, hint=f"at most {bytes_max}", reason="too-large"
        )


def check_sealed(spec: TaskSpec, dot: str) -> None:
    """Raise UserError unless a sealed specification has a label, nothing of its payload in clear, and an envelope."""
    if not spec.clearance:
        raise UserError(
            "a task without clearance labels cannot be sealed",
            field=dot + "sealed",
            hint=f"give it a label; every approved node is cleared for {MEMBERS!r}",
        )
    for part in ("command", "env", "working_directory", "name", "labels"):
        if getattr(spec, part):
            raise UserError(
                f"a sealed task has its {part.replace('_', ' ')} in clear",
                field=dot + part,
                hint="it belongs in the sealed payload only",
                reason="unsealed",
            )
    if spec.sealed is not None:
        check_envelope(spec.sealed, spec.clearance, SEALED_BYTES_MAX, dot + "sealed")


def check_secret_refs(refs: Sequence[tuple[str, str]], field: str) -> None:
    """Raise UserError unless these are few lawful pairs of a secret's name and a file's, no file twice."""
    if len(refs) > SECRETS_MAX:
        raise UserError(f"{len(refs)} secrets", field=field, hint=f"at most {SECRETS_MAX}", reason="too-large")
    files: set[str] = set()
    for i, (name, file) in enumerate(refs):
        names.check_secret_name(name, f"{field}[{i}].name")
        names.check_secret_name(file, f"{field}[{i}].file", "a secret's file")
        if file in files:
            raise UserError(
                f"two secrets would be the file {file}", field=f"{field}[{i}].file", hint="give each another file"
            )
        files.add(file)
