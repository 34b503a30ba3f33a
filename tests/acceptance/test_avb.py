"""The command line from the outside, as its contract says: nothing but processes, files and sockets."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

STAGES = ["vad", "stt", "core", "tts", "first_audio", "total"]


class Installation:
    """One data directory and the commands on it."""

    def __init__(self, directory: Path) -> None:
        self.data = directory / "data"
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "AVB_DATA": str(self.data),
            "AVB_ENGINE": "offline",
        }

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-m", "agentvoicebox.admin_api.cli", *arguments]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, text=True, env=self.environ, cwd=self.data.parent, **(pipes | options))

    def avb(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def json(self, *arguments: str) -> dict[str, Any]:
        done = self.avb(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.splitlines()
        return json.loads(line)


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return Installation(tmp_path_factory.mktemp("avb"))


@pytest.fixture(scope="module")
def node(installation: Installation) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`avb up`, and the address from its one line on stdout."""
    file = installation.data.parent / "stderr"
    with file.open("w") as errors:
        process = installation.start("up", "--port", "0", stderr=errors)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("ready http://127.0.0.1:"), file.read_text()
    yield process, line.split()[1]
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0, file.read_text()
    assert rest == "", "stdout has the one line"
    assert "avb_" not in file.read_text(), "no key is logged"


@pytest.fixture(scope="module")
def tenant(installation: Installation, node: Any) -> dict[str, Any]:
    made = installation.json("tenant", "create", "--slug", "acme", "--name", "Acme", "--persona-name", "Ada")
    assert made["slug"] == "acme"
    assert made["id"]
    key = installation.json("key", "create", "--tenant", "acme", "--name", "first")
    assert key["key"].startswith(key["prefix"])
    assert len(key["prefix"]) == 12
    return {**made, **key}


def test_a_spoken_turn(installation: Installation, node: Any, tenant: Any, speech: Callable[..., bytes]):
    question, answer = installation.data.parent / "question.wav", installation.data.parent / "answer.wav"
    with wave.open(str(question), "wb") as wav:
        wav.setparams((1, 2, 16_000, 0, "NONE", ""))
        wav.writeframes(speech("what time is it"))
    turn = installation.json("say", "--url", node[1], "--key", tenant["key"], str(question), "-o", str(answer))
    assert turn["transcript"] == "what time is it"
    assert turn["answer"]
    assert list(turn["timings_ms"]) == STAGES
    assert turn["timings_ms"]["first_audio"] > turn["timings_ms"]["vad"] > 0
    with wave.open(str(answer)) as wav:
        assert wav.getnframes() / wav.getframerate() == pytest.approx(turn["audio_seconds"], abs=0.01)
        assert turn["audio_seconds"] > 0.5


def test_a_written_turn(installation: Installation, node: Any, tenant: Any):
    turn = installation.json("say", "--url", node[1], "--key", tenant["key"], "--text", "who am i talking to")
    assert "Ada" in turn["answer"]
    assert turn["transcript"] == "who am i talking to"
    assert turn["audio_seconds"] > 0.5


def test_without_json_it_is_for_people(installation: Installation, node: Any, tenant: Any):
    done = installation.avb("say", "--url", node[1], "--key", tenant["key"], "--text", "who am i talking to")
    assert done.returncode == 0
    assert "answered:" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("tenant", "create", "--slug", "Acme!", "--name", "x2"), "slug"),
        (("tenant", "create", "--slug", "other", "--name", "Other", "--tier", "gold"), "tier"),
        (("tenant", "create", "--slug", "other", "--name", "Other", "--speed", "9"), "speed"),
        (("tenant", "create", "--slug", "other", "--name", "Other", "--wake-word", "hey xqzzkw"), "xqzzkw"),
        (("tenant", "create", "--slug", "acme", "--name", "Again"), "acme"),
        (("key", "create", "--tenant", "nobody", "--name", "x"), "tenant"),
        (("key", "create", "--tenant", "acme", "--name", "x", "--scopes", "root"), "scopes"),
        (("say", "--url", "URL", "--key", "avb_" + "x" * 43, "--text", "hello"), "key"),
        (("say", "--url", "nonsense", "--key", "K", "--text", "hello"), "address"),
        (("say", "--url", "URL", "--key", "KEY", "missing.wav"), "WAV"),
        (("models", "pull", "no-such-model"), "no-such-model"),
        (("up", "--host", "0.0.0.0"), "tls"),
        (("up", "--port", "70000"), "port"),
    ],
)
def test_wrong_input_gets_one_line_and_exit_code_2(
    installation: Installation, node: Any, tenant: Any, arguments: tuple[str, ...], complaint: str
):
    given = [{"URL": node[1], "KEY": tenant["key"]}.get(argument, argument) for argument in arguments]
    done = installation.avb(*given)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert complaint.lower() in line.lower()


