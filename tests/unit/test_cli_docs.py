"""The tables of the documents name every setting, every key of a task file and every exit code, and no others."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from spinetta.cli import exits
from spinetta.client.specs import ENTRY_KEYS, spec_from_entry
from spinetta.config import FileTable, resolve, resolve_client
from spinetta.options import CLIENT_OPTIONS, NODE_OPTIONS

DOCS = Path(__file__).resolve().parents[2] / "docs"


def keys_in(text: str) -> list[str]:
    return re.findall(r"^\| `(\w+)` \|", text, re.M)


def test_settings() -> None:
    node, client = (DOCS / "settings.md").read_text().split("## [client]")
    assert keys_in(node) == [o.key for o in NODE_OPTIONS]
    assert keys_in(client) == [o.key for o in CLIENT_OPTIONS]


def test_the_example_of_a_file_is_one() -> None:
    import tomllib

    text = (DOCS / "settings.md").read_text()
    tables = tomllib.loads(text.split("```toml\n")[1].split("```")[0])
    files = [FileTable("example", tables)]
    assert resolve({}, {}, files, {"name": "a", "data_dir": "/d"}).settings.countables == (("gpu", 2),)
    assert len(resolve_client({}, {}, files).settings.nodes) == 2


def test_keys_of_task_files() -> None:
    text = (DOCS / "tasks.md").read_text()
    assert keys_in(text.split("## Many tasks")[0]) == list(ENTRY_KEYS)
    for entry in yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]):
        assert spec_from_entry(entry, {}).command[0] == "bowtie2"


def test_exit_codes() -> None:
    listed = [int(c) for c in re.findall(r"^\| (\d+) \|", (DOCS / "tasks.md").read_text(), re.M)]
    assert listed == [
        exits.OK, exits.TASK_FAILED, exits.USAGE, exits.NOT_FOUND, exits.UNAVAILABLE, exits.TIMED_OUT, exits.UNKNOWN,
        exits.DENIED, exits.UNAUTHENTICATED, exits.BUG, exits.INTERRUPTED,
    ]  # fmt: skip
