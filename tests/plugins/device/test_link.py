"""The link against a platform that does what it should: requests, choices, reports, and one link for each process."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentvoicebox.config.errors import TooLarge
from agentvoicebox.plugins.device import link as links
from agentvoicebox.plugins.device import wire
from agentvoicebox.plugins.device.choices import Choices, WakeWord
from agentvoicebox.plugins.device.link import Away, Failed, Link, State

PATIENCE = 30.0
"""Seconds for an answer that comes at some time."""
ACME = Choices(tenant="Acme", language="de-DE", voice="af_sarah", wake_words=(WakeWord("okay nabu"),))


# --- requests ---------------------------------------------------------------------------------------------------------


def test_a_link_tells_who_it_is_and_learns_whose(link: Link, platform: Any, until: Callable[..., Any]) -> None:
    (hello,) = platform.told(wire.Hello)
    assert (hello.process, hello.name, hello.have) == ("listener", "kitchen", "")
    assert platform.requests[0].headers["Authorization"].startswith("Bearer avb_")
    assert "X-Tenant-ID" not in platform.requests[0].headers
    assert (link.state, link.reason) == (State.UP, "")
    assert link.welcome is not None
    assert link.welcome.tenant_name == "Acme"


def test_the_tenant_of_the_section_is_named(new_link: Any, platform: Any, until: Callable[..., Any]) -> None:
    link = new_link(tenant="acme")
    until(lambda: link.state is State.UP)
    assert platform.requests[0].headers["X-Tenant-ID"] == "acme"


def test_speech_is_understood(link: Link, platform: Any) -> None:
    listening = link.listen("de-DE")
    for _ in range(50):
        listening.send(bytes(1000))
    listening.finish()
    transcript = listening.result()
    assert (transcript.text, transcript.engine) == ("50000 bytes", "test")
    assert platform.told(wire.Listen) == [wire.Listen(1, "de-DE")]


def test_what_has_been_understood_so_far_is_told(link: Link, platform: Any) -> None:
    platform.answers[wire.Finish] = lambda said: [wire.Partial(said.id, "what"), wire.Transcript(said.id, "what time")]
    shown: list[str] = []
    listening = link.listen(partials=shown.append)
    listening.finish()
    assert listening.result().text == "what time"
    assert shown == ["what"]
    assert platform.told(wire.Listen) == [wire.Listen(1, "", True)]


def test_text_is_spoken(link: Link, platform: Any) -> None:
    pieces = list(link.speak("Hello.", "en-US", "af_sarah"))
    assert [(len(pcm), rate) for pcm, rate in pieces] == [(200, 24_000)]
    assert platform.told(wire.Speak) == [wire.Speak(1, "Hello.", "en-US", "af_sarah")]


async def test_the_persona_answers_on_any_loop(link: Link, platform: Any) -> None:
    assert [piece async for piece in link.ask("Why?", "en-US")] == ["It is ", "ten."]
    assert "".join(link.ask(messages=[{"role": "user", "content": "Why?"}])) == "It is ten."
    assert platform.told(wire.Ask)[1].messages == [{"role": "user", "content": "Why?"}]


def test_skills_ask_about_their_tenant(link: Link) -> None:
    assert link.about("skill-account", PATIENCE) == {"skill": "skill-account"}
    assert link.choose("Bo", PATIENCE) == "Bo"
    assert link.choose("", PATIENCE) == "Ada"


def test_a_problem_is_told_with_its_code(link: Link, platform: Any) -> None:
    problem = [lambda said: [wire.Problem(said.id, "quota_exceeded", "The plan is used up.")]] * 5
    platform.answers |= dict(zip((wire.Finish, wire.Speak, wire.Ask, wire.About, wire.Choose), problem, strict=True))
    listening = link.listen()
    listening.finish()
    for ask in (
        listening.result,
        lambda: list(link.speak("Hello.")),
        lambda: list(link.ask("Why?")),
        lambda: link.about(timeout=PATIENCE),
        lambda: link.choose("Bo", PATIENCE),
    ):
        with pytest.raises(Failed) as failed:
            ask()
        assert (failed.value.code, failed.value.message) == ("quota_exceeded", "The plan is used up.")
    assert link.state is State.UP


def test_many_ask_at_once(link: Link) -> None:
    wrong: list[object] = []

    def ask(number: int) -> None:
        listening = link.listen()
        listening.send(bytes(2 * number))
        listening.finish()
        wrong.extend(text for text in [listening.result().text] if text != f"{2 * number} bytes")
        wrong.extend(text for text in ["".join(link.ask("Why?"))] if text != "It is ten.")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_what_is_cancelled_is_told_so_and_its_late_answer_hurts_nobody(
    link: Link, platform: Any, until: Callable[..., Any]
) -> None:
    platform.answers[wire.Speak] = lambda said: [wire.Sound(said.id, 24_000), wire.audio(said.id, b"\1\2")]
    with link.speak("Hello.") as speaking:
        assert next(speaking) == (b"\1\2", 24_000)
    until(lambda: platform.told(wire.Cancel))
    platform.push(wire.audio(1, b"\3\4"), wire.Done(1), wire.Problem(1, "late", "Late."))
    assert link.about(timeout=PATIENCE) == {"skill": ""}


def test_a_text_that_no_frame_holds_is_refused(link: Link) -> None:
    with pytest.raises(TooLarge):
        link.ask("x" * wire.LARGEST_FRAME)
    assert link.about(timeout=PATIENCE) == {"skill": ""}


def test_a_caller_waits_no_longer_than_it_wants_to(link: Link, platform: Any, until: Callable[..., Any]) -> None:
    platform.answers[wire.About] = lambda said: []
    with pytest.raises(Away, match="in time"):
        link.about(timeout=0.05)
    until(lambda: platform.told(wire.Cancel))
    assert link.choose("Bo", PATIENCE) == "Bo"


def test_before_it_is_up_nothing_is_tried(new_link: Any) -> None:
    link = new_link(url="http://127.0.0.1:9")
    for ask in (link.listen, lambda: link.speak("x"), lambda: link.ask("x"), link.about, lambda: link.choose("x")):
        with pytest.raises(Away) as away:
            ask()
        assert away.value.code == "platform_away"
        assert away.value.message


def test_a_link_that_is_closed_lets_nobody_wait(link: Link, platform: Any) -> None:
    platform.answers[wire.Speak] = lambda said: []
    speaking, listening = link.speak("Hello."), link.listen()
    link.close()
    link.close()
    with pytest.raises(Away):
        next(speaking)
    listening.send(b"\1\2")
    listening.finish()
    with pytest.raises(Away, match="closed"):
        listening.result()
    with pytest.raises(Away, match="closed"):
        link.listen()
    link.report("stt")
    assert link.closed
    assert not [thread for thread in threading.enumerate() if thread is link._thread]


def test_a_link_that_is_closed_at_once_ends(new_link: Any) -> None:
    for _ in range(20):
        link = new_link()
        link.close()
        assert not link._thread.is_alive()


def test_a_later_platform_may_say_more(link: Link, platform: Any) -> None:
    platform.answers[wire.About] = lambda said: ['{"type":"mood","id":1}', wire.Told(said.id, {"skill": "x"})]
    assert link.about(timeout=PATIENCE) == {"skill": "x"}
    assert link.state is State.UP


def test_the_key_is_never_in_the_log(
    new_link: Any, platform: Any, until: Callable[..., Any], caplog: pytest.LogCaptureFixture, lines: list[str]
) -> None:
    with caplog.at_level(logging.DEBUG):
        link = new_link()
        until(lambda: link.state is State.UP)
        link.about(timeout=PATIENCE)
    own = [record.getMessage() for record in caplog.records if record.name != "websockets.server"]
    told = "\n".join([*own, *lines])
    assert "Bearer" not in told
    assert link.section.key() not in told


# --- choices ----------------------------------------------------------------------------------------------------------


def test_choices_come_live_and_are_kept(
    new_link: Any, platform: Any, until: Callable[..., Any], tmp_path: Path
) -> None:
    platform.choices = ACME
    link, heard = new_link(), []
    assert link.choices == Choices()
    until(lambda: link.choices == ACME)
    link.on_choices(heard.append)
    assert heard == [ACME]
    platform.choices = Choices(tenant="Acme", persona="Bo")
    platform.push(platform.configured())
    until(lambda: heard[-1].persona == "Bo")
    file = tmp_path / "state" / "choices.json"
    until(lambda: file.exists() and b"Bo" in file.read_bytes())
    link.close()
    platform.stop()
    again = new_link("audio")
    assert again.choices.persona == "Bo"


@pytest.fixture
def kept(new_link: Any, platform: Any, until: Callable[..., Any], tmp_path: Path) -> Choices:
    """What a link of before was told and has kept."""
    platform.choices = ACME
    link = new_link()
    until(lambda: (tmp_path / "state" / "choices.json").exists())
    link.close()
    return ACME


def test_a_platform_says_nothing_new_to_whom_it_is_not(
    kept: Choices, new_link: Any, platform: Any, until: Callable[..., Any]
) -> None:
    again = new_link()
    until(lambda: again.state is State.UP)
    assert platform.told(wire.Hello)[-1].have == kept.etag
    assert again.choices == kept


@pytest.mark.usefixtures("kept")
def test_choices_of_another_keys_tenant_are_not_used(
    new_link: Any, platform: Any, until: Callable[..., Any], tmp_path: Path
) -> None:
    platform.choices = None
    (tmp_path / "device.key").write_text("avb_" + "o" * 43)
    again = new_link()
    assert again.choices == Choices()
    until(lambda: again.state is State.UP)
    assert platform.told(wire.Hello)[-1].have == ""


def test_a_key_that_changes_takes_its_tenants_choices_with_it(
    new_link: Any, platform: Any, until: Callable[..., Any], tmp_path: Path
) -> None:
    platform.choices = ACME
    link, heard = new_link(), []
    until(lambda: link.choices == ACME)
    link.on_choices(heard.append)
    platform.choices = None
    (tmp_path / "device.key").write_text("avb_" + "o" * 43)
    platform.stop()
    platform.start()
    until(lambda: heard[-1] == Choices())


def test_a_device_that_is_paired_anew_belongs_to_its_new_tenant_without_a_restart(
    link: Link, platform: Any, until: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "LOOK", 0.01)
    link.close()
    link = Link(link.section, "listener")
    try:
        until(lambda: link.state is State.UP)
        tried = len(platform.requests)
        (tmp_path / "device.key").touch()
        (tmp_path / "device.key").write_text("")
        time.sleep(0.1)
        assert link.state is State.UP, "a file that is being written is no other key"
        (tmp_path / "device.key").write_text("avb_" + "o" * 43)
        until(lambda: len(platform.requests) > tried and link.state is State.UP)
        assert platform.requests[-1].headers["Authorization"] == "Bearer avb_" + "o" * 43
        assert len(platform.requests) == tried + 1
    finally:
        link.close()


def test_nonsense_for_choices_is_passed_over(link: Link, platform: Any, lines: list[str]) -> None:
    platform.push(wire.Configured("x", {"speed": "fast"}), wire.Configured("y", {"wake_words": [{}]}))
    assert link.about(timeout=PATIENCE) == {"skill": ""}
    assert link.choices == Choices()
    assert len(lines) == 2
    assert all("choices" in line for line in lines)


def test_subscribers_do_not_disturb_each_other(link: Link, platform: Any, until: Callable[..., Any]) -> None:
    heard: list[str] = []

    def stumble(_: Choices) -> None:
        raise RuntimeError

    link.on_choices(stumble)
    end = link.on_choices(lambda told: heard.append(told.tenant))
    platform.choices = ACME
    platform.push(platform.configured(), platform.configured())
    until(lambda: heard == ["", "Acme"])
    end()
    end()
    platform.choices = Choices(tenant="Beta")
    platform.push(platform.configured())
    until(lambda: link.choices.tenant == "Beta")
    assert heard == ["", "Acme"]


def test_a_subscriber_that_takes_its_time_holds_up_no_request(
    link: Link, platform: Any, until: Callable[..., Any]
) -> None:
    loading, loaded, heard = threading.Event(), threading.Event(), []

    def load(told: Choices) -> None:
        heard.append(told.tenant)
        if told.tenant == "Acme":
            loading.set()
            loaded.wait(30)

    link.on_choices(load)
    for tenant in ("Acme", "Beta", "Gamma", "Delta"):
        platform.choices = Choices(tenant=tenant)
        platform.push(platform.configured())
        assert loading.wait(30)
    assert link.about(timeout=PATIENCE) == {"skill": ""}
    until(lambda: link.choices.tenant == "Delta")
    loaded.set()
    until(lambda: heard[-1] == "Delta")
    assert heard[:2] == ["", "Acme"]


def test_a_state_directory_that_cannot_be_takes_one_line(
    new_link: Any, platform: Any, until: Callable[..., Any], tmp_path: Path, lines: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    platform.choices = ACME
    link = new_link(state=tmp_path / "file")
    until(lambda: link.choices == ACME)
    until(lambda: any("choices.json" in line for line in lines))
    platform.choices = Choices(tenant="Beta")
    platform.push(platform.configured())
    until(lambda: link.choices.tenant == "Beta")
    link.report("stt", engine="local")
    until(lambda: platform.events)
    assert len([line for line in lines if "cannot be written" in line and "choices.json" in line]) == 1


# --- reports ----------------------------------------------------------------------------------------------------------


def test_what_happened_is_reported_by_the_platforms_clock(link: Link, platform: Any, until: Callable[..., Any]) -> None:
    link.report("wake", phrase="okay nabu", confidence=0.9, outcome="detected")
    (event,) = until(lambda: platform.events.values())
    assert {name: event[name] for name in ("kind", "phrase", "confidence")} == {
        "kind": "wake",
        "phrase": "okay nabu",
        "confidence": 0.9,
    }
    assert abs(event["at"] - platform.time) < 60


def test_reports_wait_for_a_platform_that_is_away(new_link: Any, platform: Any, until: Callable[..., Any]) -> None:
    platform.stop()
    link = new_link()
    for number in range(450):
        link.report("stt", engine="local", seconds=float(number))
    platform.start()
    until(lambda: len(platform.events) == 450)
    assert [event["seconds"] for event in platform.events.values()] == [float(n) for n in range(450)]
    assert max(len(report.events) for report in platform.told(wire.Report)) <= wire.MOST_EVENTS


def test_reports_survive_the_end_of_the_process(
    new_link: Any, platform: Any, until: Callable[..., Any], tmp_path: Path
) -> None:
    platform.stop()
    link = new_link()
    link.report("stt", engine="local")
    link.close()
    assert list(tmp_path.glob("state/*.jsonl"))
    again = new_link()
    platform.start()
    # It is told, the device knows that, and has nothing of it on its disk any more.
    until(lambda: platform.events and not len(again._outbox) and not list(tmp_path.glob("state/*.jsonl")))
    again.close()
    assert len(platform.events) == 1
    third = new_link()
    until(lambda: third.state is State.UP)
    assert len(third._outbox) == 0


# --- the link of a process --------------------------------------------------------------------------------------------


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The mycroft.conf of this process."""
    from ovos_config import config

    told: dict[str, Any] = {}
    monkeypatch.setattr(config, "Configuration", lambda: told)
    yield told
    if links._mine is not None:
        links._mine.close()
    links._forked()


