"""Lists over HTTP: a page at a time, or whole as a stream of lines."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Depends, Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict

from agentvoicebox.tenancy import pages, tables

T = TypeVar("T")

_PIECE = 32 * 1024
LAST_PAGE = 2**31 // pages.LARGEST


class View(BaseModel):
    """What an answer shows of a row."""

    model_config = ConfigDict(from_attributes=True)


class Listing(BaseModel, Generic[T]):
    """One page of a list."""

    items: list[T]
    total: int
    page: int
    page_size: int


@dataclass(frozen=True, slots=True)
class Paging:
    """Which page is asked for."""

    page: int
    size: int


async def _paging(
    page: Annotated[int, Query(ge=1, le=LAST_PAGE)] = 1,
    page_size: Annotated[int | None, Query(ge=1, le=pages.LARGEST)] = None,
    limit: Annotated[int | None, Query(ge=1, le=pages.LARGEST, description="The same as page_size.")] = None,
) -> Paging:
    return Paging(page, page_size or limit or 20)


Paged = Annotated[Paging, Depends(_paging)]


def listing(view: Callable[[Any], T], page: pages.Page[Any]) -> Listing[T]:
    """`page` as an answer, each row as `view` shows it."""
    items = [view(item) for item in page.items]
    return Listing(items=items, total=page.total, page=page.page, page_size=page.page_size)


async def csv_stream(
    name: str, columns: Sequence[str], rows: AsyncGenerator[dict[str, Any], None]
) -> StreamingResponse:
    """A table to download, made as it is sent. Raises what its first rows raise."""
    return await attachment(name, "csv", _csv(columns, rows))


async def attachment(name: str, suffix: str, pieces: AsyncGenerator[str | bytes, None]) -> StreamingResponse:
    """A file to download. Raises what its first piece raises: once the answer has begun it could not tell any more."""
    first = await anext(pieces, "")
    kind = {"csv": "text/csv", "json": "application/json"}[suffix]
    disposition = {"Content-Disposition": f'attachment; filename="{name}.{suffix}"'}
    return StreamingResponse(_all(first, pieces), media_type=f"{kind}; charset=utf-8", headers=disposition)


CSV: dict[int | str, dict[str, Any]] = {
    200: {"description": "A table.", "content": {"text/csv": {"schema": {"type": "string"}}}}
}
"""The OpenAPI `responses` of a route that answers with `csv_stream`."""


async def _all(first: str | bytes, rest: AsyncGenerator[str | bytes, None]) -> AsyncIterator[str | bytes]:
    async with aclosing(rest):
        yield first
        async for piece in rest:
            yield piece


async def _csv(columns: Sequence[str], rows: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[str | bytes, None]:
    table = tables.row(columns)
    async with aclosing(rows):
        # A write for each row would cost more than the row.
        async for row in rows:
            table += tables.row(row.get(column) for column in columns)
            if len(table) > _PIECE:
                yield table
                table = ""
    yield table
