"""Request bodies: read within a bound, and checked by the same structures that the sockets use."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

import msgspec
from fastapi import Request

from agentvoicebox.admin_api import visits
from agentvoicebox.config.errors import AvbError, BadInput, TooLarge

T = TypeVar("T")

_FIELD = re.compile(r"(?:unknown field|required field) `([^`]*)`")
_INDEX = re.compile(r"\[[^]]*\]")
_JSON = re.compile(r"application/(?:[a-z0-9.-]+\+)?json\s*(?:;.*)?", re.IGNORECASE)


class Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A request body. What may be left out has a default; nothing may be null that does not say so."""


class UnsupportedMediaType(AvbError):
    """The body is not of a kind that its route reads."""

    status = 415
    default_code = "unsupported_media_type"


class ClientGone(AvbError):
    """The client went away before its body had ended; nobody reads this."""

    status = 400
    default_code = "request_incomplete"


async def read(request: Request, kind: type[T]) -> T:
    """The request's JSON body; an empty body is an empty object. Raises `BadInput` naming the field, or `TooLarge`."""
    given = request.headers.get("content-type")
    if given is not None and not _JSON.fullmatch(given):
        raise UnsupportedMediaType("The body must be JSON: send Content-Type: application/json.")
    return decode(await received(request), kind)


async def received(request: Request) -> bytes:
    """The request's body as it is, within the bound of its route. Raises `TooLarge`."""
    most = visits.of(request.scope).most
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("The request ended before its body.")
        body += message.get("body", b"")
        if len(body) > most:
            raise TooLarge(f"A request body holds at most {most} bytes here.")
        if not message.get("more_body"):
            return bytes(body)


def decode(body: bytes, kind: type[T]) -> T:
    """JSON as `kind`. Raises `BadInput` naming the field."""
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at `$")
        path = _INDEX.sub("", place.rstrip("`")).lstrip(".")
        if (missing := _FIELD.search(text)) is not None:
            path = f"{path}.{missing.group(1)}".lstrip(".")
        raise BadInput(f"{text}.", param=path or "body") from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise BadInput(f"The body is not valid JSON: {error}.", param="body") from error


def changes(body: msgspec.Struct) -> dict[str, Any]:
    """The fields of `body` that were given."""
    found = {name: getattr(body, name) for name in body.__struct_fields__}
    return {name: value for name, value in found.items() if value is not msgspec.UNSET}


def document(kind: type[Any]) -> dict[str, Any]:
    """The OpenAPI `requestBody` of a route that reads `kind`."""
    (schema,), definitions = msgspec.json.schema_components([kind], ref_template="#/components/schemas/{name}")
    resolved = _inline(schema, definitions)
    body: dict[str, Any] = {"content": {"application/json": {"schema": resolved}}}
    if resolved.get("required"):
        body["required"] = True
    return {"requestBody": body}


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    """Resolve references in place: these bodies are small, and nothing else of the document refers to their parts."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inline(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
        return {name: _inline(value, definitions) for name, value in schema.items()}
    if isinstance(schema, list):
        return [_inline(value, definitions) for value in schema]
    return json.loads(json.dumps(schema))
