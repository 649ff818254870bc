"""The real command against a secured cluster: founded, with real services, TLS and store."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from spinetta.access import Policy
from spinetta.client.credentials import load
from spinetta.node.founding import ADMIN_FILE
from spinetta.trust import certificates
from tests.contract.api_world import Etcd, etcd, etcd_member, run
from tests.contract.test_oidc import Forge, forge
from tests.contract.trust_world import Newcomer, World, world

__all__ = ["etcd", "etcd_member", "forge"]
pytestmark = pytest.mark.contract

LIMIT_S = 30.0


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


class Shell:
    """Runs the command as somebody, in a home of their own."""

    def __init__(self, w: World, home: Path) -> None:
        self.w = w
        self.home = home
        home.mkdir()
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SPINETTA_", "XDG_"))}
        self.env = kept | {"HOME": str(home), "SPINETTA_NODE": w.voter.address}

    @property
    def credentials(self) -> Path:
        return self.home / ".config" / "spinetta" / "credentials.pem"

    async def __call__(self, *argv: str, stdin: str = "", **env: str) -> Ended:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "spinetta.cli", *argv,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env=self.env | env, cwd=self.home,
        )  # fmt: skip
        async with asyncio.timeout(LIMIT_S):
            out, err = await process.communicate(stdin.encode())
        assert process.returncode is not None
        found = Ended(process.returncode, out.decode(), err.decode())
        assert "Traceback" not in found.err, found.err
        return found

    async def good(self, *argv: str, **options: str) -> Ended:
        found = await self(*argv, **options)
        assert found.code == 0, found
        return found

    async def json(self, *argv: str, **options: str) -> Any:
        return (await self.good(*argv, "--json", **options)).document

    async def refused(self, code: int, *argv: str, **options: str) -> str:
        found = await self(*argv, **options)
        assert (found.code, found.out) == (code, ""), found
        assert found.err.startswith("error: "), found
        return found.err


Story = Callable[[World, Shell], Awaitable[None]]


@pytest.fixture
def play(etcd: Etcd, tmp_path: Path) -> Callable[..., None]:
    """A story with an administrator's shell."""

    def go(story: Story, **options: Any) -> None:
        async def main() -> None:
            async with world(etcd, tmp_path, **options) as w:
                admin = Shell(w, tmp_path / "admin-home")
                admin.env["SPINETTA_CREDENTIALS"] = str(tmp_path / ADMIN_FILE)
                await story(w, admin)

        run(main())

    return go


async def login(w: World, admin: Shell, name: str, home: Path, *user_options: str) -> Shell:
    """A person with a home of their own, logged in as told in the documents."""
    await admin.good("user", "add", name, *user_options)
    token = (await admin.good("token", "create", "--role", "client", "--user", name)).out
    shell = Shell(w, home)
    (home / "token").write_text(token)
    await shell.good("login", "--node", w.voter.address, "--token-file", "token")
    del shell.env["SPINETTA_NODE"]  # from here on the credentials know where
    return shell


def test_from_founding_to_a_user_who_may_and_may_not(play: Callable[..., None], tmp_path: Path) -> None:
    async def story(w: World, admin: Shell) -> None:
        me = await admin.json("whoami")
        assert (me["kind"], me["name"], me["role"]) == ("user", "admin", "admin")
        ann = await login(w, admin, "ann", tmp_path / "ann", "--project", "genomes")
        assert ann.credentials.stat().st_mode & 0o777 == 0o600
        me = await ann.json("whoami")
        assert (me["name"], me["role"], me["projects"]) == ("ann", "user", ["genomes"])
        # Whoever logs in is the owner, whatever the account here is called.
        task = (await ann.good("submit", "--", "true")).out.strip()
        [shown] = (await ann.json("status", task))["tasks"]
        assert shown["spec"]["owner"] == "ann"
        assert [t["id"] for t in (await ann.json("list", "--mine"))["tasks"]] == [task]
        assert (await admin.json("list", "--mine"))["tasks"] == []
        await admin("cancel", "--all", "--mine", "--yes")
        assert (await ann.json("status", task))["tasks"][0]["state"] == "queued"
        assert "may not" in await ann.refused(7, "user", "add", "eve", "--role", "admin")
        document = (await ann("user", "add", "eve", "--json")).document
        assert (document["error"]["reason"], document["error"]["exit_code"]) == ("denied", 7)
        await ann.refused(7, "submit", "--owner", "bob", "--", "true")
        # A right given counts from the next call on, one taken too.
        await admin.good("user", "set", "ann", "--role", "operator")
        assert (await ann.json("whoami"))["role"] == "operator"
        await admin.good("user", "revoke", "ann", "--yes", "--reason", "left")
        await ann.refused(8, "list")
        [listed] = [u for u in (await admin.json("user", "list"))["users"] if u["name"] == "ann"]
        assert (listed["revoked"], listed["reason"], listed["role"]) == (True, "left", "operator")
        restored = await admin.good("user", "set", "ann", "--restore")
        assert "token create --role client --user ann" in restored.err
        assert "log in again" in await ann.refused(8, "list")  # with a new token

    play(story)


