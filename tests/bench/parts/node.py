"""`avb up` as operators run it, in a process of its own, on a fresh directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil


class Node:
    """A node with the offline engines below `directory`; `environ` are further settings."""

    def __init__(self, directory: Path, **environ: str) -> None:
        self.directory = directory
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "AVB_DATA": str(directory / "data"),
            "AVB_ENGINE": "offline",
            **environ,
        }
        self.process: subprocess.Popen[str] | None = None
        self.url = ""
        self._port = 0

    @property
    def pid(self) -> int:
        """Of the node's own process."""
        assert self.process is not None
        return self.process.pid

    @property
    def operator(self) -> str:
        """The operator's key."""
        return (self.directory / "data" / "operator.key").read_text().strip()

    def start(self) -> None:
        """Start it, again on the port that it had; returns when a turn can be spoken."""
        command = self.avb("up", "--port", str(self._port))
        self.process = subprocess.Popen(command, env=self.environ, stdout=subprocess.PIPE, stderr=sys.stderr, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("ready "):
            raise SystemExit("the node did not start")
        self.url = line.split()[1]
        self._port = int(self.url.rpartition(":")[2])

    def stop(self) -> None:
        """Stop it as an operator does."""
        if self.process is not None:
            self.process.terminate()
            self._gone()

    def kill(self) -> None:
        """End it without warning, with all that it has started."""
        assert self.process is not None
        children = psutil.Process(self.pid).children(recursive=True)
        self.process.kill()
        self._gone()
        for child in children:
            try:
                child.kill()
                child.wait(10)
            except psutil.Error:
                pass

    def freeze(self) -> None:
        """Let it neither answer nor hang up, as when the cable is pulled."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def avb(self, *arguments: str) -> list[str]:
        """The command line of an `avb` command."""
        return [sys.executable, "-P", "-m", "agentvoicebox.admin_api.cli", *arguments]

    def tell(self, *arguments: str) -> dict[str, Any]:
        """What an `avb` command answers, in JSON."""
        command = self.avb(*arguments, "--json")
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, check=True)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def admit(self, slug: str, *voice: str, name: str = "Bench", scopes: str = "realtime") -> str:
        """Make a tenant of the largest plan; a key of it, without limits."""
        self.tell("tenant", "create", "--slug", slug, "--name", name, "--tier", "enterprise", *voice)
        made = self.tell(
            "key", "create", "--tenant", slug, "--name", "k", "--rate-class", "unlimited", "--scopes", scopes
        )
        return str(made["key"])

    def cpu(self) -> float:
        """Seconds of CPU that the node's own process has used."""
        return cpu(self.pid)

    def bus_url(self) -> str:
        """The address of a cell's bus."""
        conf = next((self.directory / "data" / "cells").glob("*/config/mycroft/mycroft.conf"))
        websocket = json.loads(conf.read_text())["websocket"]
        return f"ws://{websocket['host']}:{websocket['port']}{websocket['route']}"

    def _gone(self) -> None:
        assert self.process is not None
        self.process.wait(30)
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextmanager
def beside() -> Iterator[tuple[Path, Node]]:
    """A directory for what is to be measured, and a node that runs until the block ends."""
    with tempfile.TemporaryDirectory(prefix="avb-bench-") as name:
        node = Node(Path(name) / "node")
        node.directory.mkdir()
        node.start()
        try:
            yield Path(name), node
        finally:
            node.kill()


def cpu(pid: int) -> float:
    """Seconds of CPU all threads of a process have used, by the scheduler's own clock (nanoseconds, Linux)."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9
