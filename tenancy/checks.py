"""What a piece of text from outside must look like."""

from __future__ import annotations

import re

from agentvoicebox.config.errors import BadInput


def words(value: object, param: str, shortest: int, longest: int) -> str:
    """Text for people: `shortest` to `longest` characters, no line breaks or other control characters."""
    if not isinstance(value, str) or not shortest <= len(value.strip()) or len(value) > longest:
        raise BadInput(f"{param} must be text of {shortest} to {longest} characters.", param=param)
    if not value.isprintable():
        raise BadInput(f"{param} must not hold control characters.", param=param)
    return value


def shaped(value: object, param: str, shape: re.Pattern[str], like: str) -> str:
    """Text for machines, which must match `shape` as a whole; `like` describes it in the error."""
    if not isinstance(value, str) or not shape.fullmatch(value):
        raise BadInput(f"{param} must be {like}.", param=param)
    return value
