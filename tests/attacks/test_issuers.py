"""An issuer of bearer tokens that would name the users of another one."""

from __future__ import annotations

from itertools import permutations

import pytest

from spinetta.access import Issuer, Policy
from spinetta.errors import UserError
from spinetta.node.services.useradmin import check_policy


def policy(*prefixes: str) -> Policy:
    return Policy(issuers=tuple(Issuer(f"https://{n}.example", "spinetta", prefix=p) for n, p in enumerate(prefixes)))


@pytest.mark.parametrize(
    "prefixes", [*permutations(("uni-", "uni-b-")), ("uni-", "uni-"), *permutations(("a", "abc", "x"))]
)
def test_no_issuer_can_name_the_users_of_another(prefixes: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="begins with that of another") as e:
        check_policy(policy(*prefixes))
    assert e.value.field.endswith(".prefix")


def test_prefixes_that_keep_users_apart() -> None:
    check_policy(policy("uni-", "lab-", "u-"))


@pytest.mark.parametrize(
    "url", ["http://127.evil.example", "http://localhost.evil.example", "http://i", "https://", "x"]
)
def test_an_issuers_keys_are_not_fetched_in_clear_from_elsewhere(url: str) -> None:
    with pytest.raises(UserError) as e:
        check_policy(Policy(issuers=(Issuer(url, "spinetta", prefix="uni-"),)))
    assert e.value.field == "policy.issuers[0].url"


def test_an_issuer_cannot_name_the_clusters_own_users() -> None:
    with pytest.raises(UserError, match="without a prefix"):
        check_policy(policy(""))
