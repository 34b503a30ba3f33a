"""`avb device` as somebody uses it: against a real platform, against none, and with everything that can be wrong."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentvoicebox.admin_api import cli
from agentvoicebox.admin_api.cli import device as command
from agentvoicebox.admin_api.cli import plain
from agentvoicebox.plugins.device import local

NOBODY = "http://127.0.0.1:9"
"""Where no platform is."""

PATIENT = """
import sys
from agentvoicebox.plugins.device import checkup, connection
checkup.WAIT = connection.OPENING = 60.0
from agentvoicebox.admin_api.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""`avb`, but with more patience for a platform: that of the tests may stand still."""

Avb = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, on a machine with nothing but stock OVOS, whose messagebus does not run."""
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_DIRS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    for name in ("OVOS_DISTRIBUTION_CONFIG", "MYCROFT_SYSTEM_CONFIG"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    conf(tmp_path).parent.mkdir(parents=True)
    conf(tmp_path).write_text('{"websocket": {"port": 9}}')
    monkeypatch.setattr(command.checkup, "WAIT", 60.0)
    return tmp_path


def conf(home: Path) -> Path:
    return home / "xdg_config_home" / "mycroft" / "mycroft.conf"


def key_file(home: Path) -> Path:
    return home / "xdg_config_home" / "agentvoicebox" / "device.key"


@pytest.fixture
def avb(capsys: pytest.CaptureFixture[str]) -> Avb:
    """Runs `avb device …`: exit code, standard output and error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["device", *arguments])
        return code, *capsys.readouterr()

    return run


# --- init -------------------------------------------------------------------------------------------------------------


def test_init_writes_the_lines_and_shows_them_and_a_second_time_nothing(avb: Avb, home: Path) -> None:
    code, out, _ = avb("init", "--url", NOBODY)
    assert code == 0
    assert "stt.module" in out
    assert '"ovos-stt-plugin-server"' in out
    assert "fallback_medium, agentvoicebox-persona, fallback_low" in " ".join(out.split())
    assert "Not checked: 127.0.0.1:9 refuses the connection" in out
    assert "avb device pair" in out
    told = json.loads(conf(home).read_text())
    assert told["agentvoicebox"] == {"url": NOBODY, "key_file": str(key_file(home))}
    assert told["websocket"] == {"port": 9}
    held = conf(home).read_bytes()
    code, out, _ = avb("init", "--url", NOBODY + "/", "--json")
    assert code == 0
    assert json.loads(out)["changes"] == []
    assert conf(home).read_bytes() == held


def test_a_key_goes_into_its_file_and_nowhere_else(avb: Avb, home: Path) -> None:
    key = "avb_" + "k" * 43
    code, out, told = avb("init", "--url", NOBODY, "--key", key)
    assert code == 0
    assert key_file(home).read_text().strip() == key
    assert stat.S_IMODE(key_file(home).stat().st_mode) == 0o600
    assert key not in conf(home).read_text() + out + told
    code, _, told = avb("init", "--url", NOBODY, "--key", "avb_" + "n" * 43)
    assert code == 2
    assert "--force" in told
    assert key_file(home).read_text().strip() == key
    code, out, _ = avb("init", "--url", NOBODY, "--key", "avb_" + "n" * 43, "--force")
    assert code == 0
    assert f"The key is in {key_file(home)} now." in out
    assert key_file(home).read_text().strip() == "avb_" + "n" * 43


def test_a_key_file_of_ones_own_stays_where_it_is(avb: Avb, home: Path, tmp_path: Path) -> None:
    mine = tmp_path / "my.key"
    code, _, told = avb("init", "--url", NOBODY, "--key-file", str(mine))
    assert (code, told.count("\n")) == (2, 1)
    mine.write_text("avb_" + "k" * 43)
    assert avb("init", "--url", NOBODY, "--key-file", str(mine))[0] == 0
    assert json.loads(conf(home).read_text())["agentvoicebox"]["key_file"] == str(mine)
    assert not key_file(home).exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--url", "http://voice.example.com"], "https://"),
        (["--url", "voice.example.com"], "https://"),
        (["--url", NOBODY + "/api"], "--url: That is no address"),
        (["--url", NOBODY, "--tenant", "no slug"], "--tenant: "),
        (["--url", NOBODY, "--ca-file", "{home}/mycroft.yml"], "--ca-file: there are no certificates in"),
        (["--url", NOBODY, "--key", "a key"], "avb_"),
        (["--url", NOBODY, "--config", "{home}/mycroft.yml"], "YAML"),
        (["--url", NOBODY, "--key", "avb_" + "k" * 43, "--config", "{home}/broken.conf"], "line 2"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(arguments: list[str], said: str, avb: Avb, home: Path) -> None:
    (home / "broken.conf").write_text('{"lang": "de-de",\n "stt"}')
    (home / "mycroft.yml").write_text("lang: de-de")
    held = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    code, out, told = avb("init", *(each.format(home=home) for each in arguments))
    assert (code, out, told.count("\n")) == (2, "", 1)
    assert said in told
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == held


def test_it_does_not_leave_a_platform_unasked(avb: Avb, home: Path) -> None:
    assert avb("init", "--url", "http://127.0.0.1:8")[0] == 0
    assert avb("init", "--url", NOBODY, "--key", "avb_" + "k" * 43)[0] == 0, "without a key it belongs to nobody"
    code, _, told = avb("init", "--url", "http://127.0.0.1:10")
    assert code == 2
    assert NOBODY in told
    assert avb("init", "--url", "http://127.0.0.1:10", "--force")[0] == 0


def test_a_wake_word_of_somebody_else_is_pointed_out(avb: Avb, home: Path) -> None:
    conf(home).write_text('{"hotwords": {"hey_mycroft": {"active": true, "listen": true}}}')
    assert "hey_mycroft still wakes this device" in avb("init", "--url", NOBODY)[1]


def test_something_else_at_the_address_is_refused_and_nothing_written(avb: Avb, home: Path, portal: str) -> None:
    held = conf(home).read_bytes()
    code, _, told = avb("init", "--url", portal)
    assert (code, told.count("\n")) == (2, 1)
    assert "Something else than a platform" in told
    assert conf(home).read_bytes() == held
    assert avb("init", "--url", portal, "--force")[0] == 0


@pytest.fixture
def portal() -> Iterator[str]:
    """A network that answers everything with HTML."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Portal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>Welcome to the hotel</html>")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Portal)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_what_is_shown_fits_a_terminal_and_can_be_copied_from_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = "/" + "a/" * 40 + "mycroft.conf"
    plain.table(["what", "now"], [["engine", f"{'word ' * 12}--stt-fallback and {path} and so on"]], ["red"])
    plain.paragraph(f"intents.pipeline: {'stage, ' * 10}agentvoicebox-intents-high, {path}")
    out = capsys.readouterr().out
    assert {"--stt-fallback", "agentvoicebox-intents-high,", path} <= set(out.split())
    assert [line for line in out.splitlines() if len(line) > 80 and line.strip() != path] == []
    assert "\x1b" not in out