def test_without_credentials_and_with_those_of_nobody(play: Callable[..., None], tmp_path: Path) -> None:
    async def story(w: World, admin: Shell) -> None:
        nobody = Shell(w, tmp_path / "nobody")
        assert "spinetta login" in await nobody.refused(8, "list")
        assert "you have no credentials for the cluster at" in await nobody.refused(
            8, "list", "--node", "192.0.2.1:7220"
        )
        assert "there is no file" in await nobody.refused(8, "list", "--credentials", "absent.pem")
        copy = nobody.home / "stolen.pem"
        copy.write_bytes((tmp_path / ADMIN_FILE).read_bytes())
        copy.chmod(0o644)
        assert "others may read" in await nobody.refused(2, "list", "--credentials", "stolen.pem")

    play(story)


def test_tokens(play: Callable[..., None], tmp_path: Path) -> None:
    async def story(w: World, admin: Shell) -> None:
        made = await admin.good("token", "create", "--role", "worker", "--ttl", "2h", "--uses", "3", "-c", "phi,eu")
        text = made.out.strip()
        assert "\n" not in text
        assert f"spinetta node join --address HOST:PORT --peers {w.voter.address} --token-file" in made.err
        assert text not in made.err
        [listed] = (await admin.json("token", "list"))["tokens"]
        assert (listed["state"], listed["uses_left"], listed["clearances"]) == ("good", 3, ["eu", "phi"])
        assert not {"salt", "secret_hash", "token"} & listed.keys()
        # The right token in the wrong place, both ways round.
        other = Shell(w, tmp_path / "other")
        assert "for a node of role worker" in await other.refused(2, "login", "--token-file", "-", stdin=text)
        answer = await w.join(Newcomer("n2"), text)
        assert answer.certificates.certificate
        await admin.good("token", "revoke", listed["id"])
        [listed] = (await admin.json("token", "list"))["tokens"]
        assert (listed["state"], listed["uses_left"]) == ("revoked", 2)
        await admin.refused(3, "token", "revoke", "abcdefgh")
        assert "client token is for one user" in await admin.refused(2, "token", "create", "--role", "client")
        await admin.refused(3, "token", "create", "--role", "client", "--user", "nobody")
        table = (await admin.good("token", "list")).out
        assert table.splitlines()[0].startswith("ID")

    play(story)


def test_a_client_token_is_spent_once(play: Callable[..., None], tmp_path: Path) -> None:
    async def story(w: World, admin: Shell) -> None:
        await admin.good("user", "add", "ann")
        token = (await admin.good("token", "create", "--role", "client", "--user", "ann")).out
        ann, eve = Shell(w, tmp_path / "ann"), Shell(w, tmp_path / "eve")
        await ann.good("login", "--token-file", "-", stdin=token)
        err = await eve.refused(7, "login", "--token-file", "-", stdin=token)
        assert "used up" in err
        assert token.strip() not in err
        assert not eve.credentials.exists()
        # Somebody else's credentials are not written over by mistake.
        await admin.good("user", "add", "bob")
        token = (await admin.good("token", "create", "--role", "client", "--user", "bob", "--uses", "2")).out
        err = await ann.refused(2, "login", "--token-file", "-", stdin=token)
        assert "has the credentials of ann" in err
        assert (await ann.json("whoami"))["name"] == "ann"
        [beside] = ann.credentials.parent.glob("credentials-bob-*.pem")  # the token was spent: nothing is lost
        assert (await ann.json("whoami", "--credentials", str(beside)))["name"] == "bob"
        await ann.good("login", "--token-file", "-", "--force", stdin=token)
        assert (await ann.json("whoami"))["name"] == "bob"
        await ann.good("logout")
        assert not ann.credentials.exists()
        await ann.refused(3, "logout")

    play(story)


