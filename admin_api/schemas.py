"""Request bodies: read within a bound, and checked by the same structures that the sockets use."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import msgspec
from fastapi import Request

from agentvoicebox.config.errors import BadInput, TooLarge

T = TypeVar("T")

MAX_BODY = 64 * 1024
"""Bytes of a JSON body."""


async def read(request: Request, kind: type[T]) -> T:
    """The request's JSON body; an empty body is an empty object. Raises `BadInput` naming the field, or `TooLarge`."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise TooLarge(f"A request body holds at most {MAX_BODY} bytes.")
    try:
        return msgspec.json.decode(bytes(body) or b"{}", type=kind)
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at `$")
        raise BadInput(f"{text}.", param=place.rstrip("`").lstrip(".") or None) from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise BadInput(f"The body is not valid JSON: {error}.") from error


def document(kind: type[Any]) -> dict[str, Any]:
    """The OpenAPI `requestBody` of a route that reads `kind`."""
    (schema,), definitions = msgspec.json.schema_components([kind], ref_template="#/components/schemas/{name}")
    resolved = _inline(schema, definitions)
    return {"requestBody": {"content": {"application/json": {"schema": resolved}}}}


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    """Resolve references in place: these bodies are small, and nothing else of the document refers to their parts."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inline(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
        return {name: _inline(value, definitions) for name, value in schema.items()}
    if isinstance(schema, list):
        return [_inline(value, definitions) for value in schema]
    return json.loads(json.dumps(schema))
