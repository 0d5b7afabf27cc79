"""A stand-in for Secrets Manager, STS and S3 that records which access key signed each request."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

IDENTITY = """<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><GetCallerIdentityResult>
<Arn>arn:aws:iam::111111111111:user/alice</Arn><UserId>id</UserId><Account>111111111111</Account>
</GetCallerIdentityResult></GetCallerIdentityResponse>"""
DENIED = "<Error><Code>AccessDenied</Code><Message>not here</Message></Error>"


class SignerDouble:
    """`signers` lists the service and the access key of each request. S3 denies everything.

    secret    the answer of Secrets Manager
    """

    def __init__(self, secret: str = "") -> None:
        self.signers: list[tuple[str, str]] = []
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                credential = self.headers.get("Authorization", "").partition("Credential=")[2].partition(",")[0]
                key, _, _, service, *_ = [*credential.split("/"), "", "", "", ""]
                double.signers.append((service, key))
                status, kind, text = {
                    "secretsmanager": (200, "application/x-amz-json-1.1", json.dumps({"SecretString": secret})),
                    "sts": (200, "text/xml", IDENTITY),
                }.get(service, (403, "application/xml", DENIED))
                body = b"" if self.command == "HEAD" else text.encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815

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