def test_a_bearer_token_is_kept_for_a_cluster_whose_authority_was_compared(
    play: Callable[..., None], tmp_path: Path, forge: Forge
) -> None:
    async def story(w: World, admin: Shell) -> None:
        ann = Shell(w, tmp_path / "ann")
        jwt = ann.home / "jwt"
        jwt.write_text("abc.def.ghi")
        jwt.chmod(0o600)
        keep = ("login", "--bearer-file", "jwt", "--keep-bearer")
        [right] = [
            a["hash"] for a in (await admin.json("cluster", "authorities"))["authorities"] if a["kind"] == "cluster"
        ]
        assert "--ca-hash" in await ann.refused(2, *keep)
        assert "somebody stands in between" in await ann.refused(2, *keep, "--ca-hash", "00" * 32)
        assert "not the hash of an authority" in await ann.refused(2, *keep, "--ca-hash", "12")
        assert not ann.credentials.exists()
        await ann.refused(8, *keep, "--ca-hash", right)  # no issuer is believed here
        assert not ann.credentials.exists()
        issuer = ("--audience", "spinetta", "--prefix", "uni-", "--map", "staff=user")
        await admin.good("policy", "issuer", "add", forge.url, *issuer)
        jwt.write_text(forge.token(aud="spinetta", sub="ann"))
        jwt.chmod(0o644)
        assert "others may read jwt" in await ann.refused(2, *keep, "--ca-hash", right)
        jwt.chmod(0o600)
        assert "you are uni-ann in cluster" in (await ann.good(*keep, "--ca-hash", right)).out
        stored = load(ann.credentials)
        assert (stored.credentials, stored.nodes) == (None, (w.voter.address,))
        assert stored.bearer_file == str(ann.home / "jwt")
        assert (await ann.json("whoami"))["name"] == "uni-ann"
        jwt.chmod(0o640)
        assert "others may read" in await ann.refused(2, "whoami")

    play(story)


def test_a_lost_laptop(play: Callable[..., None], tmp_path: Path) -> None:
    async def story(w: World, admin: Shell) -> None:
        ann = await login(w, admin, "ann", tmp_path / "ann")
        await admin.good("user", "revoke-certificates", "ann", "--yes")
        assert "error" in await ann.refused(8, "list")
        await asyncio.sleep(1.1)  # certificates tell whole seconds, and those of that very one count as lost
        token = (await admin.good("token", "create", "--role", "client", "--user", "ann")).out
        await ann.good("login", "--node", w.voter.address, "--token-file", "-", stdin=token)
        assert (await ann.json("whoami"))["name"] == "ann"

    play(story)


def test_a_certificate_renews_itself_by_use(play: Callable[..., None], tmp_path: Path) -> None:
    async def story(w: World, admin: Shell) -> None:
        # Certificates are made good for five minutes back: of 400 s of life 300 are over at once.
        await admin.good("policy", "set", "--user-certificate", "100s")
        ann = await login(w, admin, "ann", tmp_path / "ann")
        before = load(ann.credentials).credentials
        await admin.good("policy", "set", "--user-certificate", "1h")
        await ann.good("list")
        after = load(ann.credentials).credentials
        assert before is not None
        assert after is not None
        assert certificates.expiry(after.cert_pem)[1] > time.time() + 1800 > certificates.expiry(before.cert_pem)[1]
        assert after.key_pem == before.key_pem
        assert load(ann.credentials).nodes == (w.voter.address,)
        await ann.good("list")
        assert load(ann.credentials).credentials == after

    play(story)


