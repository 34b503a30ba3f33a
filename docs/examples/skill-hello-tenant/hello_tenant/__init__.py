"""Greets in the name of the tenant, with the word that the tenant has chosen."""

from __future__ import annotations

from ovos_bus_client.message import Message
from ovos_utils import classproperty
from ovos_utils.process_utils import RuntimeRequirements
from ovos_workshop.decorators import intent_handler
from ovos_workshop.skills import OVOSSkill

from agentvoicebox.plugins import tenant


class HelloTenantSkill(OVOSSkill):
    """Answers "greet me"."""

    @classproperty
    def runtime_requirements(self) -> RuntimeRequirements:
        """It needs no network, so OVOS need not wait for one."""
        return RuntimeRequirements(internet_before_load=False, network_before_load=False, requires_internet=False)

    @intent_handler("hello.intent")
    def handle_hello(self, message: Message) -> None:
        """Say who greets, or that nobody knows."""
        whose = tenant.current(message)
        if whose is None:
            self.speak_dialog("nobody")
            return
        greeting = whose.settings.get("greeting", "Hello")
        self.speak(f"{greeting} from {whose.persona} of {whose.name}.")
