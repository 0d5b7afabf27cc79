"""Who is let in, by what the stack's settings say: nobody asked, a bearer token, or a JSON Web Token that API Gateway has verified."""

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
    """None lets everybody in."""
    if isinstance(auth, TokenAuth):
        return BearerTokens({auth.token_sha256: TOKEN_PRINCIPAL})
    if isinstance(auth, JwtAuth):
        return GatewayJwt(auth)
    return None


class BearerTokens:
    """`Authorization: Bearer ...` with a token whose SHA-256 (hex) is a key here. A token is long and random, so one round of SHA-256 does."""

    def __init__(self, principals: Mapping[str, Principal]) -> None:
        self._principals = [(bytes.fromhex(digest), principal) for digest, principal in principals.items()]

    def __call__(self, request: Request) -> Principal:
        header = request.header(b"authorization")
        if header is None:
            raise Unauthenticated("send the token as Authorization: Bearer ...")
        scheme, _, token = header.partition(" ")
        given = hashlib.sha256(token.strip().encode("latin-1")).digest()
        # All are compared, each in constant time: how long it takes says nothing of any.
        found = [principal for digest, principal in self._principals if hmac.compare_digest(digest, given)]
        if scheme.lower() != "bearer" or not found:
            raise _Refused("this token is not known")
        return found[0]


class GatewayJwt:
    """The claims that an HTTP API's JWT authorizer has verified. They stand in the event, where no client can write."""

    def __init__(self, auth: JwtAuth) -> None:
        self._auth = auth

    def __call__(self, request: Request) -> Principal:
        claims = _claims(request.scope.get("aws.event"))
        if claims is None:
            raise Unauthenticated("API Gateway has verified no token: send one as Authorization: Bearer ...")
        audiences = {*_words(claims.get("aud")), *_words(claims.get("client_id"))}
        if claims.get("iss") != self._auth.issuer or audiences.isdisjoint(self._auth.audiences):
            raise _Refused("this token is of another issuer, or for another audience")
        name = claims.get(self._auth.name_claim)
        if not isinstance(name, str) or not name:
            raise _Refused(f"this token has no claim {self._auth.name_claim!r}, which says who asks")
        return Principal(name=name, roles=frozenset(_words(claims.get(self._auth.roles_claim))), claims=claims)


class _Refused(Unauthenticated):
    """There was a token, and it is no good (RFC 6750, 3.1)."""

    challenge = 'Bearer error="invalid_token"'


def _claims(event: Any) -> dict[str, Any] | None:
    found = event
    for name in ("requestContext", "authorizer", "jwt", "claims"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else None


def _words(claim: Any) -> list[str]:
    """The values of a claim: a list, words with blanks between, or a list as API Gateway writes it, `[a b]`, whose values hold no blanks."""
    if isinstance(claim, str):
        return claim.removeprefix("[").removesuffix("]").split(" ")
    return [value for value in claim if isinstance(value, str)] if isinstance(claim, list) else []