def test_nodes_are_approved_cleared_and_shut_out(play: Callable[..., None]) -> None:
    async def story(w: World, admin: Shell) -> None:
        token = await w.token(clearances=["phi"], uses=3)
        for name in ("n2", "n3"):
            await w.join(Newcomer(name), token)
        waiting = (await admin.json("node", "requests"))["requests"]
        assert [(r["name"], r["role"], r["clearances"]) for r in waiting] == [
            ("n2", "worker", ["phi"]), ("n3", "worker", ["phi"]),
        ]  # fmt: skip
        assert "n2" in (await admin.good("node", "requests")).out
        await admin.good("node", "approve", "n2")
        await admin.good("node", "reject", "n3")
        [request] = (await admin.json("node", "requests"))["requests"]
        assert (request["name"], request["rejected"]) == ("n3", True)
        await admin.refused(3, "node", "approve", "n9")
        # Groups limit what was granted.
        await admin.good("group", "set", "site-b", "--clearance", "eu")
        granted = await admin.good("node", "grant", "n2", "--clearance", "eu", "--join-group", "site-b")
        assert "cleared for eu; in site-b" in granted.out
        assert "a group of n2 does not have phi" in granted.err
        [n2] = [n for n in (await admin.json("node", "access"))["nodes"] if n["name"] == "n2"]
        assert (n2["clearances"], n2["effective"], n2["groups"]) == (["eu", "phi"], ["eu"], ["site-b"])
        assert "eu,(phi)" in (await admin.good("node", "access")).out
        [group] = (await admin.json("group", "list"))["groups"]
        assert (group["name"], group["clearances"], group["nodes"]) == ("site-b", ["eu"], ["n2"])
        assert "1 nodes changed" in (await admin.good("group", "remove", "site-b", "--yes")).out
        await admin.good("node", "withdraw", "n2", "--clearance", "eu")
        # Shut out, and forgotten.
        assert "Nobody is here to say so" in await admin.refused(2, "node", "revoke", "n2")
        await admin.refused(2, "node", "forget", "n2", "--yes")
        await admin.good("node", "revoke", "n2", "--yes", "--reason", "stolen")
        [n2] = [n for n in (await admin.json("node", "access"))["nodes"] if n["name"] == "n2"]
        assert (n2["revoked"], n2["reason"]) == (True, "stolen")
        await admin.good("node", "forget", "n2", "--yes")
        assert [n["name"] for n in (await admin.json("node", "access"))["nodes"]] == ["n1"]

    play(story, policy=Policy(approval=True))


def test_policy(play: Callable[..., None], tmp_path: Path) -> None:
    async def story(w: World, admin: Shell) -> None:
        assert (await admin.json("policy", "show"))["approval"] is False
        shown = (await admin.good("policy", "show")).out
        assert "Node certs:  60d\n" in shown
        assert "4000/s for each identity (built in)" in shown
        await admin.good("policy", "set", "--approval", "yes", "--node-certificate", "30d", "--calls-per-s", "50")
        url = "https://login.example.org"
        await admin.good(
            "policy", "issuer", "add", url, "--audience", "spinetta", "--prefix", "uni-",
            "--map", "staff=user:genomes,imaging:phi", "--map", "/ops=lead=operator",
        )  # fmt: skip
        p = await admin.json("policy", "show")
        assert (p["approval"], p["node_certificate_s"], p["limits"]["calls_per_s"]) == (True, 30 * 86400.0, 50.0)
        [issuer] = p["issuers"]
        assert [(g["group"], g["role"], g["projects"], g["clearances"]) for g in issuer["groups"]] == [
            ("staff", "user", ["genomes", "imaging"], ["phi"]), ("/ops=lead", "operator", [], []),
        ]  # fmt: skip
        shown = (await admin.good("policy", "show")).out
        assert "50/s for each identity\n" in shown
        assert "staff = user; projects genomes, imaging; cleared for phi" in shown
        await admin.good("policy", "issuer", "remove", url)
        assert (await admin.json("policy", "show"))["issuers"] == []
        await admin.refused(3, "policy", "issuer", "remove", url)
        await admin.refused(
            2, "policy", "issuer", "add", "ftp://x", "--audience", "b", "--prefix", "p", "--map", "a=user"
        )
        await admin.refused(2, "policy", "issuer", "add", url, "--audience", "a", "--prefix", "p-", "--map", "a=king")

    play(story)


def test_authorities(play: Callable[..., None]) -> None:
    async def story(w: World, admin: Shell) -> None:
        found = (await admin.json("cluster", "authorities"))["authorities"]
        assert sorted((a["kind"], a["state"]) for a in found) == [("cluster", "active"), ("etcd", "active")]
        [cluster] = [a for a in found if a["kind"] == "cluster"]
        assert cluster["hash"] == certificates.authority_hash(w.voter.credentials.ca_pem).hex()
        await admin.good("cluster", "rotate-ca", "--kind", "cluster", "--overlap", "1d")
        found = (await admin.json("cluster", "authorities"))["authorities"]
        assert sorted(a["state"] for a in found if a["kind"] == "cluster") == ["active", "next"]
        await admin.refused(2, "cluster", "rotate-ca", "--kind", "cluster")
        await admin.refused(2, "cluster", "rotate-ca", "--overlap", "1d", "--retire-now")
        assert "cluster" in (await admin.good("cluster", "authorities")).out

    play(story)