# --- pair -------------------------------------------------------------------------------------------------------------


async def run(*arguments: str) -> asyncio.subprocess.Process:
    """`avb device …` as a process."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-c", PATIENT, "device", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=dict(os.environ),
    )


async def test_a_device_is_paired_by_whoever_enters_its_code(
    service: Any, client: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agentvoicebox.admin_api import devices

    monkeypatch.setattr(devices, "INTERVAL", 1)
    init = await run("init", "--url", service.url)
    out, told = await init.communicate()
    assert (init.returncode, told) == (0, b"")
    assert b"Not checked" not in out
    process = await run("pair", "--json", "--silent", "--name", "kitchen")
    assert process.stdout is not None
    waiting = json.loads(await process.stdout.readline())
    assert waiting["state"] == "waiting"
    assert not key_file(home).exists()
    claimed = await client.http.post("/api/v2/devices", json={"code": waiting["code"]})
    assert claimed.status_code == 201
    assert claimed.json()["name"] == "kitchen"
    out, told = await process.communicate()
    assert process.returncode == 0
    assert json.loads(out)["state"] == "paired"
    assert json.loads(out)["tenant"] == "A tenant"
    key = key_file(home).read_text().strip()
    assert key.encode() not in out + told
    listed = (await client.http.get("/api/v2/api-keys")).json()
    assert key[:12] in json.dumps(listed)
    again = await run("pair", "--json", "--silent")
    assert (await again.communicate())[1].count(b"\n") == 1
    assert again.returncode == 2


async def test_broken_off_it_leaves_nothing(service: Any, home: Path) -> None:
    await (await run("init", "--url", service.url)).communicate()
    process = await run("pair", "--silent")
    assert process.stderr is not None
    said = await process.stderr.readline()
    assert re.search(rb"\d{4} \d{4}", said)
    process.send_signal(2)
    _, told = await process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in told
    assert list(key_file(home).parent.iterdir()) == []


@pytest.mark.parametrize("action", ["pair", "status"])
def test_without_a_platform_there_is_nothing_to_pair_with(action: str, avb: Avb) -> None:
    code, out, told = avb(action)
    assert (code, out, told.count("\n")) == (2, "", 1)
    assert "avb device init" in told


def test_pairing_with_nobody_there_says_so(avb: Avb, home: Path) -> None:
    avb("init", "--url", NOBODY)
    code, out, told = avb("pair", "--silent")
    assert (code, out, told.count("\n")) == (1, "", 1)
    assert not key_file(home).exists()


def test_the_code_is_spoken_at_once_and_again_while_somebody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    now = [0.0]
    monkeypatch.setattr(command.bus, "say", lambda configuration, text, language: said.append(text))
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    herald = command._Herald({}, "en-US", silent=False)
    herald.digits = "11112222"
    for _ in range(13):
        herald.wait(5.0)
    herald.digits = "33334444"
    herald.wait(5.0)
    assert ["1, 1, 1, 1, 2, 2, 2, 2" in each for each in said] == [True, True, True, False]
    assert "3, 3, 3, 3, 4, 4, 4, 4" in said[-1]
    silent = command._Herald({}, "en-US", silent=True)
    silent.wait(5.0)
    assert len(said) == 4


def test_digits_are_readable_from_across_the_room() -> None:
    rows = plain.large("0123456789").split("\n")
    assert len(rows) == 5
    assert max(map(len, rows)) < 80
    assert len({row for row in zip(*(plain.large(str(digit)) for digit in range(10)), strict=False)}) > 1
    assert len({plain.large(str(digit)) for digit in range(10)}) == 10


# --- status and doctor ------------------------------------------------------------------------------------------------


def test_status_without_the_platform_says_why_and_what_stands_in(avb: Avb, home: Path) -> None:
    avb("init", "--url", NOBODY, "--key", "avb_" + "k" * 43)
    reports = home / "xdg_state_home" / "agentvoicebox" / "reports-listener.jsonl"
    reports.parent.mkdir(parents=True)
    reports.write_text("{}\n{}\n")
    code, out, _ = avb("status", "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["url"], told["platform"]) == (NOBODY, "away")
    assert "127.0.0.1:9" in told["reason"]
    assert [(each["name"], each["problem"]) for each in told["engines"]] == [
        ("agentvoicebox-stt-sphinx", ""),
        ("agentvoicebox-tts-flite", ""),
    ]
    assert told["reports_waiting"] == 2
    assert told["wake_words"] == [{"phrase": "hey mycroft", "sensitivity": 0.5}]
    code, out, _ = avb("status")
    assert code == 0
    assert "hey mycroft (0.5)" in out


def test_a_platform_that_keeps_silent_is_said_to(avb: Avb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.checkup, "WAIT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        avb("init", "--url", f"http://127.0.0.1:{silent.getsockname()[1]}", "--key", "avb_" + "k" * 43, "--force")
        told = json.loads(avb("status", "--json")[1])
    assert (told["platform"], told["reason"][:30]) == ("connecting", "It has not answered within 0.2")


def test_an_engine_that_is_not_there_is_named(avb: Avb, home: Path) -> None:
    out = avb("init", "--url", NOBODY, "--stt-fallback", "ovos-stt-plugin-none")[1]
    assert "ovos-stt-plugin-none is not installed here" in out
    code, out, told = avb("status", "--json")
    assert "ovos-stt-plugin-none is not installed" in json.loads(out)["engines"][0]["problem"]
    assert (code, told) == (0, ""), "it is said once"


def findings(out: str) -> dict[str, dict[str, str]]:
    return {each["what"]: each for each in json.loads(out)["findings"]}


def test_doctor_on_a_bare_device_names_a_remedy_for_each_line(avb: Avb, home: Path) -> None:
    code, out, _ = avb("doctor", "--json")
    found = findings(out)
    assert code == 1
    assert found["mycroft.conf"]["state"] == "fail"
    assert "avb device init" in found["mycroft.conf"]["remedy"]
    assert found["plugins"]["state"] == "ok"
    assert found["messagebus"]["state"] == "warn"
    assert [each for each in found.values() if each["state"] == "fail" and not each["remedy"]] == []


def test_doctor_examines_key_platform_and_engines(avb: Avb, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "LOADING", 0.0)  # who speaks to a device does not wait for its engines; a doctor does
    avb("init", "--url", NOBODY, "--key", "avb_" + "k" * 43)
    found = findings(avb("doctor", "--json")[1])
    assert found["mycroft.conf"]["state"] == found["device key"]["state"] == "ok"
    assert found["platform"]["state"] == "warn"
    assert found["wake word"] == {"what": "wake word", "state": "ok", "detail": "hey mycroft", "remedy": ""}
    assert found["offline ear"]["state"] == found["offline voice"]["state"] == "ok"
    assert found["speech or silence"]["state"] == "ok"
    key_file(home).chmod(0o644)
    found = findings(avb("doctor", "--json")[1])
    assert found["device key"]["remedy"] == f"chmod 600 {key_file(home)}"


def test_doctor_sees_lines_that_another_file_overrides(avb: Avb, home: Path) -> None:
    avb("init", "--url", NOBODY)
    later = home / "xdg_config_dirs" / "mycroft" / "mycroft.conf"
    later.parent.mkdir(parents=True)
    later.write_text('{"tts": {"module": "ovos-tts-plugin-server"}}')
    line = findings(avb("doctor", "--json")[1])["mycroft.conf"]
    assert line["state"] == "fail"
    assert line["detail"] == f"{later} overrides tts.module"


def test_doctor_for_people_is_a_table(avb: Avb, home: Path) -> None:
    avb("init", "--url", NOBODY)
    code, out, _ = avb("doctor")
    assert code == 1
    assert re.search(r"device key +fail +there is no .*-> avb device pair", out.replace("\n" + " " * 26, " "))


async def test_a_device_of_a_real_platform_is_live(stack: Any, new_customer: Any, home: Path) -> None:
    customer = await new_customer(voice="slt", persona_name="Ada", wake_word="okay nabu")
    init = await run("init", "--url", stack.url, "--key", customer.key, "--tenant", customer.slug, "--json")
    out, told = await init.communicate()
    assert (init.returncode, told) == (0, b"")
    assert json.loads(out)["note"] == ""
    status = await run("status", "--json")
    now = json.loads((await status.communicate())[0])
    assert (now["platform"], now["reason"], now["tenant"]) == ("up", "", customer.name)
    assert (now["language"], now["voice"], now["persona"]) == ("en-US", "slt", "Ada")
    assert [each["phrase"] for each in now["wake_words"]] == ["okay nabu"]
    doctor = await run("doctor", "--json")
    found = findings((await doctor.communicate())[0].decode())
    assert found["platform"]["state"] == found["clock"]["state"] == "ok"
    again = await run("pair", "--silent")
    assert b"--force" in (await again.communicate())[1]
    assert again.returncode == 2


async def test_a_key_of_nobody_or_of_another_tenant_is_refused_before_anything_is_written(
    stack: Any, customer: Any, home: Path
) -> None:
    held = conf(home).read_bytes()
    for arguments in (
        ["--key", "avb_" + "k" * 43],
        ["--key", customer.key, "--tenant", "somebody-else"],
    ):
        init = await run("init", "--url", stack.url, *arguments)
        out, told = await init.communicate()
        assert (init.returncode, out, told.count(b"\n")) == (2, b"", 1), told
        assert customer.key.encode() not in told
        assert conf(home).read_bytes() == held
        assert not key_file(home).exists()


# --- a machine without a server ---------------------------------------------------------------------------------------


def test_it_starts_without_server_packages() -> None:
    program = """
