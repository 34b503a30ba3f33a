"""The document that describes the service, and a page that shows it without fetching anything from anywhere."""

from __future__ import annotations

import re
from html import escape
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.routing import Match

from agentvoicebox.admin_api import auth, errors

ABOUT = """Tenants, their settings, projects, keys, devices, wake words, personas, sessions, usage and audit log.

Send a key as `Authorization: Bearer avb_…` or `X-API-Key`, never in a URL. A tenant's key acts for its tenant only; the
operator's names the tenant with `X-Tenant-ID` where the path does not. Every answer carries `X-Request-ID` (a valid
`X-Request-ID` of yours comes back as `X-Correlation-ID`) and, but for `/health`, `X-RateLimit-Limit`,
`X-RateLimit-Remaining` and `X-RateLimit-Reset` (epoch seconds). A slash at the end of a path changes nothing. `/api/v1`
serves the same and is deprecated."""

_REASONS = {
    400: "Something in the request is wrong; `details` says where.",
    401: "There is no credential, or not a good one.",
    403: "The credential is not good for this, the tenant is suspended, or has reached a limit.",
    404: "There is no such thing, or it is not yours.",
    409: "It exists already, or is in a state that does not allow this.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too many requests; `retry_after` says how long to wait.",
    500: "Something went wrong on our side.",
    503: "Something we depend on does not answer; try again.",
}
_WRITES = ("post", "put", "patch", "delete")


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of `app`."""
    made = get_openapi(title=app.title, version=app.version, description=ABOUT, routes=app.routes)
    components = made.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    (_,), definitions = msgspec.json.schema_components([errors.Error], ref_template="#/components/schemas/{name}")
    schemas["Error"] = definitions["Error"]
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "A key of a tenant, or the operator's."},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    admissions = {
        (route.path_format, method.lower()): auth.admission(route) for route in routes(app) for method in methods(route)
    }
    for path, item in made["paths"].items():
        for method, operation in item.items():
            # Not by the function, which may stand at several addresses.
            operation["operationId"] = method + re.sub(r"\W+", "_", path.removeprefix("/api/v2")).rstrip("_")
            _complete(operation, path, method, admissions[path, method])
    return made


def routes(app: FastAPI) -> list[APIRoute]:
    """All routes of the service, wherever they were declared."""
    found = [context.original_route for context in iter_route_contexts(app.routes)]
    assert all(isinstance(route, APIRoute) for route in found), "another way in would say of nobody who may use it"
    return [route for route in found if isinstance(route, APIRoute)]


def allowed(app: FastAPI, scope: Any) -> list[str]:
    """The methods that the address of a request knows."""
    found: set[str] = set()
    for route in routes(app):
        if route.matches(scope)[0] is not Match.NONE:
            found |= route.methods or set()
    return sorted(found | {"HEAD"} if "GET" in found else found)


def methods(route: APIRoute) -> list[str]:
    """The methods of a route, in order."""
    return sorted(route.methods or ())


def page(document: dict[str, Any]) -> str:
    """The document as one plain page."""
    rows = []
    for path, item in document["paths"].items():
        for method, operation in item.items():
            told = escape(operation.get("description") or operation.get("summary") or "")
            rows.append(
                f"<tr><td><code>{method.upper()}</code></td><td><code>{escape(path)}</code></td>"
                f"<td>{told}</td><td>{escape(operation['x-admission'])}</td></tr>"
            )
    info = document["info"]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["title"])}</title>'
        "<style>body{font:16px/1.5 sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        "td,th{text-align:left;vertical-align:top;padding:.3rem 1rem .3rem 0;border-top:1px solid #ccc}</style>"
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info['description'])}</p>"
        '<p>The whole document, with all fields: <a href="openapi.json">openapi.json</a></p>'
        f"<table><tr><th>Method<th>Path<th>What it does<th>Who may</tr>{''.join(rows)}</table></html>"
    )


def _complete(operation: dict[str, Any], path: str, method: str, admission: auth.Admission) -> None:
    operation["x-admission"] = admission.told
    answers = operation["responses"]
    answers.pop("422", None)
    expected = [500, 503]
    if not isinstance(admission, auth.Public):
        expected += [400, 401, 403, 404, 429]
        operation["security"] = [{"bearer": []}, {"header": []}]
        if method in _WRITES:
            expected += [409, 413, 415]
    else:
        expected += [400, 401, 429]
        if method in _WRITES:
            expected += [409, 413, 415]
        if "{" in path:
            expected.append(404)
    schema = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for status in sorted(expected):
        answers.setdefault(str(status), {"description": _REASONS[status], "content": schema})
