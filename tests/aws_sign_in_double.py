"""A stand-in for AWS's SSO portal, token service and STS, which botocore calls for a profile's credentials."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import parse_qs, urlsplit

ASSUMED = """<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult><AssumedRoleUser>
<AssumedRoleId>id:{session}</AssumedRoleId><Arn>{arn}</Arn></AssumedRoleUser><Credentials>
<AccessKeyId>{key}</AccessKeyId>
<SecretAccessKey>{secret}</SecretAccessKey><SessionToken>{token}</SessionToken><Expiration>{ends}</Expiration>
</Credentials></AssumeRoleResult></AssumeRoleResponse>"""
DENIED = """<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type>
<Code>AccessDenied</Code><Message>alice may not assume this role</Message></Error></ErrorResponse>"""


class SignInDouble:
    """Answers on a loopback port. `asked` lists each request: the operation, and the identity of the caller.

    Each answer has different keys.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.lives = timedelta(hours=1)
        self.token = "sso-token"  # noqa: S105
        self.denied = False
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                token = self.headers.get("x-amz-sso_bearer_token", "")
                double.asked.append(("GetRoleCredentials", token))
                if token != double.token:
                    self.answer(
                        401,
                        "application/json",
                        json.dumps({"__type": "UnauthorizedException", "message": "no session"}),
                    )
                    return
                query = parse_qs(urlsplit(self.path).query)
                ends = datetime.now(UTC) + double.lives
                keys = {
                    "accessKeyId": f"{query['role_name'][0]}-{len(double.asked)}",
                    "secretAccessKey": "sso-secret",
                    "sessionToken": f"of-{query['account_id'][0]}",
                    "expiration": int(ends.timestamp() * 1000),
                }
                self.answer(200, "application/json", json.dumps({"roleCredentials": keys}))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                if self.path == "/token":
                    given = json.loads(body)
                    double.asked.append(("CreateToken", given["refreshToken"]))
                    double.token = "a-new-sso-token"  # noqa: S105
                    answer = {
                        "accessToken": double.token,
                        "expiresIn": 3600,
                        "refreshToken": "next",
                        "tokenType": "Bearer",
                    }
                    self.answer(200, "application/json", json.dumps(answer))
                    return
                signer = self.headers["Authorization"].partition("Credential=")[2].partition("/")[0]
                double.asked.append(("AssumeRole", signer))
                if double.denied:
                    self.answer(403, "text/xml", DENIED)
                    return
                given = parse_qs(body)
                self.answer(
                    200,
                    "text/xml",
                    ASSUMED.format(
                        session=given["RoleSessionName"][0],
                        arn=given["RoleArn"][0],
                        key=f"role-{len(double.asked)}",
                        secret="role-secret",  # noqa: S106
                        token="role-token",  # noqa: S106
                        ends=(datetime.now(UTC) + double.lives).strftime("%Y-%m-%dT%H:%M:%SZ"),
                    ),
                )

            def answer(self, status: int, kind: str, text: str) -> None:
                body = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def services(self) -> str:
        """Return the section of ~/.aws/config that sends botocore here."""
        endpoints = "".join(f"{name} =\n  endpoint_url = {self.url}\n" for name in ("sso", "sso_oidc", "sts"))
        return f"[services local]\n{endpoints}"
