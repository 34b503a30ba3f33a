"""`avb tenant create`."""

from __future__ import annotations

import argparse

from agentvoicebox.admin_api.cli import console, store
from agentvoicebox.tenancy import tenants
from agentvoicebox.tenancy.voices import VoiceConfig


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `avb tenant`."""
    create = parser.add_subparsers(dest="action", required=True).add_parser("create", help="make a tenant")
    create.add_argument("--slug", required=True, help="short name: a-z, 0-9 and -")
    create.add_argument("--name", required=True, help="name of the organisation")
    create.add_argument("--tier", default="free", help="free, starter, pro or enterprise")
    voice = create.add_argument_group("its assistant")
    voice.add_argument("--voice", default="auto", help="a voice of the speech engine")
    voice.add_argument("--speed", type=float, default=1.0, help="0.5 to 2.0")
    voice.add_argument("--language", default="en-US", help="a language tag such as en-US")
    voice.add_argument("--wake-word", default="hey mycroft")
    voice.add_argument("--persona-name", default="Assistant", help="what the assistant calls itself")
    voice.add_argument("--disable-skill", action="append", default=[], metavar="ID", help="a skill that never answers")
    console.add_data(create)
    console.add_json(create)
    create.set_defaults(run=run)


def run(found: argparse.Namespace) -> int:
    """Make the tenant and print it."""
    voice = VoiceConfig(
        voice=found.voice,
        speed=found.speed,
        language=found.language,
        wake_word=found.wake_word,
        persona_name=found.persona_name,
        disabled_skills=tuple(found.disable_skill),
    )
    settings = console.settings(found)
    made = store.use(settings, lambda db: tenants.create(db, found.slug, found.name, found.tier, voice))
    if found.json:
        console.emit(
            {
                "id": str(made.id),
                "slug": made.slug,
                "name": made.name,
                "tier": made.tier,
                "status": made.status,
                "created_at": made.created_at.isoformat(),
            }
        )
    else:
        console.stdout.print(f"Tenant [bold]{made.slug}[/bold] ({made.name}, {made.tier}) is {made.id}")
        console.stdout.print(f"Next: avb key create --tenant {made.slug} --name first")
    return 0
