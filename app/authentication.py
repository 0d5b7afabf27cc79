"""Authentication as the settings select it: none, a bearer token, or a JSON Web Token that API Gateway has verified."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from typing import Any

from .autocrud.access import Principal, Unauthenticated
from .autocrud.http.guard import Authenticate
from .autocrud.http.messages import Request
from .settings import Auth, JwtAuth, TokenAuth

TOKEN_PRINCIPAL = Principal(name="token", roles=frozenset({"admin"}))


def authenticator(auth: Auth | None) -> Authenticate | None:
    """Return the authenticator that the settings select; None gives every caller access."""
    if isinstance(auth, TokenAuth):
        return BearerTokens({auth.token_sha256: TOKEN_PRINCIPAL})
    if isinstance(auth, JwtAuth):
        return GatewayJwt(auth)
    return None


class BearerTokens:
    """Authenticates `Authorization: Bearer TOKEN`. The keys of `principals` are SHA-256 digests of tokens, in hex.

    One round of SHA-256 suffices, because a token is long and random.
    """

    def __init__(self, principals: Mapping[str, Principal]) -> None:
        self._principals = [(bytes.fromhex(digest), principal) for digest, principal in principals.items()]

    def __call__(self, request: Request) -> Principal:
        """Return the principal of a request. Raises Unauthenticated if its token is missing or unknown."""
        header = request.header(b"authorization")
        if header is None:
            raise Unauthenticated("send the token as Authorization: Bearer ...")
        scheme, _, token = header.partition(" ")
        given = hashlib.sha256(token.strip().encode("latin-1")).digest()
        # All digests are compared, each in constant time, so the duration reveals nothing about them.
        found = [principal for digest, principal in self._principals if hmac.compare_digest(digest, given)]
        if scheme.lower() != "bearer" or not found:
            raise _Refused("this token is unknown")
        return found[0]


class GatewayJwt:
    """Uses the claims that the JWT authorizer of an HTTP API has verified. Clients cannot set these claims."""

    def __init__(self, auth: JwtAuth) -> None:
        self._auth = auth

    def __call__(self, request: Request) -> Principal:
        """Return the principal of a request. Raises Unauthenticated if its claims are missing or refused."""
        claims = _claims(request.scope.get("aws.event"))
        if claims is None:
            raise Unauthenticated("API Gateway has verified no token: send one as Authorization: Bearer ...")
        audiences = {*_words(claims.get("aud")), *_words(claims.get("client_id"))}
        if claims.get("iss") != self._auth.issuer or audiences.isdisjoint(self._auth.audiences):
            raise _Refused("this token has another issuer or another audience")
        name = claims.get(self._auth.name_claim)
        if not isinstance(name, str) or not name:
            raise _Refused(f"this token has no claim {self._auth.name_claim!r}, which names the caller")
        return Principal(name=name, roles=frozenset(_words(claims.get(self._auth.roles_claim))), claims=claims)


class _Refused(Unauthenticated):
    """The request has a token that is not valid (RFC 6750, 3.1)."""

    challenge = 'Bearer error="invalid_token"'


def _claims(event: Any) -> dict[str, Any] | None:
    found = event
    for name in ("requestContext", "authorizer", "jwt", "claims"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else None


def _words(claim: Any) -> list[str]:
    """Return the values of a claim, which is a list, a text with spaces between words, or API Gateway's `[a b]`."""
    if isinstance(claim, str):
        return claim.removeprefix("[").removesuffix("]").split(" ")
    return [value for value in claim if isinstance(value, str)] if isinstance(claim, list) else []
