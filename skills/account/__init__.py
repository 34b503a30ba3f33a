"""The skill that knows whose assistant it is, what that account has left, and who else one could talk to.

"Talk to Ada" is not among its intents: whether Ada is one of the tenant's personas or somebody in a question is for the
node to know, which heeds such words itself when no skill has (`bus_bridge/talk.json`). Here a persona is changed by
words that can mean nothing else.
"""

from __future__ import annotations

from ovos_bus_client.message import Message
from ovos_utils import classproperty
from ovos_utils.process_utils import RuntimeRequirements
from ovos_workshop.decorators import intent_handler
from ovos_workshop.skills import OVOSSkill

from agentvoicebox.config.errors import NotFound, Unavailable
from agentvoicebox.plugins import tenant

MOST_NAMES = 10
"""Personas that are listed aloud."""


class AccountSkill(OVOSSkill):  # type: ignore[misc]
    """Answers who one is talking to, what the plan is and what is left of it; changes who answers."""

    @classproperty  # type: ignore[untyped-decorator]
    def runtime_requirements(self) -> RuntimeRequirements:
        return RuntimeRequirements(
            internet_before_load=False,
            network_before_load=False,
            gui_before_load=False,
            requires_internet=False,
            requires_network=False,
            requires_gui=False,
            no_internet_fallback=True,
            no_network_fallback=True,
            no_gui_fallback=True,
        )

    @intent_handler("who.intent")  # type: ignore[untyped-decorator]
    def handle_who(self, message: Message) -> None:
        if whose := self._whose(message):
            self._say("account", persona=whose.persona, tenant=whose.name)

    @intent_handler("plan.intent")  # type: ignore[untyped-decorator]
    def handle_plan(self, message: Message) -> None:
        if (whose := self._whose(message)) and (account := self._account(message)):
            self._say("plan", tenant=whose.name, plan=account.plan.capitalize())

    @intent_handler("left.intent")  # type: ignore[untyped-decorator]
    def handle_left(self, message: Message) -> None:
        if not self._whose(message) or not (account := self._account(message)):
            return
        left, limit = account.left("sessions"), account.limits.get("sessions")
        if left is None or limit is None:
            self._say("left.unlimited", used=_whole(account.used.get("sessions", 0.0)))
        elif left < 1:
            self._say("left.none", limit=_whole(limit))
        else:
            self._say("left.one" if left < 2 else "left", left=_whole(left), limit=_whole(limit))

    @intent_handler("minutes.intent")  # type: ignore[untyped-decorator]
    def handle_minutes(self, message: Message) -> None:
        if not self._whose(message) or not (account := self._account(message)):
            return
        minutes = sum(account.used.get(metric, 0.0) for metric in ("stt_audio_seconds", "tts_audio_seconds")) / 60
        self._say("minutes.few" if minutes < 2 else "minutes", minutes=_whole(minutes))

    @intent_handler("personas.intent")  # type: ignore[untyped-decorator]
    def handle_personas(self, message: Message) -> None:
        if self._whose(message):
            self._list(message)

    @intent_handler("switch.intent")  # type: ignore[untyped-decorator]
    def handle_switch(self, message: Message) -> None:
        if not self._whose(message):
            return
        name = str(message.data.get("name") or "").strip()
        try:
            self._say("switched", persona=tenant.choose_persona(message, name))
        except NotFound:
            self._say("nobody", name=name)
            self._list(message)
        except Unavailable:
            self._say("unavailable")

    def _whose(self, message: Message) -> tenant.TenantContext | None:
        """Whose assistant is asked; says so when it is nobody's."""
        whose = tenant.identity(message)
        if whose is None:
            self._say("unknown.account")
        return whose

    def _account(self, message: Message) -> tenant.Account | None:
        """What the account has left; says so when nobody knows at this moment."""
        account = tenant.account(message)
        if account is None:
            self._say("unavailable")
        return account

    def _list(self, message: Message) -> None:
        whose = tenant.current(message)
        if whose is None:  # the node says that this turn is another tenant's
            self._say("unknown.account")
            return
        others = [name for name in whose.personas if name != whose.persona]
        if others:
            self._say("personas", persona=whose.persona, names=", ".join(others[:MOST_NAMES]))
        else:
            self._say("personas.none", persona=whose.persona)

    def _say(self, dialog: str, **words: str) -> None:
        """Say a line with these words in it, just as they are.

        OVOS expands "(a|b)" in all that it renders, and names are a tenant's own words: they go in afterwards.
        """

        def fill(line: str, lang: str) -> str:
            return line.format(**words)

        self.speak_dialog(dialog, {name: f"{{{name}}}" for name in words}, render_callback=fill)


def _whole(number: float) -> str:
    """A number as it is said: nobody wants to hear fractions of it."""
    return str(round(number))
