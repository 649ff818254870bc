"""Which kept scratch directories go, and that what goes is only that."""

from __future__ import annotations

import time
from pathlib import Path

from spinetta.node.scratchsweep import Kept, ScratchSweep, doomed, size_of


def kept(name: str, since_s: float, keep_s: float = 100.0, size_bytes: int = 10) -> Kept:
    return Kept(Path(name), since_s, keep_s, size_bytes)


def names(found: list[Kept]) -> list[str]:
    return [str(k.path) for k in found]


def test_those_whose_time_is_over_go_then_the_oldest() -> None:
    a, b, c = kept("a", 10.0), kept("b", 50.0, keep_s=20.0), kept("c", 60.0)
    assert names(doomed([c, b, a], now_s=70.0, keep_bytes=0)) == []
    assert names(doomed([c, b, a], now_s=71.0, keep_bytes=0)) == ["b"]
    assert names(doomed([c, b, a], now_s=70.0, keep_bytes=20)) == ["a"]
    assert names(doomed([c, b, a], now_s=200.0, keep_bytes=0, set_at_s=150.0)) == ["b"]
    assert names(doomed([c, b, a], now_s=70.0, keep_bytes=1)) == ["a", "b", "c"]


def test_a_sweep(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(bytes(100_000))
    folder = tmp_path / "kept"
    assert ScratchSweep(folder, 0).sweep(now_s=time.time()) == 0
    for name in ("t.1@1000", "t.2@1"):
        (folder / name / "deep").mkdir(parents=True)
        (folder / name / "deep" / "file").write_bytes(bytes(40_000))
        (folder / name / "link").symlink_to(outside)
        (folder / name / "up").symlink_to(tmp_path)
    assert 40_000 <= size_of(folder / "t.1@1000") < 100_000
    sweep = ScratchSweep(folder, 0)
    assert sweep.sweep(now_s=time.time()) == 0
    assert sweep.sweep(now_s=time.time() + 2) == 1
    assert [p.name for p in folder.iterdir()] == ["t.1@1000"]
    assert ScratchSweep(folder, 1000).sweep(now_s=time.time()) == 1
    assert outside.exists()
    assert list(folder.iterdir()) == []
