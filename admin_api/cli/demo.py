"""`avb demo`: two tenants speak to one stock OVOS stack, and each hears its own answer, metered to it."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any

import uvloop

from agentvoicebox.admin_api.cli import console
from agentvoicebox.admin_api.cli.say import RATE, STAGES, summary, write_wav
from agentvoicebox.admin_api.stack import Stack
from agentvoicebox.bus_bridge import audio, client
from agentvoicebox.bus_bridge.models import SessionSettings
from agentvoicebox.config import logs
from agentvoicebox.config.errors import NotFound
from agentvoicebox.config.settings import Settings
from agentvoicebox.tenancy import keys, metering, tenants, voices
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import PLATFORM, Metric, Tenant, Tier
from agentvoicebox.tenancy.voices import VoiceConfig

DATE_TIME = "ovos-skill-date-time.openvoiceos"

HEARD, SPOKEN = Metric.STT_AUDIO_SECONDS, Metric.TTS_AUDIO_SECONDS


@dataclass(frozen=True, slots=True)
class Part:
    """One tenant of the demo: who it is, how it sounds, and what its user says."""

    slug: str
    name: str
    voice: VoiceConfig
    sentences: tuple[str, ...]


PARTS = (
    Part("demo-acme", "Acme", VoiceConfig(voice="slt", persona_name="Ada"), ("what time is it", "who am i talking to")),
    Part(
        "demo-globex",
        "Globex",
        # The same sentence gets another answer: this tenant has switched the skill off.
        VoiceConfig(voice="rms", persona_name="Max", speed=0.9, disabled_skills=(DATE_TIME,)),
        ("who am i talking to", "what time is it"),
    ),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `avb demo`."""
    parser.add_argument("--data", metavar="DIR", help="data directory; the demo keeps to DIR/demo")
    console.add_json(parser)
    parser.set_defaults(run=run)


def run(found: argparse.Namespace) -> int:
    """Have all turns; exit code 0 only if everything happened."""
    base = console.settings(found, port=0)
    quiet = "WARNING" if base.log_level == "INFO" else base.log_level  # the story is told below
    settings = console.settings(found, data=base.data / "demo", host="127.0.0.1", port=0, log_level=quiet)
    logs.configure(settings)
    result = uvloop.run(_perform(settings))
    if found.json:
        console.emit(result)
    else:
        _show(result)
    return 0 if result["ok"] else 1


async def _perform(settings: Settings) -> dict[str, Any]:
    with console.progress() as tell:
        stack = Stack(settings, tell)
        await stack.start()
        try:
            (settings.data / "answers").mkdir(exist_ok=True)
            turns: list[dict[str, Any]] = []
            usage: dict[str, dict[str, float]] = {}
            metered = True
            for part in PARTS:
                tenant, key = await _admit(stack.database, part)
                before = await metering.totals(stack.database, tenant.id)
                try:
                    mine = [turn async for turn in _converse(stack, part, key.key, tell)]
                finally:
                    await keys.revoke(stack.database, tenant.id, key.id)
                after = await metering.totals(stack.database, tenant.id)
                usage[part.slug] = {m: round(after.get(m, 0.0) - before.get(m, 0.0), 3) for m in (HEARD, SPOKEN)}
                heard = sum(turn["audio_seconds"] for turn in mine)
                metered = metered and usage[part.slug][HEARD] > 0 and abs(usage[part.slug][SPOKEN] - heard) < 0.05
                turns += mine
        finally:
            tell("stopping")
            await stack.stop()
    return {"ok": metered and all(turn["ok"] for turn in turns), "turns": turns, "usage": usage}


async def _admit(database: Database, part: Part) -> tuple[Tenant, keys.Issued]:
    """The tenant of this part, made if this is the first time, and a key of this run's own."""
    try:
        tenant = await tenants.by_slug(database, part.slug)
        await voices.put(database, tenant.id, part.voice)
    except NotFound:
        tenant = await tenants.create(database, part.slug, part.name, Tier.PRO, voice=part.voice)
    return tenant, await keys.issue(database, tenant.id, "demo")


async def _converse(stack: Stack, part: Part, key: str, tell: Any) -> Any:
    """Every sentence of a tenant, spoken aloud by a voice and heard by its own session."""
    for number, sentence in enumerate(part.sentences, 1):
        tell(f"{part.name} says “{sentence}”")
        question = await stack.engines.speak(sentence, SessionSettings(voice="slt"), PLATFORM)
        pcm = audio.resample(question.pcm, question.rate, RATE)
        async with client.session(stack.url, key, {"input_rate": RATE}) as session:
            answer = await session.say(pcm, RATE)
        wav = stack.settings.data / "answers" / f"{part.slug}-{number}.wav"
        write_wav(wav, bytes(answer.audio), answer.rate)
        heard = summary(answer)
        understood = _words(heard["transcript"]) == _words(sentence)
        yield {
            "tenant": part.slug,
            "voice": part.voice.voice,
            "said": sentence,
            **heard,
            "wav": str(wav),
            "ok": understood and bool(heard["answer"]) and heard["audio_seconds"] > 0 and answer.error is None,
        }


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def _show(result: dict[str, Any]) -> None:
    print_ = console.stdout.print
    print_()
    for turn in result["turns"]:
        mark = "[green]✓[/green]" if turn["ok"] else "[red]✗[/red]"
        print_(f"{mark} [bold]{turn['tenant']}[/bold] understood [bold]“{turn['transcript']}”[/bold]")
        print_(f"  and answered in voice {turn['voice']}: [bold]“{turn['answer']}”[/bold]")
    print_("  Globex has the date-time skill switched off: same question, other answer.\n")
    rows = [
        [f"{turn['tenant']} {number}", *(f"{turn['timings_ms'][stage]:.0f}" for stage in STAGES)]
        for number, turn in enumerate(result["turns"], 1)
    ]
    names = [stage.replace("_", " ") for stage in STAGES]
    console.table("Milliseconds, from the end of speech", ["turn", *names], rows)
    used = [[slug, f"{u[HEARD]:.2f}", f"{u[SPOKEN]:.2f}"] for slug, u in result["usage"].items()]
    console.table("Metered, seconds of audio", ["tenant", "understood", "spoken"], used)
    print_("The answers, to listen to:")
    for turn in result["turns"]:
        print(f"  {turn['wav']}")
    if not result["ok"]:
        print_("[red]Something did not happen as it should: see the lines marked ✗.[/red]")
