"""The offline voice, as the stock framework loads it."""

from __future__ import annotations

import gc
import os
import signal
import struct
import subprocess
import sys
import time
import wave
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ovos_plugin_manager.tts import OVOSTTSFactory, find_tts_plugins

from agentvoicebox.config.errors import Unavailable
from agentvoicebox.plugins.flite import MAX_TEXT, VOICES, FliteTTS, children
from agentvoicebox.plugins.pool.engine import Caller


def seconds(file: Path | str) -> float:
    with wave.open(str(file)) as wav:
        assert (wav.getsampwidth(), wav.getnchannels()) == (2, 1)
        return wav.getnframes() / wav.getframerate()


def test_the_stock_factory_loads_it():
    assert find_tts_plugins()["agentvoicebox-tts-flite"] is FliteTTS
    engine = OVOSTTSFactory.create({"module": "agentvoicebox-tts-flite", "agentvoicebox-tts-flite": {"voice": "rms"}})
    assert isinstance(engine, FliteTTS)
    assert engine.available_languages == {"en-US"}


@pytest.mark.parametrize("voice", VOICES)
def test_every_voice_speaks(voice: str, tmp_path: Path):
    path, phonemes = FliteTTS().get_tts("It is noon.", str(tmp_path / "a.wav"), voice=voice)
    assert phonemes is None
    assert 0.3 < seconds(path) < 3


def test_voices_and_speeds_differ(tmp_path: Path):
    engine = FliteTTS()
    files = {}
    for voice, speed in (("slt", 1.0), ("rms", 1.0), ("slt", 0.5), ("slt", 2.0), ("nobody", 1.0)):
        file = tmp_path / f"{voice}-{speed}.wav"
        engine.get_tts("It is noon.", str(file), voice=voice, speed=speed)
        files[voice, speed] = file
    assert files["slt", 1.0].read_bytes() != files["rms", 1.0].read_bytes()
    assert files["nobody", 1.0].read_bytes() == files["slt", 1.0].read_bytes(), "an unknown voice is the default"
    assert seconds(files["slt", 0.5]) > seconds(files["slt", 1.0]) * 1.5
    assert seconds(files["slt", 2.0]) < seconds(files["slt", 1.0]) * 0.7


@pytest.mark.parametrize("text", ["", "   ", "...", "?!", "\x00\x01"])
def test_nothing_to_say_is_silence(text: str, tmp_path: Path):
    path, _ = FliteTTS().get_tts(text, str(tmp_path / "a.wav"))
    with wave.open(path) as wav:
        assert set(wav.readframes(wav.getnframes())) == {0}


@pytest.mark.parametrize(
    "text", ["-o x", "--version", "$(id) `id` ; id", "two\nlines", "a\x00b", "ünïcödé", "<a>&", "a\ud800b"]
)
def test_text_is_text(text: str, tmp_path: Path):
    path, _ = FliteTTS().get_tts(text, str(tmp_path / "a.wav"))
    assert seconds(path) > 0.1
    assert [file.name for file in tmp_path.iterdir()] == ["a.wav"]


def test_the_text_is_nowhere_for_others_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commands = []
    real = subprocess.Popen

    def watched(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        commands.append(command)
        return real(command, **options)

    monkeypatch.setattr(subprocess, "Popen", watched)
    engine = FliteTTS()
    engine.get_tts("a secret", str(tmp_path / "a.wav"))
    list(engine.stream("a secret", voice="kal"))
    assert len(commands) == 3
    assert "secret" not in str(commands)


def test_a_very_long_text_ends(tmp_path: Path):
    path, _ = FliteTTS().get_tts("one two three. " * 3_000, str(tmp_path / "a.wav"), speed=2.0)
    assert seconds(path) > 60


def test_without_flite_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Unavailable, match="apt-get install flite"):
        FliteTTS()


def test_the_stock_cache_does_not_mix_voices():
    """Its key has no speed and no tenant, and it lies in shared memory: here it is off, and voices are in the key."""
    engine = FliteTTS({"voice": "slt"})
    assert engine.enable_cache is False
    assert engine._get_ctxt({"voice": "rms"}).tts_id != engine._get_ctxt({"voice": "awb"}).tts_id


