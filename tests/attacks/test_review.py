"""What a second look found: between a look at the rights and what follows from it, and in what a node keeps."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest

from spinetta.access import GroupMapping, Issuer, UserRole
from spinetta.errors import Denied, StoreUnavailable
from spinetta.node.services.desk import Asked
from spinetta.node.services.renew import is_certified
from spinetta.rights import Call, Caller, CallerKind
from spinetta.trust import audit, auditreading, certificates, guest, oidc
from spinetta.trust.credentials import UserCredentials
from spinetta.trust.dial import VOTER, Dialer
from spinetta.trust.oidc import OidcVerifier
from spinetta.v1 import record_pb2 as records
from spinetta.v1 import trust_pb2 as pb
from spinetta.v1.trust_pb2_grpc import EnrollStub
from tests.contract.api_world import Etcd, failure, run
from tests.contract.test_oidc import Forge, forge, issuer
from tests.contract.trust_world import World, world

__all__ = ["forge"]

Story = Callable[[World], Awaitable[None]]
CLIENT = records.TOKEN_ROLE_CLIENT


@pytest.fixture
def play(etcd: Etcd, tmp_path: Path) -> Callable[[Story], None]:
    def go(story: Story) -> None:
        async def main() -> None:
            async with world(etcd, tmp_path) as w:
                await story(w)

        run(main())

    return go


async def _user(w: World, name: str) -> UserCredentials:
    admin = await w.admin()
    await admin.SetUser(pb.SetUserRequest(user=records.UserAcl(name=name, role=records.USER_ROLE_USER), create=True))
    return await _login(w, name)


async def _login(w: World, name: str) -> UserCredentials:
    key = certificates.new_key()
    request = pb.LoginRequest(
        token=await w.token(CLIENT, user=name),
        csr=certificates.csr(key, "x"),
        wall_ms=w.voter.port.wall_ms(),
    )
    got = (await (await w.voter.enroll()).Login(request)).certificates
    return UserCredentials.create(got.ca_bundle, got.certificate, certificates.key_pem(key))


async def _call_back(w: World, name: str) -> None:
    request = pb.SetUserRequest(user=records.UserAcl(name=name), invalidate_certificates=True)
    await (await w.admin()).SetUser(request)


async def _renewed(w: World, who: UserCredentials) -> UserCredentials:
    key = certificates.new_key()
    made = await (await w.voter.trust(who)).Renew(pb.RenewRequest(csr=certificates.csr(key, "x")))
    return UserCredentials.create(made.certificates.ca_bundle, made.certificates.certificate, certificates.key_pem(key))


async def _logged_in_anew(w: World, who: UserCredentials) -> UserCredentials:
    key = certificates.new_key()
    request = pb.LoginRequest(csr=certificates.csr(key, "x"), wall_ms=w.voter.port.wall_ms())
    dialer = Dialer.secured(lambda: (who.ca_pem, who.cert_pem, who.key_pem))
    async with dialer.channel(w.voter.address, VOTER) as channel:
        stub: Any = EnrollStub(channel)
        got = (await stub.Login(request)).certificates
    return UserCredentials.create(got.ca_bundle, got.certificate, certificates.key_pem(key))


@pytest.mark.parametrize("how", [_renewed, _logged_in_anew])
def test_a_voter_that_has_not_heard_of_the_calling_back_gives_no_new_certificate(
    play: Callable[[Story], None], how: Callable[[World, UserCredentials], Awaitable[UserCredentials]]
) -> None:
    async def story(w: World) -> None:
        thief = await _user(w, "ann")
        assert (await (await w.voter.trust(thief)).WhoAmI(pb.WhoAmIRequest())).name == "ann"
        w.voter.acl._take = lambda *_: None  # type: ignore[method-assign] # its watch is behind
        await _call_back(w, "ann")
        failed = await failure(how(w, thief))
        assert failed.code is grpc.StatusCode.UNAUTHENTICATED

    play(story)


def test_certificates_of_a_voter_whose_clock_is_ahead_are_called_back_too(play: Callable[[Story], None]) -> None:
    async def story(w: World) -> None:
        port = w.voter.port
        thief = await _user(w, "ann")
        port.wall_ms = lambda: time.time_ns() // 1_000_000 + 25_000  # type: ignore[method-assign] # as far as is allowed
        renewed = await _renewed(w, thief)
        del port.wall_ms
        assert (await (await w.voter.trust(renewed)).WhoAmI(pb.WhoAmIRequest())).name == "ann"
        await _call_back(w, "ann")
        for stolen in (thief, renewed):
            failed = await failure((await w.voter.trust(stolen)).WhoAmI(pb.WhoAmIRequest()))
            assert failed.code is grpc.StatusCode.UNAUTHENTICATED
        fresh = await _login(w, "ann")  # of a person who has a new token: at once, and to be renewed as ever
        for good in (fresh, await _renewed(w, fresh)):
            assert (await (await w.voter.trust(good)).WhoAmI(pb.WhoAmIRequest())).name == "ann"

    play(story)


def test_a_bearer_with_a_made_up_certificate_has_no_certificate() -> None:
    class Context:
        def auth_context(self) -> Any:
            return {"x509_pem_cert": (guest_made("ann"),)}

        def invocation_metadata(self) -> Any:
            return (("authorization", "Bearer x.y.z"),)

        def peer(self) -> str:
            return "ipv4:127.0.0.1:1"

    caller = Caller(CallerKind.USER, "ann", role=UserRole.USER)
    asked = Asked(None, Context(), Call.RENEW, caller)  # type: ignore[arg-type]
    assert not is_certified(asked)


def guest_made(name: str) -> bytes:
    """What anybody can make, as the key of the guests' authority is public."""
    key = certificates.new_key()
    authority = certificates.Authority(guest.guest_authority_pem(), guest.guest_authority_key())
    return certificates.issue_user(
        authority, certificates.csr(key, name), cluster="0" * 16, name=name, now_s=time.time(), lifetime_s=600
    )


