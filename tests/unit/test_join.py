"""What a worker remembers of where its cluster is."""

from __future__ import annotations

from spinetta.node.join import GATEWAYS_MAX, Introduction


def test_a_worker_forgets_no_voter_for_what_one_node_says_in_bad_times() -> None:
    met = Introduction("10.0.0.1:7220", "c", ("https://10.0.0.1:7221",), ())
    assert met.to_remember(("10.0.0.2:7220", "10.0.0.1:7220")) == ("10.0.0.1:7220", "10.0.0.2:7220")
    assert met.to_remember(()) == ("10.0.0.1:7220",)


def test_what_is_told_comes_first_and_there_is_a_limit() -> None:
    met = Introduction("a:1", "c", (), ("b:1", "c:1"))
    assert met.to_remember(("d:1", "b:1")) == ("b:1", "c:1", "a:1", "d:1")
    many = [f"m{i}:1" for i in range(99)]
    assert met.to_remember(many) == ("b:1", "c:1", "a:1", *many[: GATEWAYS_MAX - 3])