def test_the_life_of_a_tenant(installation: Installation, node: Any, tmp_path: Path):
    """Made, looked at, suspended, let in again, closed, exported and erased, beside a running node."""
    made = installation.json("tenant", "create", "--slug", "globex", "--name", "Globex", "--email", "it@globex.example")
    key = installation.json("key", "create", "--tenant", "globex", "--name", "first")
    listed = installation.json("tenant", "list", "--search", "globex")
    assert [(each["slug"], each["api_keys"], each["projects"]) for each in listed["items"]] == [("globex", 1, 1)]
    shown = installation.json("tenant", "show", "globex")
    assert (shown["email"], shown["usage"]["api_keys"]) == ("it@globex.example", {"current": 1, "limit": 5})
    assert "Globex" in installation.avb("tenant", "list").stdout
    assert "1 of 5" in installation.avb("tenant", "show", "globex").stdout

    def say(secret: str) -> subprocess.CompletedProcess[str]:
        return installation.avb("say", "--url", node[1], "--key", secret, "--text", "who am i talking to")

    def refusal(secret: str) -> str:
        while (done := say(secret)).returncode == 0:
            pass
        assert done.returncode == 2
        return done.stderr

    assert say(key["key"]).returncode == 0
    assert installation.json("tenant", "suspend", "globex", "--reason", "unpaid")["status"] == "suspended"
    assert "suspended" in refusal(key["key"])
    assert installation.avb("tenant", "suspend", "globex", "--reason", "again").returncode == 2
    assert installation.json("tenant", "activate", "globex")["status"] == "active"
    assert say(key["key"]).returncode == 0

    new = installation.json("key", "rotate", key["id"], "--tenant", "globex", "--grace", "60")
    assert new["key"] != key["key"]
    assert [say(each["key"]).returncode for each in (key, new)] == [0, 0]
    assert installation.json("key", "revoke", key["id"], "--tenant", "globex") == {"id": key["id"], "revoked": True}
    assert "revoked" in refusal(key["key"])
    assert say(new["key"]).returncode == 0
    keys = installation.json("key", "list", "--tenant", "globex")["items"]
    assert {each["id"]: each["revoked_at"] is not None for each in keys} == {key["id"]: True, new["id"]: False}
    assert "revoked" in installation.avb("key", "list", "--tenant", "globex").stdout

    assert installation.avb("tenant", "erase", "globex", "--yes").returncode == 2, "it is not deleted"
    assert installation.json("tenant", "delete", "globex")["status"] == "deleted"
    file = tmp_path / "globex.jsonl"
    assert installation.avb("tenant", "export", "globex", "-o", str(file)).returncode == 0
    assert file.stat().st_mode & 0o777 == 0o600
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {"tenants", "projects", "api_keys", "sessions", "session_events", "audit_log"} <= {r["table"] for r in rows}
    assert key["key"] not in file.read_text()
    assert installation.avb("tenant", "erase", "globex").returncode == 2, "it was not confirmed"
    assert installation.json("tenant", "erase", "globex", "--yes")["erased"]["session_events"] > 0
    assert installation.avb("tenant", "show", "globex").returncode == 2
    assert installation.json("tenant", "show", f"erased-{made['id']}")["name"] == "Erased"


