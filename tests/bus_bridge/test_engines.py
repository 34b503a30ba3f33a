"""Which engines a tenant's work is given to, in which order, on a real pool."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentvoicebox.bus_bridge import engines as module
from agentvoicebox.bus_bridge.engines import Engines
from agentvoicebox.bus_bridge.models import SessionSettings
from agentvoicebox.config.errors import BadInput, Unavailable
from agentvoicebox.config.settings import Settings
from agentvoicebox.plugins import models, pool
from agentvoicebox.plugins.pool import EngineSpec, Heard, Loaded, Pool, Transcript
from agentvoicebox.tenancy.voices import VoiceConfig

TENANT = uuid.UUID(int=7)
SOUND = bytes(32_000)

WHISPER, SPHINX = "agentvoicebox-stt-whisper", "agentvoicebox-stt-sphinx"


class Asked:
    """A runner that notes who is asked; engines of the names in `failing` fail."""

    def __init__(self) -> None:
        self.specs: list[EngineSpec] = []
        self.failing: set[str] = set()

    async def load(self, spec: EngineSpec) -> Loaded:
        return Loaded()

    async def transcribe(self, spec: EngineSpec, jobs: list[Heard]) -> list[Transcript]:
        self.specs.append(spec)
        if spec.plugin in self.failing:
            raise Unavailable("It failed; try again.", code="engine_failed")
        return [Transcript("yes", None, job.seconds, "en", spec.plugin) for job in jobs]

    async def unload(self, spec: EngineSpec) -> None:
        pass

    async def close(self) -> None:
        pass


def lay_down(directory: Path, *names: str) -> None:
    """Models whose files have the right length, and take no space."""
    for model in models.available(directory):
        if model.name in names:
            (directory / model.name).mkdir(parents=True)
            for file in model.files:
                with (directory / model.name / file.name).open("wb") as out:
                    out.truncate(file.size)


@pytest.fixture
def runner() -> Asked:
    return Asked()


Make = Callable[..., Engines]


@pytest.fixture
def make(runner: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Engines as settings and the models on disk decide; `keys` are those that the tenant has brought."""
    monkeypatch.setattr(pool, "ROOM", 60.0)  # a machine that stalls while an engine is loaded asks no other one
    pools = []

    def made(*installed: str, keys: dict[str, str] | None = None, **given: Any) -> Engines:
        lay_down(tmp_path, *installed)
        decided = Settings(data=tmp_path, models=tmp_path, **given)
        pools.append(Pool(runner=runner))  # type: ignore[arg-type]

        async def key_of(tenant_id: uuid.UUID, kind: str, name: str) -> str | None:
            return (keys or {}).get(name)

        return Engines(pools[-1], models.choose(decided.engine, tmp_path, decided.whisper), decided, key_of)

    yield made
    for each in pools:
        each.close()


def model_of(spec: EngineSpec) -> str:
    return Path(str(dict(spec.config).get("model", ""))).name.removeprefix("faster-whisper-")


@contextmanager
def busy() -> Iterator[None]:
    with pytest.raises(Unavailable) as caught:
        yield
    assert caught.value.code == "busy"


async def hear(engines: Engines, settings: SessionSettings, **how: Any) -> Transcript:
    return await engines.transcribe(SOUND, settings, TENANT, **how)


async def test_a_default_model_that_there_is_not_silences_nobody(make: Make, runner: Asked):
    engines = make("faster-whisper-base", "kokoro")
    for stored in ("whisper-1", "", "large-v3", "../base"):
        begin = engines.begin(VoiceConfig(), stored, "slt")
        assert (await hear(engines, begin)).text == "yes"
        assert (await hear(engines, replace(begin, stt_model=stored))).text == "yes"
    assert {(spec.plugin, model_of(spec)) for spec in runner.specs} == {(WHISPER, "base")}


@pytest.mark.parametrize(
    ("default", "chosen", "heard"),
    [
        ("base", "auto", "small"),
        ("auto", "auto", "small"),
        ("tiny", "auto", "tiny"),
        ("tiny", "base", "base"),
        ("base", "base", "base"),
        ("medium", "auto", "small"),
    ],
)
async def test_stt_05_the_operators_model_serves_who_has_chosen_none(
    make: Make, runner: Asked, default: str, chosen: str, heard: str
):
    engines = make(*(f"faster-whisper-{name}" for name in ("tiny", "base", "small")), "kokoro", whisper="small")
    settings = engines.begin(VoiceConfig(stt_model=chosen), default, "slt")
    await hear(engines, settings)
    assert (model_of(runner.specs[0]), engines.whisper(settings)) == (heard, heard)


