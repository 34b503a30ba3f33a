"""Two tenants ask the account skill of one stock core about themselves (hazards H5 and H13)."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from typing import Any

import pytest
from ovos_bus_client.message import Message
from ovos_utils.fakebus import FakeBus

from agentvoicebox.bus_bridge import client
from agentvoicebox.config.errors import NotFound
from agentvoicebox.plugins import node, persona, tenant
from agentvoicebox.plugins.device import connection, link
from agentvoicebox.plugins.device.section import Section
from agentvoicebox.tenancy import personas, skills
from agentvoicebox.tenancy.personas import Character

TEXT = {"modality": "text"}
SKILL = "skill-hello.example"


async def test_each_is_told_of_its_own_plan(stack: Any, new_customer: Any) -> None:
    large, small = await new_customer(tier="enterprise"), await new_customer(tier="starter")
    async with (
        client.session(stack.url, large.key, TEXT) as one,
        client.session(stack.url, small.key, TEXT) as two,
    ):
        for _ in range(2):
            first, second = await asyncio.gather(*(each.write("what plan do I have") for each in (one, two)))
            assert first.text == f"{large.name} has the Enterprise plan."
            assert second.text == f"{small.name} has the Starter plan."
        left = [(await each.write("how much of my plan is left")).text for each in (one, two)]
        minutes = (await one.write("how many minutes are left")).text
    assert "99999 of 100000 conversations" in left[0]
    assert "999 of 1000 conversations" in left[1]
    assert minutes == "Minutes are not limited. Hardly any have been used this month."


async def test_personas_are_listed_and_chosen_by_name(stack: Any, new_customer: Any) -> None:
    """By the skill's own words and by the node's, each in its session alone, and never another tenant's."""
    ours, theirs = await new_customer(persona_name="House"), await new_customer(persona_name="Villa")
    for customer, name in ((ours, "Beatrice"), (ours, "Ada"), (theirs, "Bruno")):
        await personas.create(stack.database, customer.id, Character(name))
    async with (
        client.session(stack.url, ours.key, TEXT) as one,
        client.session(stack.url, ours.key, TEXT) as same,
        client.session(stack.url, theirs.key, TEXT) as other,
    ):
        said = (await one.write("which personas are there")).text
        assert said == "You are talking to House. You can also talk to Ada, Beatrice."
        assert (await other.write("which personas are there")).text.endswith("You can also talk to Bruno.")
        assert (await one.write("change the persona to beatriss")).text == "You are talking to Beatrice now."
        assert "Beatrice" in (await one.write("who am I talking to")).text
        assert (await one.write("talk to Ada")).text == "You are talking to Ada now."
        assert (await one.write("which personas are there")).text.startswith("You are talking to Ada.")
        said = (await one.write("change the persona to Bruno")).text
        assert said.lower().startswith("there is nobody called bruno here.")
        for session, name in ((one, "Ada"), (same, "House"), (other, "Villa")):
            assert name in (await session.write("who am I talking to")).text


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stalls for seconds is no platform that is away."""
    monkeypatch.setattr(node, "TELL", 30.0)
    monkeypatch.setattr(connection, "SILENT", 30.0)
    monkeypatch.setattr(link.Link, "choose", functools.partialmethod(link.Link.choose, timeout=30.0))


@pytest.mark.usefixtures("patient")
async def test_a_skill_on_a_device_knows_its_tenant(
    stack: Any, new_customer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard H13 on devices: each process has one key, and settings come with it, whatever a message says."""
    customers = [await new_customer(persona_name="House"), await new_customer(persona_name="Villa")]
    claims = {"tenant_id": str(customers[0].id), "tenant_name": customers[0].name, "persona_name": "House"}
    message = Message("any", {}, {"skill_id": SKILL, **claims})
    for customer in customers:
        await skills.set_settings(stack.database, customer.id, SKILL, {"greeting": f"From {customer.name}"})
        await personas.create(stack.database, customer.id, Character("Ada"))
        home = tmp_path / customer.slug
        home.mkdir()
        (home / "device.key").write_text(customer.key)
        device = link.Link(Section(stack.url, home / "device.key", state=home / "state"), "core")
        monkeypatch.setattr(link, "shared", lambda process, device=device: device)
        monkeypatch.setattr(tenant, "Configuration", lambda: {"agentvoicebox": {"url": stack.url}})
        try:
            async with asyncio.timeout(30):
                while device.state is not link.State.UP:
                    await asyncio.sleep(0.01)
            whose = await asyncio.to_thread(tenant.current, message)
            assert (whose.id, whose.name, whose.slug) == (str(customer.id), customer.name, customer.slug)
            assert whose.settings == {"greeting": f"From {customer.name}"}
            assert whose.personas == ("Ada",)
            assert (await asyncio.to_thread(tenant.account, message)).plan == "enterprise"
            assert await asyncio.to_thread(tenant.choose_persona, message, "ada") == "Ada"
            with pytest.raises(NotFound):
                await asyncio.to_thread(tenant.choose_persona, message, "Nobody")
        finally:
            await asyncio.to_thread(device.close)


@pytest.mark.usefixtures("patient")
async def test_the_persona_of_a_device_is_its_tenants(
    stack: Any, new_customer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazards H4 and H5 on a device: who answers is for its tenant and this device alone."""
    customer, other = await new_customer(persona_name="House"), await new_customer(persona_name="Villa")
    await personas.create(stack.database, customer.id, Character("Ada"))
    await personas.create(stack.database, other.id, Character("Bruno"))
    (tmp_path / "device.key").write_text(customer.key)
    device = link.Link(Section(stack.url, tmp_path / "device.key", state=tmp_path / "state"), "core")
    monkeypatch.setattr(link, "shared", lambda process: device)
    monkeypatch.setattr(persona, "Configuration", lambda: {"agentvoicebox": {"url": stack.url}})
    bus, said, ended = FakeBus(), [], asyncio.Queue()
    loop = asyncio.get_running_loop()
    bus.on("speak", lambda message: said.append(message.data["utterance"]))
    bus.on("ovos.utterance.handled", lambda message: loop.call_soon_threadsafe(ended.put_nowait, None))
    stage = persona.Persona(bus)

    async def ask(text: str) -> str:
        said.clear()
        assert stage.match([text], "en-us", Message("")) is not None
        bus.emit(Message("avb.persona.ask", {"utterance": text, "lang": "en-us"}))
        await asyncio.wait_for(ended.get(), 30)
        return " ".join(said)

    try:
        assert stage.match(["hello"], "en-us", Message("")) is None or device.state is link.State.UP
        async with asyncio.timeout(30):
            while device.state is not link.State.UP:
                await asyncio.sleep(0.01)
        assert await ask("talk to Ada") == "You are talking to Ada now."
        assert await ask("who am I talking to") == "You are talking to Ada."
        assert "Bruno" not in await ask("talk to Bruno")
        assert (await ask("colorless ideas")).startswith("No language model is set up here")
    finally:
        await asyncio.to_thread(stage.shutdown)
        await asyncio.to_thread(device.close)