# --- issuers ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def dripping(first: bytes) -> Iterator[str]:
    """An issuer that says something, and then a byte now and then, for ever."""
    server = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = server.accept()
                with client, contextlib.suppress(OSError):
                    client.sendall(first)
                    while not ended.wait(0.2):
                        client.sendall(b" ")

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
    finally:
        ended.set()
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(10)


@pytest.mark.parametrize("first", [b"", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nContent-Length: 900000\r\n\r\n{"])
def test_an_issuer_that_answers_for_ever_holds_nothing(first: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oidc, "FETCH_S", 1.0)
    before = threading.active_count()
    with dripping(first) as url:
        began_s = time.monotonic()
        with pytest.raises(StoreUnavailable):
            _verify(_signed_by_nobody(url), issuer(url))
        assert time.monotonic() - began_s < 20
    end_s = time.monotonic() + 20
    while threading.active_count() > before:
        assert time.monotonic() < end_s, threading.enumerate()
        time.sleep(0.01)  # polling with a limit


def test_an_issuer_does_not_send_us_to_ourselves(forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(url: str, _: Any) -> dict[str, Any]:
        asked.append(url)
        return {"issuer": "https://id.example", "jwks_uri": f"{forge.url}/keys"}

    monkeypatch.setattr(oidc, "_fetch", fetch)
    with pytest.raises(StoreUnavailable):
        _verify(_signed_by_nobody("https://id.example"), issuer("https://id.example"))
    assert asked == ["https://id.example/.well-known/openid-configuration"]


@pytest.mark.parametrize("verified", [False, "true", None, 0])
def test_an_address_that_the_issuer_has_not_verified_names_nobody(forge: Forge, verified: object) -> None:
    named = Issuer(
        forge.url, issuer(forge.url).audience, "lab-", "email", groups=(GroupMapping("staff", UserRole.USER),)
    )
    good = forge.token(email="ann@example.org", email_verified=True)
    assert _verify(good, named).name == "lab-ann@example.org"
    claims = jwt.decode(good, options={"verify_signature": False}) | {"email_verified": verified}
    lie = jwt.encode(claims, forge.key, algorithm=forge.alg, headers={"kid": forge.kid})
    with pytest.raises(Denied, match="has not been verified"):
        _verify(lie, named)


@pytest.mark.parametrize("until", [10**400, 1e300, "1e400", 10**18])
def test_a_token_that_never_ends_breaks_nothing(forge: Forge, until: Any) -> None:
    with contextlib.suppress(Denied):
        assert _verify(forge.token(exp=until), issuer(forge.url)).expires_s * 1000 < 2**63


def _signed_by_nobody(url: str) -> str:
    return jwt.encode({"iss": url, "aud": "x", "sub": "x"}, "x" * 64, algorithm="HS256", headers={"kid": "k1"})


def _verify(token: str, believed: Issuer) -> Any:
    async def main() -> Any:
        return await OidcVerifier().verify(token, [believed])

    return run(main())


# --- what a daemon keeps in memory -----------------------------------------------------------------------------------

DAEMON = """
import ctypes, os, subprocess, sys
from pathlib import Path
from spinetta.config import resolve
from spinetta.node import start

async def main(settings, data_dir):
    own = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)  # PR_GET_DUMPABLE
    child = "1"
    if os.geteuid():  # what the kernel keeps to itself belongs to root there
        owner = subprocess.run(["stat", "-c", "%u", "/proc/self/"], capture_output=True, check=True).stdout
        child = str(int(int(owner) == os.geteuid()))
    folder = os.open(data_dir, os.O_PATH)  # as the way to the shim's socket
    print(own, child, sorted(os.listdir(f"/proc/self/fd/{folder}")))
    return 0

(Path(sys.argv[1]) / "here").touch()
if len(sys.argv) > 2:
    os.setresuid(65534, 65534, 65534)
start._main = main
raise SystemExit(start.run(resolve({}, {}, (), {"name": "n1", "data_dir": sys.argv[1]})))
"""


@pytest.mark.parametrize("as_user", [[], ["nobody"]])
def test_a_daemon_leaves_no_core_dump_and_its_memory_to_itself(as_user: list[str]) -> None:
    with tempfile.TemporaryDirectory() as data_dir:
        Path(data_dir).chmod(0o755)  # unlike pytest's own folders, so that another user finds the way
        ran = subprocess.run(
            [sys.executable, "-c", DAEMON, data_dir, *as_user], capture_output=True, text=True, timeout=60, check=False
        )
    assert ran.stdout.split(maxsplit=2)[:2] == ["0", "1"], ran
    assert "here" in ran.stdout


# --- the audit log ---------------------------------------------------------------------------------------------------


def test_calls_without_end_do_not_make_the_log_forget_itself(tmp_path: Path) -> None:
    """A hundred calls a second reach the hundred-millionth line in eleven days."""
    chain = audit._Chain(99_999_996)
    for i in range(4):
        log = audit.AuditLog(tmp_path, "n1", chain, file_bytes_max=1, files_max=3) if not i else None
        log = log or audit.open_log(tmp_path, "n1", file_bytes_max=1, files_max=3)
        log.record("submit", "user ann", f"task {i}", "ok")
        log.close()
    tail = auditreading.Tail(tmp_path)
    assert [e.seq for e in tail.read()] == [99_999_998, 99_999_999, 100_000_000]
    audit_log = audit.open_log(tmp_path, "n1", file_bytes_max=1, files_max=3)
    audit_log.record("submit", "user ann", "task 4", "ok")
    audit_log.close()
    assert [e.seq for e in tail.read()] == [100_000_001]
    assert auditreading.verify(tmp_path).faults == ()
    assert len(list(tmp_path.iterdir())) == 3