OTHERS: set[int] = set()
"""Processes of engines that other tests keep."""


@pytest.fixture(autouse=True)
def others() -> None:
    OTHERS.clear()
    OTHERS.update(child.pid for child in psutil.Process().children())


@pytest.fixture
def voice() -> Iterator[FliteTTS]:
    engine = FliteTTS()
    yield engine
    engine.shutdown()
    assert speaking() == []


@pytest.fixture(scope="module")
def reading() -> Iterator[tuple[FliteTTS, tuple[bytes, set[int]]]]:
    """One for all examples of a property, and what it says at noon."""
    engine = FliteTTS()
    yield engine, joined(engine.stream("It is noon.", voice="kal"))
    engine.shutdown()


def speaking() -> list[psutil.Process]:
    """The processes that are there to speak, those that nobody has waited for among them."""
    mine = [child for child in psutil.Process().children() if child.pid not in OTHERS]
    return [child for child in mine if child.name() == "flite" or "child.py" in " ".join(child.cmdline())]


def joined(parts: Iterable[tuple[bytes, int]]) -> tuple[bytes, set[int]]:
    taken = list(parts)
    return b"".join(pcm for pcm, _ in taken), {rate for _, rate in taken}


def whole(text: str, directory: Path, **choice: Any) -> tuple[bytes, set[int]]:
    """What the stock call makes of it."""
    path, _ = FliteTTS().get_tts(text, str(directory / "whole.wav"), **choice)
    with wave.open(path) as wav:
        return wav.readframes(wav.getnframes()), {wav.getframerate()}


@pytest.mark.parametrize("name", VOICES)
def test_the_parts_are_the_audio_of_the_whole(voice: FliteTTS, name: str, tmp_path: Path):
    text = "Dr. Smith paid $3.50 at 10:30. Who is it? Two!"
    expected = whole(text, tmp_path, voice=name)
    parts = list(voice.stream(text, "en-US", name, 1.0))
    assert joined(parts) == expected
    assert len(parts) > 3
    assert 0.04 < len(parts[0][0]) / 2 / parts[0][1] < 0.15, "the first is a short one"
    assert joined(voice.stream(text, "en-US", name, 1.0)) == expected, "in a process that has spoken before"
    assert len(speaking()) == 1


def test_each_sentence_has_its_own_voice_and_speed(voice: FliteTTS):
    def said(name: str | None, speed: float | None) -> bytes:
        return joined(voice.stream("It is noon.", "en-US", name, speed))[0]

    slow, usual, fast = (len(said("kal", speed)) for speed in (0.5, 1.0, 2.0))
    assert slow > usual * 1.5 > usual > fast * 1.4
    assert len(said("kal", None)) == usual, "the speed of one is not that of the next"
    assert len(said("kal", 90.0)) == fast
    assert len({said(name, 1.0) for name in VOICES}) == len(VOICES)
    assert said("nobody", 1.0) == said(None, None) == said("slt", 1.0)


@pytest.mark.parametrize("text", ["", "   ", "...", "?!", "\x00\x01"])
def test_nothing_to_say_is_silence_in_parts_too(voice: FliteTTS, text: str):
    assert list(voice.stream(text)) == [(bytes(3_200), 16_000)]
    assert speaking() == [], "nobody was asked"


def test_what_flite_has_no_sound_for_is_silence(voice: FliteTTS):
    assert list(voice.stream("日本", "en-US", "kal16")) == [(bytes(3_200), 16_000)]


def test_a_text_is_cut_and_control_characters_are_spaces(voice: FliteTTS):
    words = "one two. " * 1_000
    assert joined(voice.stream(words, voice="kal")) == joined(voice.stream(words[:MAX_TEXT], voice="kal"))
    assert joined(voice.stream("two\x00\nwords", voice="kal")) == joined(voice.stream("two words", voice="kal"))


LONG = "Alpha bravo charlie delta. " * 200


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSEGV])
def test_a_crash_costs_one_sentence(voice: FliteTTS, end: signal.Signals, tmp_path: Path):
    expected = whole("It is noon.", tmp_path, voice="kal16")
    parts = voice.stream(LONG, voice="slt")
    next(parts)
    (first,) = speaking()
    first.send_signal(end)  # it has not said all of it: this part came before the rest was made
    with pytest.raises(Unavailable) as caught:
        list(parts)
    assert caught.value.code == "engine_failed"
    assert "bravo" not in str(caught.value)
    assert joined(voice.stream("It is noon.", voice="kal16")) == expected, "nothing is left of the other"
    (second,) = speaking()
    assert second.pid != first.pid


