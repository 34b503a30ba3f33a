"""Lists that are read a page at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.config.errors import BadInput

T = TypeVar("T")

LARGEST = 100
"""Rows of a page."""
_MOST_ROWS = 2**31
"""How far pages go; the database counts no further."""


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some of a list, and how long the whole list is."""

    items: Sequence[T]
    total: int
    page: int
    page_size: int


def check(page: int, page_size: int) -> None:
    """Raise `BadInput` unless `page` is 1 or more and `page_size` 1 to 100."""
    if page < 1 or page * LARGEST > _MOST_ROWS:
        raise BadInput("page must be 1 or more, and not astronomical.", param="page")
    if not 1 <= page_size <= LARGEST:
        raise BadInput(f"page_size must be 1 to {LARGEST}.", param="page_size")


async def turn_to(session: AsyncSession, query: Select[Any], page: int, page_size: int) -> Page[Any]:
    """That page of an ordered query over one entity. Raises `BadInput`."""
    check(page, page_size)
    total = await session.scalar(select(func.count()).select_from(query.order_by(None).subquery()))
    found = await session.execute(query.limit(page_size).offset((page - 1) * page_size))
    return Page(found.scalars().all(), total or 0, page, page_size)
