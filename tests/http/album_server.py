"""`crudstack serve` with the model of albums, and with a bearer token for each name in ALBUM_CALLERS."""

from __future__ import annotations

import hashlib
import os

from app import authentication, cli, models
from app.autocrud import Permissions, Principal, own
from app.autocrud.access import anyone
from tests.http import albums


def main() -> None:
    models.register = albums.register
    if callers := os.environ.pop("ALBUM_CALLERS", ""):
        tokens = {hashlib.sha256(name.encode()).hexdigest(): Principal(name=name) for name in callers.split(",")}
        authentication.authenticator = lambda _: authentication.BearerTokens(tokens)
        models.authorize = Permissions({"album": {"create": anyone, "*": own}})
    cli.main()
