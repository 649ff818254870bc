"""``client.admin`` for programs without asyncio."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from spinetta import access
from spinetta.client.admin import Access, AsyncAdmin, AuthorityInfo, NewToken, Rotated, Tokens, WhoAmI

T = TypeVar("T")


class Admin:
    """The same for programs without asyncio; what each does is said in `AsyncAdmin`."""

    def __init__(self, admin: AsyncAdmin, run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self._admin = admin
        self._run_any = run

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        found: T = self._run_any(work)
        return found

    def whoami(self) -> WhoAmI:
        """Who the cluster takes us for."""
        return self._run(self._admin.whoami())

    def create_token(self, role: access.TokenRole, **options: Any) -> NewToken:
        """A new token; options of `AsyncAdmin.create_token`."""
        return self._run(self._admin.create_token(role, **options))

    def tokens(self) -> list[access.TokenRecord]:
        """All tokens."""
        return self._run(self._admin.tokens())

    def revoke_token(self, token_id: str) -> None:
        """Nobody joins with it any more."""
        self._run(self._admin.revoke_token(token_id))

    def all_tokens(self) -> Tokens:
        """All tokens, and the keys of those that cannot be read."""
        return self._run(self._admin.all_tokens())

    def members(self) -> Access:
        """Nodes, requests, users and groups."""
        return self._run(self._admin.members())

    def decide_join(
        self, name: str, *, approve: bool, key_hash: bytes = b"", clearances: Sequence[str] | None = None
    ) -> None:
        """Let a node in that waits for approval, by the key that was looked at, or not."""
        self._run(self._admin.decide_join(name, approve=approve, key_hash=key_hash, clearances=clearances))

    def set_node(self, name: str, **changes: Any) -> access.NodeAcl:
        """Change what a node may do; changes of `AsyncAdmin.set_node`."""
        return self._run(self._admin.set_node(name, **changes))

    def user(self, name: str) -> access.UserAcl:
        """One user."""
        return self._run(self._admin.user(name))

    def set_user(self, user: access.UserAcl, *, create: bool = False) -> access.UserAcl:
        """Write a user's record as a whole."""
        return self._run(self._admin.set_user(user, create=create))

    def revoke_user(self, name: str, reason: str = "") -> None:
        """A user may do nothing any more."""
        self._run(self._admin.revoke_user(name, reason))

    def remove_user(self, name: str) -> None:
        """Forget a user."""
        self._run(self._admin.remove_user(name))

    def invalidate_certificates(self, name: str) -> None:
        """Certificates that the user has so far do not count any more."""
        self._run(self._admin.invalidate_certificates(name))

    def set_group(self, name: str, clearances: Sequence[str]) -> int:
        """What nodes in a group may be cleared for at most."""
        return self._run(self._admin.set_group(name, clearances))

    def remove_group(self, name: str) -> int:
        """Nodes are in no such group any more."""
        return self._run(self._admin.remove_group(name))

    def policy(self) -> access.Policy:
        """The cluster's rules."""
        return self._run(self._admin.policy())

    def set_policy(self, policy: access.Policy) -> None:
        """Write the rules as a whole."""
        self._run(self._admin.set_policy(policy))

    def authorities(self) -> list[AuthorityInfo]:
        """Certificate authorities and where they stand."""
        return self._run(self._admin.authorities())

    def rotate_authority(self, kind: str, **options: Any) -> Rotated:
        """Begin a new authority; options of `AsyncAdmin.rotate_authority`."""
        return self._run(self._admin.rotate_authority(kind, **options))

    def secrets(self, owner: str = "") -> list[access.SecretRecord]:
        """Secrets without what is in them."""
        return self._run(self._admin.secrets(owner))

    def remove_secret(self, name: str, owner: str = "") -> None:
        """Forget a secret."""
        self._run(self._admin.remove_secret(name, owner))
