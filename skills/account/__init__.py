"""The skill that knows whose assistant it is."""

from __future__ import annotations

from ovos_bus_client.message import Message
from ovos_utils import classproperty
from ovos_utils.process_utils import RuntimeRequirements
from ovos_workshop.decorators import intent_handler
from ovos_workshop.skills import OVOSSkill

from agentvoicebox.skills import tenant


class AccountSkill(OVOSSkill):  # type: ignore[misc]
    """Answers who one is talking to."""

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
        account = tenant.current(message)
        if account is None:
            self.speak_dialog("unknown.account")
            return

        def fill(line: str, lang: str) -> str:
            return line.format(persona=account.persona, tenant=account.name)

        # OVOS expands "(a|b)" in all that it renders, and the names are a tenant's own words: they go in afterwards.
        self.speak_dialog("account", {"persona": "{persona}", "tenant": "{tenant}"}, render_callback=fill)
