"""A page that shows the OpenAPI document. All assets come from a wheel, none from a CDN.

The wheel (fastapi-offline) belongs to the extra `local`. Without it, for example on AWS Lambda, there is no page.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

ASSETS = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
    "favicon.png": "image/png",
}

PAGE_HEADERS = {
    # The HTML has inline scripts and styles, and the styles have inline images.
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
        " object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
}
"""Headers of the docs page: other pages cannot frame it, and it runs no scripts of other origins."""


def assets() -> Path | None:
    """Return the directory of the assets, or None if the wheel is not installed. The package is not imported."""
    spec = importlib.util.find_spec("fastapi_offline")
    if spec is None or spec.origin is None:
        return None
    directory = Path(spec.origin).parent / "static"
    return directory if all((directory / name).is_file() for name in ASSETS) else None


def serve_docs_page(app: Any) -> None:
    """Replace the docs pages of FastAPI, which load assets from a CDN, with a page that has local assets."""
    own = {app.docs_url, app.redoc_url, app.swagger_ui_oauth2_redirect_url} - {None}
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in own]
    directory = assets()
    if directory is None or app.docs_url is None or app.openapi_url is None:
        return

    async def page(request: Any) -> Any:
        from fastapi.openapi.docs import get_swagger_ui_html

        root = request.scope.get("root_path", "").rstrip("/")
        here = root + app.docs_url
        shown = get_swagger_ui_html(
            openapi_url=root + app.openapi_url,
            title=app.title,
            swagger_js_url=f"{here}/assets/swagger-ui-bundle.js",
            swagger_css_url=f"{here}/assets/swagger-ui.css",
            swagger_favicon_url=f"{here}/assets/favicon.png",
            swagger_ui_parameters={"docExpansion": "list", "tryItOutEnabled": True},
        )
        shown.headers.update(PAGE_HEADERS)
        return shown

    async def asset(request: Any) -> Any:
        from starlette.exceptions import HTTPException
        from starlette.responses import FileResponse

        name = request.path_params["name"]
        if name not in ASSETS:
            raise HTTPException(404)
        return FileResponse(directory / name, media_type=ASSETS[name])

    app.add_route(app.docs_url, page, include_in_schema=False)
    app.add_route(f"{app.docs_url}/assets/{{name}}", asset, include_in_schema=False)