async def test_what_is_loaded_for_all_is_what_serves_them(make: Make, runner: Asked):
    engines = make("faster-whisper-base", "faster-whisper-small", "kokoro", whisper="small")
    await hear(engines, engines.begin(VoiceConfig(), "base", "slt"))
    assert runner.specs == [engines.choice.stt]


async def test_a_model_of_the_workers_need_not_be_here(make: Make, runner: Asked, tmp_path: Path):
    engines = replace(make(engine="auto", whisper="small"), choice=models.wanted(tmp_path, "small"))
    assert [name for name in ("tiny", "base", "small") if engines.has(name)] == ["small"]
    await hear(engines, engines.begin(VoiceConfig(stt_vad=False), "base", "slt"))
    assert dict(runner.specs[0].config) == {"model": str(tmp_path / "faster-whisper-small"), "vad": False}


async def test_offline_means_no_models_even_where_there_are_some(make: Make, runner: Asked):
    engines = make("faster-whisper-base", "kokoro", engine="offline")
    assert not engines.has("base")
    await hear(engines, engines.begin(VoiceConfig(stt_model="base"), "base", "slt"))
    assert [spec.plugin for spec in runner.specs] == [SPHINX]


async def test_guesses_are_never_asked_of_a_service_elsewhere(make: Make, runner: Asked):
    engines = make(keys={"deepgram": "ours"}, openai_key="theirs")
    for chosen in (("deepgram",), ("openai", "deepgram"), (module.DEEPGRAM,), (module.OPENAI, module.DEEPGRAM)):
        with busy():
            await hear(engines, SessionSettings(stt=chosen), tentative=True)
    assert runner.specs == []
    for chosen in (("deepgram", "auto"), ("auto", "deepgram"), ("openai", SPHINX), ("auto",)):
        await hear(engines, SessionSettings(stt=chosen), tentative=True)
    assert {spec.plugin for spec in runner.specs} == {SPHINX}
    runner.specs.clear()
    await hear(engines, SessionSettings(stt=("deepgram",)))
    assert [spec.plugin for spec in runner.specs] == [module.DEEPGRAM]


async def test_without_a_key_those_who_are_here_listen_and_guess(make: Make, runner: Asked):
    engines = make()
    for tentative in (True, False):
        await hear(engines, SessionSettings(stt=("deepgram", "openai")), tentative=tentative)
    assert [spec.plugin for spec in runner.specs] == [SPHINX, SPHINX]


async def test_a_server_of_the_operators_wants_no_key(make: Make, runner: Asked):
    url = "http://127.0.0.1:1/v1"
    engines = make(openai_url=url)
    await hear(engines, SessionSettings(stt=("openai",)))
    assert [(spec.plugin, dict(spec.config)) for spec in runner.specs] == [(module.OPENAI, {"url": url})]
    await hear(make(openai_url=url, openai_key="k"), SessionSettings(stt=("openai",)))
    assert dict(runner.specs[1].config) == {"key": "k", "url": url}
    runner.specs.clear()
    await hear(make(deepgram_url=url), SessionSettings(stt=("deepgram",)))
    assert [spec.plugin for spec in runner.specs] == [SPHINX], "Deepgram takes nobody without a key"


async def test_whoever_fails_another_is_asked(make: Make, runner: Asked):
    runner.failing = {module.DEEPGRAM, module.OPENAI}
    engines = make(keys={"deepgram": "a", "openai": "b"})
    assert (await hear(engines, SessionSettings(stt=("deepgram", "openai")))).engine == SPHINX
    assert [spec.plugin for spec in runner.specs] == [module.DEEPGRAM, module.OPENAI, SPHINX]


def test_only_engines_that_are_there_can_be_chosen():
    for kind, names in (
        ("stt", ("auto", "whisper", "deepgram", "openai", SPHINX, "ovos-stt-plugin-fasterwhisper")),
        ("tts", ("auto", "agentvoicebox-tts-kokoro", "agentvoicebox-tts-flite")),
    ):
        for name in names:
            module.check(kind, name, "engine")  # type: ignore[arg-type]
    for kind, name in (("stt", "acme-merger"), ("tts", "deepgram"), ("stt", "agentvoicebox-tts-flite"), ("stt", "")):
        with pytest.raises(BadInput, match="auto") as caught:
            module.check(kind, name, "fallbacks")  # type: ignore[arg-type]
        assert (caught.value.code, caught.value.param) == ("unknown_engine", "fallbacks")
