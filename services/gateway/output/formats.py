"""How models write reasoning and calls of tools: one row for each way, and what tells that a model uses it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from octavo.services.gateway.offload import long_json

NONE = "none"
"""The format of an output that is left as it is."""


@dataclass(frozen=True, slots=True)
class ToolCallFormat:
    """How a call is written. The call itself is always JSON: an object with a name and arguments."""

    name: str
    begin: str
    """Comes before a call, or before several."""
    end: str = ""
    """Comes after each call; may be missing."""
    separator: str = ""
    """Comes between two calls that share one `begin`."""
    is_list: bool = False
    """After `begin` a JSON list of calls may stand."""
    is_named: bool = False
    """A call may also be written as its name, [ARGS], and its arguments."""
    is_bare: bool = False
    """A call needs no `begin` where it is the first thing in the output. Its name must be a tool's then."""
    only_known: bool = False
    """`begin` is common text, so that what follows is a call only if its name is a tool's."""
    short_ids: bool = False
    """The chat template takes ids of nine letters and digits only."""
    tokens: tuple[str, ...] = ()
    """What may be special tokens, which are no text elsewhere."""
    seen_in: tuple[str, ...] = ()
    """A chat template with one of these uses the format."""


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """What stands around the reasoning section, which is the first thing in the output."""

    name: str
    begin: str
    end: str
    tokens: tuple[str, ...] = ()
    """What may be special tokens, which are no text elsewhere; none: `begin` and `end`."""
    answer_begin: str = ""
    """Comes after the prompt where the output must be an answer from its first token on."""
    seen_in: tuple[str, ...] = ()
    """A chat template with one of these uses the format; none: `begin` or `end`."""


_HARMONY = "harmony"
_HARMONY_TOKENS = (
    "<|start|>",
    "<|channel|>",
    "<|constrain|>",
    "<|message|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
)


TOOL_CALL_FORMATS: Mapping[str, ToolCallFormat] = {
    each.name: each
    for each in (
        # Qwen 2.5 and 3, Hermes, SmolLM3: <tool_call>{"name": "f", "arguments": {}}</tool_call>
        ToolCallFormat(
            "hermes",
            begin="<tool_call>",
            end="</tool_call>",
            tokens=("<tool_call>", "</tool_call>"),
            seen_in=("<tool_call>",),
        ),
        # Mistral: [TOOL_CALLS][{"name": "f", "arguments": {}}], newer ones [TOOL_CALLS]f[ARGS]{}
        ToolCallFormat(
            "mistral",
            begin="[TOOL_CALLS]",
            is_list=True,
            is_named=True,
            short_ids=True,
            tokens=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
            seen_in=("[TOOL_CALLS]",),
        ),
        # Llama 3: {"name": "f", "parameters": {}}; {...}, sometimes after <|python_tag|>
        ToolCallFormat(
            "llama3",
            begin="<|python_tag|>",
            separator=";",
            is_bare=True,
            tokens=("<|python_tag|>",),
            seen_in=("<|python_tag|>", '"parameters": dictionary of argument name'),
        ),
        # gpt-oss: <|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>
        ToolCallFormat(
            _HARMONY,
            begin="<|channel|>commentary to=functions.",
            end="<|call|>",
            tokens=_HARMONY_TOKENS,
            seen_in=("<|channel|>commentary",),
        ),
        # All others: JSON alone, or in a block of code.
        ToolCallFormat("json", begin="```json", end="```", is_list=True, is_bare=True, only_known=True),
    )
}
REASONING_FORMATS: Mapping[str, ReasoningFormat] = {
    each.name: each
    for each in (
        ReasoningFormat("think", "<think>", "</think>"),  # Qwen 3, DeepSeek R1, SmolLM3
        ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
        ReasoningFormat("seed", "<seed:think>", "</seed:think>"),
        ReasoningFormat("cohere", "<|START_THINKING|>", "<|END_THINKING|>"),
        # gpt-oss: messages in channels, of which "analysis" is reasoning
        ReasoningFormat(
            _HARMONY,
            "<|channel|>analysis<|message|>",
            "<|end|>",
            tokens=_HARMONY_TOKENS,
            answer_begin="<|channel|>final<|message|>",
            seen_in=("<|channel|>analysis",),
        ),
    )
}


def has_channels(tool_calls: ToolCallFormat | None, reasoning: ReasoningFormat | None) -> bool:
    """Return whether the output is made of messages, each with a header that names its channel."""
    return any(each is not None and each.name == _HARMONY for each in (tool_calls, reasoning))


def detect_tool_call_format(template: str) -> str:
    """Return the name of the format that a chat template tells of; "json" if it tells of none."""
    for each in TOOL_CALL_FORMATS.values():
        if any(mark in template for mark in each.seen_in):
            return each.name
    return "json"


def detect_reasoning_format(template: str) -> str:
    """Return the name of the format that a chat template tells of, or "none"."""
    for each in REASONING_FORMATS.values():
        if any(mark in template for mark in each.seen_in or (each.begin, each.end)):
            return each.name
    return NONE


def write_calls(calls: Iterable[Mapping[str, Any]]) -> str:
    """Return the text of calls in the format "json", for a chat template that does not write them itself."""
    return "\n".join(long_json.dumps(dict(call), ensure_ascii=False) for call in calls)


def describe_tools(tools: Iterable[Any]) -> str:
    """Return what a model whose chat template takes no tools is told about them: the format "json" in words."""
    lines = "\n".join(long_json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    return (
        "You can call these tools, each described by a JSON schema:\n"
        f"{lines}\n"
        'To call one, answer with nothing but JSON: {"name": "<tool>", "arguments": {<arguments>}}. '
        "Otherwise answer as usual."
    )
