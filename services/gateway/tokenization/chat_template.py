"""A model's own chat template (Jinja): what the gateway knows of it, and how it has it rendered beside itself."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from octavo.services.common.errors import Reason, ServingError, invalid_field
from octavo.services.gateway.offload import long_json
from octavo.services.gateway.offload.limited_process import LimitedProcess, ProcessError
from octavo.services.gateway.offload.limited_server import Outcome
from octavo.services.gateway.tokenization.template_process import (
    HEAD,
    LIMITS,
    MESSAGES_FIELD,
    PROMPT,
    TOO_LARGE,
    TOO_LONG,
    TemplateError,
)

MAX_TEMPLATE_BYTES = 262_144
_MAX_WAITING = 4096
_MODULE = "octavo.services.gateway.tokenization.template_process"
_COMMON_ROLES = frozenset({"system", "user", "assistant", "tool", "developer"})
_LOOP_OVER_CALLS = re.compile(r"\bin\s+(?:\w+(?:\.|\[['\"]))?tool_calls\b")
_LONG = 1 << 18  # bytes whose decoding takes a while


@dataclass(frozen=True)
class TemplateFacts:
    """What a conversation has to be like for a template.

    takes_tools        the template tells the model of tools
    writes_tool_calls  it writes the calls that the assistant made
    texts              the constants in it
    """

    source: str
    takes_tools: bool
    writes_tool_calls: bool
    texts: frozenset[str]

    @cached_property
    def reads_thinking(self) -> bool:
        """Whether what the assistant thought is called `thinking`, as in gpt-oss's."""
        return ".thinking" in self.source

    @cached_property
    def needs_descriptions(self) -> bool:
        """Whether it fails for a tool without a description."""
        return "+ tool.description" in self.source

    @cached_property
    def writes_one_call(self) -> bool:
        """Whether it leaves out or refuses all calls in a message but the first."""
        return "tool_calls[0]" in self.source and _LOOP_OVER_CALLS.search(self.source) is None

    def written_role(self, role: str) -> str:
        """Return the role to write: OpenAI's newer word for the system is known to few templates."""
        return "system" if role == "developer" and role not in self.source else role

    def knows_role(self, role: str) -> bool:
        """Return whether a role is one of the usual ones or named in the template."""
        return role in _COMMON_ROLES or role in self.texts


class ChatTemplate:
    """A template, rendered in a process of its own."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], num_at_once: int = 2) -> None:
        """`special_tokens` ("bos_token": "<s>", ...) are the template's variables. Raises TemplateError."""
        if len(source.encode()) > MAX_TEMPLATE_BYTES:
            raise TemplateError(f"the chat template is longer than {MAX_TEMPLATE_BYTES} bytes")
        self.source = source
        self.sha256 = hashlib.sha256(source.encode()).hexdigest()
        first = json.dumps({"source": source, "special_tokens": dict(special_tokens)}).encode()
        self._process = LimitedProcess(_MODULE, lambda: first, num_at_once, _MAX_WAITING, _busy)
        self._facts: TemplateFacts | None = None

    async def facts(self) -> TemplateFacts:
        """Return what the process has found out about the template. Raises TemplateError."""
        if self._facts is None:
            self._facts = await self._compile()
        return self._facts

    async def _compile(self) -> TemplateFacts:
        try:
            ready = json.loads(await self._process.start())
        except ProcessError as error:
            raise TemplateError(_reason(error)) from None
        if "error" in ready:
            await self._process.close()
            raise TemplateError(f"the chat template cannot be used: {ready['error']}")
        writes_tool_calls = "tool_calls" in self.source
        return TemplateFacts(self.source, ready["takes_tools"], writes_tool_calls, frozenset(ready["texts"]))

    async def close(self) -> None:
        """End the process."""
        await self._process.close()

    async def render(self, request: bytes, tenant: str = "") -> str:
        """Return the prompt for what `render_request` has made.

        Raises ServingError: INVALID_FIELD if the template refuses or takes too much, QUEUE_FULL.
        """
        outcome, answer = await self._process.ask(tenant, request)
        if outcome is not Outcome.DONE:
            raise invalid_field(MESSAGES_FIELD, TOO_LONG if outcome is Outcome.TOO_LONG else TOO_LARGE)
        if not answer.startswith(PROMPT):
            raise invalid_field(*json.loads(answer[1:]))
        return str(memoryview(answer)[1:], "utf-8") if len(answer) < _LONG else await asyncio.to_thread(_text, answer)


def render_request(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] = (),
    options: Mapping[str, Any] | None = None,
    continue_final_message: bool = False,
) -> bytes:
    """Return what `ChatTemplate.render` sends to the process. In a thread, if it is long.

    Raises ServingError: INVALID_FIELD.
    """
    # Texts are not written as JSON: that would take longer than rendering them.
    contents = [message["content"].encode("utf-8", "surrogatepass") for message in messages]
    arguments = {
        "messages": [{**message, "content": len(content)} for message, content in zip(messages, contents, strict=True)],
        "tools": tools,
        "options": options or {},
        "continue_final_message": continue_final_message,
    }
    try:
        head = long_json.to_json_in_pieces(arguments).encode()
    except RecursionError:
        raise invalid_field(MESSAGES_FIELD, TOO_LARGE) from None
    return b"".join((HEAD.pack(len(head)), head, *contents))


def _text(answer: bytes) -> str:
    return answer[1:].decode()


def _reason(error: ProcessError) -> str:
    if error.returncode == -signal.SIGPROF:
        return f"the chat template takes more than {LIMITS.cpu_s:g} s of processor time to compile; use another one"
    return f"the chat template cannot be compiled: its process failed, {error}"


def _busy() -> ServingError:
    message = "this gateway is busy with the chat templates of other requests; try again"
    return ServingError(Reason.QUEUE_FULL, message, retry_after_ms=500)
