"""What ``spinetta cluster status`` shows of a voter, to people and to programs."""

from __future__ import annotations

from spinetta.cli.clusterstatus import cluster_document, voter_row
from spinetta.client.views import ClusterInfo, VoterInfo

MIB = 1 << 20
WELL = VoterInfo(
    "n1", 0xA1, "http://127.0.0.1:7221", "http://127.0.0.1:7222", answers=True, healthy=True, leader=True,
    version="3.4.23", db_bytes=100 * MIB, db_in_use_bytes=50 * MIB, behind=3,
)  # fmt: skip
ALONE = VoterInfo("n2", 0xA2, "", "", answers=True, version="3.4.23", alarms=("NOSPACE",))
GONE = VoterInfo("", 0xA3, "", "", learner=True)


def test_rows() -> None:
    assert voter_row(WELL, 200 * MIB) == (
        "n1", "leader", "takes part", "3.4.23", "100MiB", "50MiB", "25 %", "3", "",
    )  # fmt: skip
    assert voter_row(ALONE, 200 * MIB)[1:3] == ("voter", "sees no leader")
    assert voter_row(ALONE, 200 * MIB)[-1] == "NOSPACE"
    assert voter_row(GONE, 200 * MIB) == ("(a3)", "learner", "does not answer", "", "", "", "", "", "")


def test_what_is_not_known_is_null_for_programs() -> None:
    info = ClusterInfo("c", (WELL, GONE), "n1", 0, "1", "", has_majority=False, quota_bytes=200 * MIB, notices=("x",))
    document = cluster_document(info)
    assert document["has_majority"] is False
    assert document["notices"] == ["x"]
    well, gone = document["voters"]
    assert (well["quota_used"], well["behind"], well["etcd_leader"]) == (0.25, 3, True)
    assert (gone["db_bytes"], gone["quota_used"], gone["etcd_version"], gone["answers"]) == (None, None, None, False)
