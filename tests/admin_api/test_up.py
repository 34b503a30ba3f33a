"""What `avb up` leaves its caller with when the server ends."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any, ClassVar

import pytest

from agentvoicebox.admin_api.cli import up
from agentvoicebox.config import settings
from agentvoicebox.config.errors import Unavailable
from agentvoicebox.tenancy import keys


class Stack:
    """Starts, and ends as `end` says."""

    url = "http://127.0.0.1:1"
    end: ClassVar[Any]
    operator_key_made: ClassVar[bool] = False
    stopped = False

    def __init__(self, *_: object) -> None:
        type(self).stopped = False

    async def start(self) -> None:
        """Is there at once."""

    async def finished(self) -> None:
        await type(self).end()

    async def stop(self) -> None:
        type(self).stopped = True


def serve(data: Path) -> None:
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        runner.run(up._serve(settings.load({"data": data}, environ={"HOME": str(data)})))


async def fails() -> None:
    raise OSError("no more sockets")


async def ends() -> None:
    """As a server does that was told to."""


async def is_told_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(60)


@pytest.fixture(autouse=True)
def stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "Stack", Stack)


@pytest.mark.parametrize("end", [fails, ends])
def test_a_server_that_ends_by_itself_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: Any):
    monkeypatch.setattr(Stack, "end", staticmethod(end), raising=False)
    with pytest.raises(Unavailable) as caught:
        serve(tmp_path)
    assert caught.value.code == "server_failed"
    assert Stack.stopped


def test_a_server_that_is_told_to_stop_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Stack, "end", staticmethod(is_told_to_stop), raising=False)
    serve(tmp_path)
    assert Stack.stopped


@pytest.mark.parametrize("first", [True, False])
def test_the_operator_is_told_of_the_key_once_and_never_reads_it_in_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], first: bool
):
    secret, _ = keys.operator_key(tmp_path)
    monkeypatch.setattr(Stack, "end", staticmethod(is_told_to_stop), raising=False)
    monkeypatch.setattr(Stack, "operator_key_made", first)
    serve(tmp_path)
    said = "".join(capfd.readouterr())
    assert (str(tmp_path / "operator.key") in said) is first
    assert secret not in said
