"""Looking into an image: links are followed as the container sees them, never out of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from spinetta.runtime.lookup import NotInImage, directory_missing, find, kind_of, program_missing

PATH = "/usr/bin:/bin"


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    (tmp_path / "outside").write_text("secret")
    root = tmp_path / "rootfs"
    (root / "usr/bin").mkdir(parents=True)
    (root / "work").mkdir()
    (root / "usr/bin/tool").write_text("#!")
    (root / "usr/bin/tool").chmod(0o755)
    (root / "usr/bin/data").write_text("")
    (root / "bin").symlink_to("usr/bin")
    (root / "absolute").symlink_to("/usr/bin/tool")
    (root / "escape").symlink_to("../outside")
    (root / "round").symlink_to("round")
    (root / "up").symlink_to("usr/bin/../../usr/bin")
    return root


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("/usr/bin/tool", "/usr/bin/tool"),
        ("/bin/tool", "/usr/bin/tool"),
        ("/absolute", "/usr/bin/tool"),
        ("/up/tool", "/usr/bin/tool"),
        ("/../../usr/./bin/tool", "/usr/bin/tool"),
        ("/", "/"),
    ],
)
def test_it_is_found(rootfs: Path, path: str, where: str) -> None:
    assert str(find(rootfs, path)[0]) == where


@pytest.mark.parametrize("path", ["/nothing", "/escape", "/round", "/usr/bin/tool/x", "/bin/nothing", "/" + "x" * 5000])
def test_it_is_not_there(rootfs: Path, path: str) -> None:
    with pytest.raises(NotInImage):
        find(rootfs, path)


def test_kinds(rootfs: Path) -> None:
    assert [kind_of(rootfs, p) for p in ("/usr", "/usr/bin/tool", "/bin", "/bin/tool")] == [
        "folder",
        "file",
        "link",
        "link",
    ]


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("tool", ""),
        ("/absolute", ""),
        ("./tool", ""),
        ("/work/mine", ""),
        ("/data/bin/tool", ""),  # mounted
        ("nothing", "program not found: nothing"),
        ("/bin/nothing", "program not found: /bin/nothing"),
        ("/escape", "program not found: /escape"),
        ("data", "not executable: /usr/bin/data"),
        ("/usr", "not executable: /usr"),
    ],
)
def test_programs(rootfs: Path, program: str, words: str) -> None:
    assert program_missing(rootfs, program, PATH, ["/data"]) == words


def test_a_program_that_may_be_in_a_mount_is_not_called_missing(rootfs: Path) -> None:
    assert program_missing(rootfs, "nothing", "/data/bin:/bin", ["/data"]) == ""


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/", ""),
        ("/usr", ""),
        ("/bin", ""),  # a link to one
        ("/work", ""),
        ("/data", ""),  # mounted
        ("/data/below", ""),
        ("/made", ""),  # above a mount: made with its mount point
        ("/nothing", "working directory missing: /nothing"),
        ("/usr/nothing", "working directory missing: /usr/nothing"),
        ("/escape", ""),  # a link may lead into a mount
        ("/bin/nothing", ""),
        ("/usr/bin/tool", "no directory to work in: /usr/bin/tool"),
        ("/usr/bin/tool/x", "working directory missing: /usr/bin/tool/x"),
        ("/work/x", "working directory missing: /work/x (/work is empty when a task starts)"),
        ("/workshop", "working directory missing: /workshop"),
    ],
)
def test_working_directories(rootfs: Path, path: str, words: str) -> None:
    assert directory_missing(rootfs, path, ["/data", "/made/here"]) == words


@pytest.mark.parametrize("path", ["/escape", "/round", "/bin/nothing"])
def test_without_mounts_a_link_leads_nowhere_else(rootfs: Path, path: str) -> None:
    assert directory_missing(rootfs, path, []) == f"working directory missing: {path}"
