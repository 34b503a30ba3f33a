"""The tenant's persona as a chat solver, for who keeps the stock ovos-persona on a device.

The conversation is ovos-persona's, which sends it along with each question. While the platform is out of reach the
solver knows nothing, so that the next one of the persona's answers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ovos_plugin_manager.templates.solvers import ChatMessageSolver
from ovos_utils.log import LOG

from agentvoicebox.config.errors import AvbError
from agentvoicebox.plugins.clauses import Sentences, speakable
from agentvoicebox.plugins.persona import LIMIT, sentence

if TYPE_CHECKING:
    from agentvoicebox.plugins.device.link import Asking

Messages = list[dict[str, str]]


class TenantSolver(ChatMessageSolver):  # type: ignore[misc]
    """The solver `agentvoicebox-solver`: asks the platform as this device, and nobody when that is out of reach."""

    def __init__(self, config: dict[str, Any] | None = None, *_: Any, **__: Any) -> None:
        # Whatever the caller wants: the platform understands the language, and no answer is another's for being alike.
        super().__init__(config, enable_tx=False, enable_cache=False)

    def continue_chat(self, messages: Messages, lang: str | None = None, units: str | None = None) -> str | None:
        """The whole answer to a conversation; None when there is none, or only half of one."""
        try:
            with _asked(messages, lang) as pieces:
                return "".join(pieces).strip() or None
        except AvbError as error:
            LOG.warning(f"the platform did not answer: {error.code}")
            return None

    def stream_chat_utterances(
        self, messages: Messages, lang: str | None = None, units: str | None = None
    ) -> Iterable[str]:
        """The answer, sentence by sentence as they are complete; one that breaks off says so. Never raises."""
        sentences = Sentences(lang or self.default_lang)
        said = False
        try:
            with _asked(messages, lang) as pieces:
                for piece in pieces:
                    for each in sentences.feed(piece):
                        if words := speakable(each):
                            said = True
                            yield words
        except AvbError as error:
            LOG.warning(f"the platform did not answer, or half: {error.code}")
            if said:  # else the next solver answers
                yield from filter(None, map(speakable, sentences.end()))
                yield sentence("broke_off", lang or self.default_lang)
            return
        yield from filter(None, map(speakable, sentences.end()))

    def get_spoken_answer(self, query: str, lang: str | None = None, units: str | None = None) -> str | None:
        """The answer to a question without a conversation; None when there is none."""
        return self.continue_chat([{"role": "user", "content": query}], lang, units)

    def stream_utterances(self, query: str, lang: str | None = None, units: str | None = None) -> Iterable[str]:
        """As `stream_chat_utterances`, without a conversation."""
        return self.stream_chat_utterances([{"role": "user", "content": query}], lang, units)


@contextmanager
def _asked(messages: Messages, language: str | None) -> Iterator[Iterable[str]]:
    """The pieces of the answer. Raises `AvbError` when there is nobody to ask, and as they do; it ends by `LIMIT`."""
    from agentvoicebox.plugins.device import link  # with this process's first question

    shared = link.shared("core")
    if shared is None:
        raise link.Away("This device is not connected to a platform: pair it with `avb device pair`.")
    asking: Asking = shared.ask(language=language or "", messages=messages)
    late = threading.Timer(LIMIT, asking.cancel)
    late.daemon = True
    late.start()
    try:
        yield asking
    finally:
        late.cancel()
        asking.cancel()