def test_one_that_died_between_two_sentences_is_replaced(voice: FliteTTS, tmp_path: Path):
    expected = whole("It is noon.", tmp_path, voice="kal16")
    assert joined(voice.stream("It is noon.", voice="kal16")) == expected
    (idle,) = speaking()
    idle.kill()
    while idle.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.001)
    assert joined(voice.stream("It is noon.", voice="kal16")) == expected
    assert [child.pid for child in speaking()] != [idle.pid]


def test_one_that_hangs_is_ended(voice: FliteTTS, monkeypatch: pytest.MonkeyPatch):
    parts = voice.stream(LONG, voice="slt")
    next(parts)
    (hanging,) = speaking()
    hanging.suspend()
    with monkeypatch.context() as patch:
        patch.setattr(children, "PATIENCE", 0.2)
        with pytest.raises(Unavailable) as caught:
            list(parts)
    assert caught.value.code == "engine_failed"
    assert speaking() == []
    assert joined(voice.stream("It is noon.", voice="kal"))[1] == {8_000}


def test_what_nobody_listens_to_is_not_said_to_the_next(voice: FliteTTS, tmp_path: Path):
    expected = whole("It is noon.", tmp_path, voice="kal16")
    parts = voice.stream(LONG, voice="kal16")
    next(parts)
    parts.close()
    assert speaking() == []
    assert joined(voice.stream("It is noon.", voice="kal16")) == expected


def test_a_caller_who_leaves_stops_it_and_nobody_gets_a_process_that_is_about_to_be_killed(
    voice: FliteTTS, monkeypatch: pytest.MonkeyPatch
):
    def leave_at_once(text: str) -> int:
        caller, heard = Caller(), 0

        def listen() -> None:
            nonlocal heard
            with closing(voice.stream(text, voice="kal16")) as parts:
                for _ in parts:
                    heard += 1
                    caller.leave()

        with suppress(Unavailable):
            caller.run(listen)
        assert speaking() == []
        return heard

    assert 0 < leave_at_once(LONG) < 1_000
    with monkeypatch.context() as patch:
        patch.setattr(children._Child, "kill", lambda child: None)  # all is said before the kill comes
        assert leave_at_once("No.") > 2
    assert joined(voice.stream("No.", voice="kal"))[1] == {8_000}


def test_two_at_once_and_no_more_processes_than_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(children, "PATIENCE", 60.0)  # of six, one may have to wait for many sentences of the others
    engine = FliteTTS({"parallel": 2})
    expected = {name: whole(f"I am {name}.", tmp_path, voice=name) for name in ("kal", "kal16")}
    first, second = (engine.stream(f"I am {name}.", voice=name) for name in expected)
    begun = next(first), next(second)
    assert len(speaking()) == 2
    assert joined([begun[0], *first]) == expected["kal"]
    assert joined([begun[1], *second]) == expected["kal16"]

    def say(name: str) -> bool:
        return all(joined(engine.stream(f"I am {name}.", voice=name)) == expected[name] for _ in range(20))

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(say, ["kal", "kal16"] * 3))
    assert len(speaking()) == 2
    engine.shutdown()
    assert speaking() == []


def test_when_all_are_busy_for_too_long_it_says_so(monkeypatch: pytest.MonkeyPatch):
    engine = FliteTTS({"parallel": 1})
    first = engine.stream(LONG, voice="kal")
    next(first)
    with monkeypatch.context() as patch:
        patch.setattr(children, "PATIENCE", 0.05)
        with pytest.raises(Unavailable, match="try again") as caught:
            next(engine.stream("It is noon."))
    assert caught.value.code == "busy"
    engine.shutdown()
    assert len(list(first)) > 3, "what is being said is said to its end"
    assert speaking() == [], "and nothing stays when it is done"


