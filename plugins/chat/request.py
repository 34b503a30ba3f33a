"""What is asked of a language model and what comes back, in OpenAI's words whoever the provider is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from agentvoicebox.config.errors import BadInput
from agentvoicebox.plugins.chat.tokens import Tokens

LONGEST_PROMPT: Final = 200_000
"""Characters of all messages and tools together."""
MOST_TOKENS: Final = 4096
ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool"})
CHOICES: Final = frozenset({"auto", "none", "required"})
URLS: Final = {
    "openai": "https://api.openai.com/v1",
    "anthropic": "https://api.anthropic.com",
    "groq": "https://api.groq.com",
    "ollama": "http://127.0.0.1:11434",
}
"""Where each provider answers unless an `Endpoint` names another place; "compatible" has none."""


@dataclass(slots=True)
class Request:
    """A question to a model. `messages`, `tools` and `tool_choice` have the form of OpenAI's chat completions.

    `temperature` is 0 to 2 (Anthropic's models get at most 1), `max_tokens` 1 to 4096. Who is asked, and which model,
    are the choices given to `Chats.stream`.
    """

    messages: list[dict[str, Any]]
    temperature: float = 0.7
    max_tokens: int = 1024
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None


@dataclass(slots=True)
class Delta:
    """A piece of an answer: text, pieces of calls as OpenAI streams them (`index` says of which), or the end.

    The last one, and only that, has `finish` ("stop", "length", "tool_calls" or "content_filter") and `tokens`.
    """

    text: str = ""
    tool_calls: list[dict[str, Any]] | None = None
    finish: str | None = None
    tokens: Tokens | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model is asked, and with which key.

    `provider` is "openai", "anthropic", "groq", "ollama" or "compatible" (anything else that speaks like OpenAI; its
    `url` ends where `/chat/completions` begins). Not `trusted` is a URL that a tenant gave: it must begin with https,
    and only public addresses are connected to.
    """

    provider: str
    key: str = field(default="", repr=False)
    url: str = ""
    trusted: bool = True

    def __post_init__(self) -> None:
        """Raises `BadInput`: provider_unknown, or provider_url_invalid."""
        if self.provider not in URLS and self.provider != "compatible":
            known = ", ".join([*URLS, "compatible"])
            raise BadInput(f"There is no such provider of language models; there are {known}.", code="provider_unknown")
        if not self.key.isascii() or not self.key.isprintable():
            raise BadInput("The provider's key holds characters that no key has.", code="provider_key_invalid")
        try:
            parts = urlsplit(self.address)
            good = bool(parts.hostname) and parts.port != 0 and self.address.isprintable() and " " not in self.address
        except ValueError:
            good = False
        if not good or parts.username is not None or parts.query or parts.fragment or parts.scheme not in self._schemes:
            kinds = " or ".join(f"{each}://" for each in self._schemes)
            raise BadInput(
                f"The provider's URL must begin with {kinds} and hold no user name, query or fragment.",
                code="provider_url_invalid",
                param="url",
            )

    @property
    def address(self) -> str:
        """The URL asked."""
        return self.url or URLS.get(self.provider, "")

    @property
    def _schemes(self) -> tuple[str, ...]:
        return ("http", "https") if self.trusted else ("https",)


def measure(request: Request) -> int:
    """The bytes of a request's messages and tools as JSON.

    Raises `BadInput` for what no provider takes: prompt_too_long, or messages_invalid, parameter_invalid.
    """
    import msgspec

    _check(request)
    try:
        size = len(msgspec.json.encode((request.messages, request.tools)))
    except (TypeError, ValueError, RecursionError):
        raise _wrong("The messages must be JSON, in Unicode text.") from None
    # Only what might be too long is counted exactly: no text has more characters than its JSON has bytes.
    if size > LONGEST_PROMPT and sum(map(len, _texts((request.messages, request.tools)))) > LONGEST_PROMPT:
        raise BadInput(
            f"The conversation has more than {LONGEST_PROMPT} characters; shorten it, or begin a new one.",
            code="prompt_too_long",
            param="messages",
        )
    return size


def text_of(message: dict[str, Any]) -> str:
    """The text of a checked message."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def arguments(function: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, which OpenAI's form holds as a text of JSON. Raises `BadInput` when they are none."""
    try:
        found = json.loads(function.get("arguments") or "{}")
    except (TypeError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BadInput("A tool call's arguments must be a JSON object.", code="messages_invalid", param="messages")
    return found


def _check(request: Request) -> None:
    if not request.messages or not isinstance(request.messages, list):
        raise _wrong("There must be at least one message.")
    for message in request.messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise _wrong(f"A message must be an object with one of these roles: {', '.join(sorted(ROLES))}.")
        content = message.get("content")
        if isinstance(content, list):
            good = all(isinstance(each, dict) and isinstance(each.get("text"), str) for each in content)
        else:
            good = content is None or isinstance(content, str)
        if not good:
            raise _wrong("A message's content must be text, or a list of parts with text.")
        for call in _listed(message.get("tool_calls")):
            function = call.get("function") if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise _wrong("A message's tool call must have a function with a name.")
    for tool in _listed(request.tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _wrong("A tool must have a function with a name.", "tools")
        if not isinstance(function.get("parameters") or {}, dict):
            raise _wrong("The parameters of a tool's function must be a JSON schema: an object.", "tools")
        if not isinstance(function.get("description") or "", str):
            raise _wrong("The description of a tool's function must be text.", "tools")
    _check_choice(request.tool_choice)
    if not 0 <= request.temperature <= 2:
        raise BadInput("The temperature must be from 0 to 2.", code="parameter_invalid", param="temperature")
    if not 1 <= request.max_tokens <= MOST_TOKENS:
        raise BadInput(f"max_tokens must be 1 to {MOST_TOKENS}.", code="parameter_invalid", param="max_tokens")


def _check_choice(choice: Any) -> None:
    if isinstance(choice, dict):
        function = choice.get("function") or choice
        good = isinstance(function, dict) and isinstance(function.get("name"), str)
    else:
        good = choice is None or (isinstance(choice, str) and choice in CHOICES)
    if not good:
        raise _wrong("tool_choice must be auto, none, required, or an object that names a function.", "tool_choice")


def _listed(value: Any) -> Iterable[Any]:
    if value is not None and not isinstance(value, list):
        raise _wrong("Tools and tool calls must be lists.", "tools")
    return value or ()


def _wrong(message: str, param: str = "messages") -> BadInput:
    return BadInput(message, code="messages_invalid", param=param)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value, names too, however deep."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, dict):
            waiting += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple):
            waiting += each