def test_a_second_up_on_the_same_directory_and_a_taken_port(installation: Installation, node: Any, tmp_path: Path):
    done = installation.avb("up", "--port", "0")
    assert done.returncode == 2
    assert "in use by another" in done.stderr.splitlines()[-1]
    port = node[1].rsplit(":", 1)[1]
    other = Installation(tmp_path)
    done = other.avb("up", "--port", port)
    assert done.returncode == 2
    assert f"Cannot listen on 127.0.0.1:{port}" in done.stderr.splitlines()[-1]
    assert sorted(path.name for path in other.data.iterdir()) == ["avb.lock"], "nothing half made"


def test_no_node_there(installation: Installation):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    done = installation.avb("say", "--url", f"http://127.0.0.1:{port}", "--key", "K", "--text", "hello")
    assert done.returncode == 1
    assert "avb up" in done.stderr


def test_the_doctor_and_the_models(installation: Installation, node: Any):
    findings = installation.json("doctor")["findings"]
    assert {"flite", "skills", "data directory", "PostgreSQL"} <= {finding["what"] for finding in findings}
    assert all(finding["remedy"] for finding in findings if finding["state"] != "ok")
    listed = installation.avb("models", "--json")
    assert {"faster-whisper-base", "kokoro"} <= {
        name for model in json.loads(listed.stdout) for name in (model["name"],)
    }


def test_the_operator_key_is_private(installation: Installation, node: Any):
    file = installation.data / "operator.key"
    assert file.stat().st_mode & 0o777 == 0o600
    assert installation.data.stat().st_mode & 0o007 == 0


def family(pid: int) -> list[psutil.Process]:
    """The process and all below it, with what they were called as in `info["cmdline"]`.

    Not `children()`: that compares times of start, which move with the clock.
    """
    psutil.process_iter.cache_clear()  # it leaves out whoever has got the number of one that it knew
    everyone = list(psutil.process_iter(["ppid", "cmdline"]))
    pids: set[int] = set()
    grown = {pid}
    while grown:
        pids |= grown
        grown = {process.pid for process in everyone if process.info["ppid"] in grown} - pids
    return [process for process in everyone if process.pid in pids]


def test_killing_it_leaves_nothing_running(tmp_path: Path):
    installation = Installation(tmp_path)
    with installation.start("up", "--port", "0", stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("ready ")
            members = family(process.pid)
        finally:
            process.kill()
    names = " ".join(" ".join(member.info["cmdline"] or ()) for member in members)
    assert "postgres" in names
    assert "core" in names
    _, alive = psutil.wait_procs(members, timeout=60)
    assert not alive, [member.info["cmdline"] for member in alive]
    # And the directory is good for another start.
    errors = tmp_path / "stderr"
    with errors.open("w") as file, installation.start("up", "--port", "0", stderr=file) as again:
        try:
            assert again.stdout is not None
            assert again.stdout.readline().startswith("ready "), errors.read_text()
            again.terminate()
            assert again.wait(timeout=60) == 0, errors.read_text()
        finally:
            again.kill()


def test_the_demo(tmp_path: Path):
    installation = Installation(tmp_path)
    result = installation.json("demo")
    assert result["ok"] is True
    assert len({turn["tenant"] for turn in result["turns"]}) == 2
    answers = {(turn["tenant"], turn["said"]): turn["answer"] for turn in result["turns"]}
    assert answers["demo-acme", "what time is it"] != answers["demo-globex", "what time is it"]
    assert "Ada" in answers["demo-acme", "who am i talking to"]
    assert "Max" in answers["demo-globex", "who am i talking to"]
    for turn in result["turns"]:
        with wave.open(turn["wav"]) as wav:
            assert wav.getnframes() > 0
    assert all(seconds > 0 for used in result["usage"].values() for seconds in used.values())
    deadline = time.monotonic() + 60
    while any(str(tmp_path) in " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline, "the demo leaves nothing running"
        time.sleep(0.1)
