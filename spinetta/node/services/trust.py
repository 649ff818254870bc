# ruff: noqa: D102, N802, ARG002 - RPCs are named, and told of, in the .proto file
"""``spinetta.v1.Trust``: each call to the part that knows it, by way of the desk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc.aio

from spinetta import names
from spinetta.node.keyring import Keyring
from spinetta.node.port import NodePort
from spinetta.node.services.authorities import AuthorityAdmin
from spinetta.node.services.desk import Desk
from spinetta.node.services.enroll import EnrollApi
from spinetta.node.services.nodeadmin import NodeAdmin
from spinetta.node.services.renew import Renewer
from spinetta.node.services.secrets import SecretDesk
from spinetta.node.services.tokenadmin import Tokens
from spinetta.node.services.tokendesk import TokenDesk
from spinetta.node.services.useradmin import UserAdmin
from spinetta.rights import Call
from spinetta.v1 import trust_pb2 as pb
from spinetta.v1 import trust_pb2_grpc as rpc

SERVICES = ("spinetta.v1.Enroll", "spinetta.v1.Trust")


class TrustApi(rpc.TrustServicer):
    """For those with an identity. `keyring` is None on a worker and in an open cluster."""

    def __init__(self, port: NodePort, desk: Desk, keyring: Keyring | None) -> None:
        self._desk = desk
        self._renewer = Renewer(port, keyring)
        self._tokens = Tokens(port, keyring)
        self._nodes = NodeAdmin(port, keyring)
        self._users = UserAdmin(port, keyring)
        self._authorities = AuthorityAdmin(port, keyring)
        self._secrets = SecretDesk(port)

    # --- oneself ---

    async def WhoAmI(self, request: pb.WhoAmIRequest, context: Any) -> pb.WhoAmIResponse:
        return await self._desk.answer(context, Call.WHOAMI, self._renewer.who)

    async def Renew(self, request: pb.RenewRequest, context: Any) -> pb.RenewResponse:
        return await self._desk.answer(context, Call.RENEW, lambda asked: self._renewer.renew(request, asked))

    async def GetTrust(self, request: pb.GetTrustRequest, context: Any) -> pb.GetTrustResponse:
        return await self._desk.answer(context, Call.WHOAMI, self._renewer.trust)

    # --- tokens ---

    async def CreateToken(self, request: pb.CreateTokenRequest, context: Any) -> pb.CreateTokenResponse:
        return await self._desk.answer(context, Call.TOKENS, lambda asked: self._tokens.create(request, asked))

    async def ListTokens(self, request: pb.ListTokensRequest, context: Any) -> pb.ListTokensResponse:
        return await self._desk.answer(context, Call.TOKENS, lambda _: self._tokens.everything(), subject="list")

    async def RevokeToken(self, request: pb.RevokeTokenRequest, context: Any) -> pb.RevokeTokenResponse:
        return await self._desk.answer(context, Call.TOKENS, lambda asked: self._tokens.revoke(request, asked))

    # --- rights ---

    async def ListAccess(self, request: pb.ListAccessRequest, context: Any) -> pb.ListAccessResponse:
        return await self._desk.answer(context, Call.ACCESS_LIST, lambda _: self._nodes.everybody())

    async def DecideJoin(self, request: pb.DecideJoinRequest, context: Any) -> pb.DecideJoinResponse:
        verb = "approve" if request.approve else "reject"
        return await self._desk.answer(
            context,
            Call.ACCESS_CHANGE,
            lambda asked: self._nodes.decide(request, asked),
            subject=f"{verb} {request.name[: names.NODE_NAME_MAX]}",
        )

    async def SetNode(self, request: pb.SetNodeRequest, context: Any) -> pb.SetNodeResponse:
        return await self._desk.answer(context, Call.ACCESS_CHANGE, lambda asked: self._nodes.set(request, asked))

    async def SetUser(self, request: pb.SetUserRequest, context: Any) -> pb.SetUserResponse:
        return await self._desk.answer(context, Call.ACCESS_CHANGE, lambda asked: self._users.set_user(request, asked))

    async def SetGroup(self, request: pb.SetGroupRequest, context: Any) -> pb.SetGroupResponse:
        return await self._desk.answer(context, Call.ACCESS_CHANGE, lambda asked: self._users.set_group(request, asked))

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: Any) -> pb.GetPolicyResponse:
        return await self._desk.answer(context, Call.POLICY, lambda _: self._users.get_policy(), subject="see")

    async def SetPolicy(self, request: pb.SetPolicyRequest, context: Any) -> pb.SetPolicyResponse:
        return await self._desk.answer(context, Call.POLICY, lambda asked: self._users.set_policy(request, asked))

    # --- authorities ---

    async def RotateAuthority(self, request: pb.RotateAuthorityRequest, context: Any) -> pb.RotateAuthorityResponse:
        return await self._desk.answer(
            context, Call.AUTHORITIES, lambda asked: self._authorities.rotate(request, asked)
        )

    async def ListAuthorities(self, request: pb.ListAuthoritiesRequest, context: Any) -> pb.ListAuthoritiesResponse:
        return await self._desk.answer(context, Call.AUTHORITIES, lambda _: self._authorities.show(), subject="list")

    # --- labels and secrets ---

    async def GetLabelKeys(self, request: pb.GetLabelKeysRequest, context: Any) -> pb.GetLabelKeysResponse:
        return await self._desk.answer(
            context, Call.LABEL_KEYS, lambda asked: self._secrets.get_label_keys(asked, request)
        )

    async def GetLabelStates(self, request: pb.GetLabelStatesRequest, context: Any) -> pb.GetLabelStatesResponse:
        return await self._desk.answer(
            context, Call.GATEWAY, lambda asked: self._secrets.get_label_states(asked, request)
        )

    async def UpdateLabelKey(self, request: pb.UpdateLabelKeyRequest, context: Any) -> pb.UpdateLabelKeyResponse:
        return await self._desk.answer(
            context, Call.GATEWAY, lambda asked: self._secrets.update_label_key(asked, request)
        )

    async def PutSecret(self, request: pb.PutSecretRequest, context: Any) -> pb.PutSecretResponse:
        return await self._desk.answer(context, Call.SECRETS, lambda asked: self._secrets.put_secret(asked, request))

    async def ListSecrets(self, request: pb.ListSecretsRequest, context: Any) -> pb.ListSecretsResponse:
        return await self._desk.answer(context, Call.SECRETS, lambda asked: self._secrets.list_secrets(asked, request))

    async def RemoveSecret(self, request: pb.RemoveSecretRequest, context: Any) -> pb.RemoveSecretResponse:
        return await self._desk.answer(context, Call.SECRETS, lambda asked: self._secrets.remove_secret(asked, request))


def register(
    server: grpc.aio.Server, port: NodePort, desk: Desk, keyring: Keyring | None, checker: TokenDesk | None = None
) -> Sequence[str]:
    """Add both services to a server; how they are called. `keyring` is None on a worker and in an open cluster."""
    rpc.add_EnrollServicer_to_server(EnrollApi(port, desk, keyring, checker), server)
    rpc.add_TrustServicer_to_server(TrustApi(port, desk, keyring), server)
    return SERVICES