def test_one_that_is_forgotten_leaves_nothing_behind():
    engine = FliteTTS()
    list(engine.stream("It is noon.", voice="kal"))
    assert len(speaking()) == 1
    del engine
    gc.collect()
    assert speaking() == []


def test_the_process_ends_with_its_parent_and_knows_no_secrets():
    script = """
import os, signal, sys
from agentvoicebox.plugins.flite import FliteTTS
parts = FliteTTS().stream("one two three. " * 400)
next(parts)
import psutil
(child,) = psutil.Process().children()
print(child.pid, child.name(), "AVB_SECRET" in child.environ(), "three" in " ".join(child.cmdline()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", script]
    ended = subprocess.run(command, env={**os.environ, "AVB_SECRET": "x"}, capture_output=True, check=False)
    pid, *told = ended.stdout.decode().split()
    assert told == ["flite", "False", "False"]
    with suppress(psutil.NoSuchProcess):
        orphan = psutil.Process(int(pid))
        while orphan.status() != psutil.STATUS_ZOMBIE:  # where nobody collects orphans
            time.sleep(0.01)


def test_at_the_end_of_the_program_it_is_silent():
    script = (
        "from agentvoicebox.plugins.flite import FliteTTS; kept = FliteTTS(); print(len(list(kept.stream('No.'))) > 1)"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", script], capture_output=True, check=True
    )
    assert (ended.stdout, ended.stderr) == (b"True\n", b"")


@pytest.mark.parametrize("command", [[sys.executable, "-c", "raise SystemExit(1)"], ["/nowhere/python"]])
def test_without_the_libraries_it_speaks_in_one_part(
    command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(children, "_COMMAND", command)
    (part,) = FliteTTS().stream("It is noon.", "en-US", "kal", 2.0)
    assert joined([part]) == whole("It is noon.", tmp_path, voice="kal", speed=2.0)


def test_a_process_that_cannot_start_is_a_failure_of_the_engine(voice: FliteTTS, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(children, "_COMMAND", ["/nowhere/python"])
    with pytest.raises(Unavailable) as caught:
        next(voice.stream("It is noon."))
    assert caught.value.code == "engine_failed"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\x01",
        struct.pack("<II", 16_000, 2_000_000_000),
        struct.pack("<II", 16_000, 100) + b"half",
    ],
)
def test_nonsense_is_a_failure_of_the_engine(voice: FliteTTS, answer: bytes, monkeypatch: pytest.MonkeyPatch):
    script = f"import os; os.read(0, 1); os.write(1, {answer!r})"
    monkeypatch.setattr(children, "_COMMAND", [sys.executable, "-I", "-S", "-c", script, "child.py"])
    with pytest.raises(Unavailable) as caught:
        list(voice.stream("It is noon."))
    assert caught.value.code == "engine_failed"


@pytest.mark.parametrize("word", ["x" * 9_000, "7" * 59 + " ", "7.7" * 15 + " ", "alpha bravo ", "\u2028a"])
def test_what_has_no_end_begins_soon_all_the_same(voice: FliteTTS, word: str):
    """Where one sentence is made of it all, flite takes a minute before it says the first word of it."""
    with closing(voice.stream(word * (9_000 // len(word)), voice="slt")) as parts:
        pcm, rate = next(parts)
    assert pcm
    assert rate == 16_000


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=300), st.sampled_from(["kal", "kal16"]))
@example("a\ud800b", "kal")
@example("word\x00" * 2_000, "kal")
@example("\u202e\ufeffZ\u0351\u0348a\U0001f9d1\u200d\U0001f680", "kal16")
@example("(" * 4_000 + "a" + ")" * 4_000, "kal")
@example("<speak><break time='9999s'/></speak> %s%n \\", "kal")
@example("$9999999999999999999999 1/2 12:99 1e999 -0 IV MMXX a.b.c.d", "kal")
def test_no_text_hangs_or_harms(reading: tuple[FliteTTS, tuple[bytes, set[int]]], text: str, name: str):
    engine, noon = reading
    pcm, rates = joined(engine.stream(text, "en-US", name, 1.0))
    assert pcm
    assert len(pcm) % 2 == 0
    assert rates <= {8_000, 16_000}
    assert joined(engine.stream("It is noon.", voice="kal")) == noon, "nothing of the last one"