def test_a_process_has_one_link_as_its_configuration_says(
    configured: dict[str, Any], platform: Any, tmp_path: Path, until: Callable[..., Any]
) -> None:
    assert links.shared("listener") is None
    told = {"url": platform.url, "key_file": str(tmp_path / "device.key"), "state": str(tmp_path / "state")}
    (tmp_path / "device.key").write_text("avb_" + "k" * 43)
    configured["agentvoicebox"] = told
    found: list[Link | None] = []
    threads = [threading.Thread(target=lambda: found.append(links.shared("listener"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    (first,) = set(found)
    assert first is not None
    until(lambda: first.state is State.UP)
    configured["agentvoicebox"] = {**told, "tenant": "acme"}
    second = links.shared("listener")
    assert second is not None
    assert second is not first
    until(lambda: first.closed and second.state is State.UP)
    second.close()
    third = links.shared("listener")
    assert third not in (None, second)
    del configured["agentvoicebox"]
    assert links.shared("listener") is None
    assert third is not None
    until(lambda: third.closed)


def test_a_child_of_a_process_has_a_link_of_its_own(configured: dict[str, Any], platform: Any, tmp_path: Path) -> None:
    (tmp_path / "device.key").write_text("avb_" + "k" * 43)
    told = {"url": platform.url, "key_file": str(tmp_path / "device.key"), "state": str(tmp_path / "state")}
    script = f"""
import os, sys, time
from ovos_config import config
config.Configuration = lambda: {{"agentvoicebox": {told!r}}}
from agentvoicebox.plugins.device import connection
from agentvoicebox.plugins.device.link import Away, State, shared
connection.SILENT = connection.FORGOTTEN = 30.0
mine = shared("core")
while mine.state is not State.UP: time.sleep(0.01)
child = os.fork()
if not child:
    try:
        try:
            list(mine.ask("Why?"))
        except Away:
            own = shared("core")
            while own.state is not State.UP: time.sleep(0.01)
            assert own is not mine and "".join(own.ask("Why?")) == "It is ten."
            own.report("stt", engine="child")
            mine.close()
            own.close()
            os._exit(0)
    finally:
        os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert "".join(mine.ask("Why?")) == "It is ten."
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_ends_with_its_link_open(platform: Any, tmp_path: Path) -> None:
    """Also while a name is looked up that nobody knows, and reports are still to be told."""
    script = f"""
import socket, sys, time
from pathlib import Path
from agentvoicebox.plugins.device.link import Link
from agentvoicebox.plugins.device.section import Section
socket.getaddrinfo = lambda *a, **k: time.sleep(600)
state = Path({str(tmp_path)!r})
(state / "key").write_text("avb_0123456789")
link = Link(Section("https://nowhere.invalid", state / "key", state=state), "core")
time.sleep(0.2)
link.report("stt", engine="local")
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=60)
    assert "local" in (tmp_path / "reports-core.jsonl").read_text()


def test_links_leave_nothing_behind(new_link: Any, until: Callable[..., Any]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        link = new_link()
        until(lambda link=link: link.state is State.UP)
        link.about(timeout=PATIENCE)
        link.close()
    gc.collect()
    until(lambda: len(os.listdir("/proc/self/fd")) <= before + 2)


def test_a_loop_of_the_caller_is_not_needed(link: Link) -> None:
    async def ask() -> str:
        return "".join([piece async for piece in link.ask("Why?")])

    assert [asyncio.run(ask()) for _ in range(3)] == ["It is ten."] * 3


def test_a_subscriber_hears_of_each_change_once_and_of_none_after_a_later_one() -> None:
    heard: list[str] = []
    subscriber = links._Subscriber(lambda told: heard.append(told.tenant))
    for version, tenant in ((2, "Beta"), (1, "Acme"), (2, "Beta"), (3, "Gamma")):
        subscriber.tell(version, Choices(tenant=tenant))
    subscriber.ended = True
    subscriber.tell(4, Choices(tenant="Delta"))
    assert heard == ["Beta", "Gamma"]
