"""The error vocabulary: what every door relies on."""

from __future__ import annotations

import inspect
import re

import pytest

from agentvoicebox.config import errors
from agentvoicebox.config.errors import AvbError, BadInput, RateLimited, unexpected

VOCABULARY = [
    each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, AvbError) and each != AvbError
]


@pytest.mark.parametrize("error", VOCABULARY)
def test_each_has_a_status_a_code_and_a_sentence(error: type[AvbError]) -> None:
    raised = error("Say it again.", **({"retry_after": 1.0} if error is RateLimited else {}))
    assert 400 <= raised.status < 600
    assert re.fullmatch(r"[a-z_]+", raised.code)
    assert (str(raised), raised.message, raised.param) == ("Say it again.", "Say it again.", None)
    assert error.__doc__


def test_statuses_and_codes_tell_them_apart() -> None:
    assert len({error.status for error in VOCABULARY}) == len(VOCABULARY)
    assert len({error.default_code for error in VOCABULARY}) == len(VOCABULARY)


def test_the_tree_at_the_top_names_them_all_with_their_status() -> None:
    drawn = dict(re.findall(r"── (\w+) +(\d+)", errors.__doc__ or ""))
    assert drawn == {error.__name__: str(error.status) for error in VOCABULARY}


def test_a_code_and_a_parameter_can_be_more_precise() -> None:
    error = BadInput("The audio has an odd length.", code="invalid_audio", param="audio")
    assert (error.code, error.param, error.status) == ("invalid_audio", "audio", 400)


def test_what_nobody_classified_is_internal() -> None:
    assert (AvbError("?").status, AvbError("?").code) == (500, "internal_error")


def test_what_nobody_expected_is_named_by_type_and_place_not_by_its_words() -> None:
    with pytest.raises(ValueError, match="cat") as raised:
        raise ValueError("my cat is called Schroedinger")
    assert unexpected(raised.value) == f"ValueError at config/test_errors.py:{raised.tb.tb_lineno}"
    assert unexpected(KeyError("Schroedinger")) == "KeyError at nowhere"