import sys
from importlib.abc import MetaPathFinder
class None_(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        heavy = ("rich", "sqlalchemy", "fastapi", "starlette", "uvicorn", "uvloop", "psycopg", "msgspec", "pydantic")
        if name.partition(".")[0] in (*heavy, "httpx", "onnxruntime", "faster_whisper"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, None_())
from agentvoicebox.admin_api.cli import main
sys.exit(main(sys.argv[1:]))
"""
    for arguments in (["--help"], ["device", "doctor", "--json"], ["device", "init", "--url", NOBODY, "--json"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, timeout=120
        )
        assert "Traceback" not in done.stderr
        assert "is not installed: pip" not in done.stderr
        if arguments[0] == "device":
            json.loads(done.stdout)


def test_what_a_device_lacks_for_other_commands_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from agentvoicebox.admin_api.cli import doctor

    def lacking(settings: object) -> Iterator[doctor.Finding]:
        yield doctor.Finding("uvicorn", "fail", "needed by the node", "pip install 'agentvoicebox[server]'")

    monkeypatch.setattr(doctor, "examine", lacking)
    assert cli.main(["doctor"]) == 1
    assert "agentvoicebox[server]" in "".join(capsys.readouterr().out.split())

    def absent(settings: object) -> Iterator[doctor.Finding]:
        raise ModuleNotFoundError("No module named 'httpx'", name="httpx")

    monkeypatch.setattr(doctor, "examine", absent)
    assert cli.main(["doctor"]) == 1
    told = capsys.readouterr().err
    assert told == "avb doctor needs httpx, which is not installed: pip install 'agentvoicebox[server]'\n"


# --- the page about it ------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "device.md").read_text(encoding="utf-8")


def test_the_page_names_only_what_there_is() -> None:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    named = {name for name in re.findall(r"avb device ([a-z]+)", PAGE) if name != "does"}
    assert named == {"init", "pair", "status", "doctor"}
    flags = set(re.findall(r"--(?:url|key|tenant|config|json|silent|force|ca|stt|tts)[a-z-]*", PAGE))
    known = "".join(part.format_help() for part in parser._subparsers._group_actions[0].choices.values())  # type: ignore[union-attr]
    assert [flag for flag in sorted(flags) if flag not in known] == []


def test_every_line_in_the_table_of_troubles_is_one_that_is_said() -> None:
    root = Path(__file__).parents[2]
    files = [*(root / "plugins" / "device").glob("*.py"), root / "admin_api" / "cli" / "device.py"]
    said = re.sub(r'"\n\s*f?"', "", "".join(path.read_text(encoding="utf-8") for path in files))
    said = re.sub(r"\{[^{}]*\}", "…", said)
    rows = re.findall(r"^\| (.+?) \| .+ \|$", PAGE.partition("## When something is wrong")[2], re.MULTILINE)
    pieces = [piece.strip(" .,") for row in rows for piece in re.split(r"[…;]| or |\([^)]*\)", row)]
    wanted = [piece for piece in pieces if len(piece) > 8 and piece != "it says"]
    assert len(wanted) > 12
    assert [piece for piece in wanted if piece not in said and piece.split(", ")[0] not in said] == []
