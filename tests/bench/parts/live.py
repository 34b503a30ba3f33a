"""An administrator changes what a tenant's devices listen for: how soon does a device do so?"""

from __future__ import annotations

import asyncio
import re
import statistics
import time
from datetime import datetime

import httpx
from parts.node import beside
from parts.ovos import Device, running
from parts.reports import percentile, report, tell
from parts.turns import ours

CHANGES = 30
BAR = 2.0
PHRASES = ("alexa", "okay nabu", "hey jarvis")

_HEARD = re.compile(r"^(\S+ \S+) - .*wake words: (.*)$", re.MULTILINE)


async def live(device: Device, phrase: str, since: float) -> float:
    """When the listener listens for nothing but the phrase, in seconds since 1970."""
    async with asyncio.timeout(30):
        while True:
            for moment, heard in reversed(_HEARD.findall(device.log("dinkum-listener"))):
                at = datetime.fromisoformat(moment).timestamp()
                if heard == phrase and at > since:
                    return at
            await asyncio.sleep(0.05)


async def measure() -> None:
    """Print how long a change takes from the request to the stock listener that listens for another phrase."""
    with beside() as (directory, node):
        admin = node.admit("bench", scopes="admin,realtime")
        key = directory / "device.key"
        key.write_text(admin)
        async with (
            running(directory / "device", ours(node.url, key)) as device,
            httpx.AsyncClient(
                base_url=f"{node.url}/api/v2", headers={"Authorization": f"Bearer {admin}"}, trust_env=False
            ) as http,
        ):
            await device.linked()
            tell(f"{CHANGES} changes of the wake word")
            made = (await http.post("/wake-words", json={"phrase": PHRASES[0]})).raise_for_status().json()
            found = []
            for n in range(1, CHANGES + 1):
                await asyncio.sleep(0.5)
                begin = time.time()
                phrase = PHRASES[n % len(PHRASES)]
                (await http.patch(f"/wake-words/{made['id']}", json={"phrase": phrase})).raise_for_status()
                found.append(await live(device, phrase, begin) - begin)
    report(
        "device.configuration_live_p95",
        percentile(found, 0.95),
        "s",
        BAR,
        "from the administrator's request to the stock listener that listens for another phrase",
        p50_s=round(statistics.median(found), 3),
        changes=len(found),
    )
