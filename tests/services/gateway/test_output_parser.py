"""What comes out of the ways in which models write reasoning and tool calls."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from octavo.services.gateway.output.channels import new_parser
from octavo.services.gateway.output.formats import (
    REASONING_FORMATS,
    TOOL_CALL_FORMATS,
    detect_reasoning_format,
    detect_tool_call_format,
)
from octavo.services.gateway.output.parser import OutputParser, ParserSettings

COMMENTARY, ANALYSIS = "<|channel|>commentary", "<|channel|>analysis<|message|>"
START = "<|start|>assistant"
FINAL = f"{START}<|channel|>final<|message|>"
HERMES = '<tool_call>\n{"name": "f", "arguments": {"x": "}"}}\n</tool_call>'


@dataclass
class Parsed:
    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str, str]] = field(default_factory=list)
    num_correct: int = 0

    def take(self, parser: OutputParser) -> None:
        piece = parser.take()
        self.text += piece.text
        self.reasoning += piece.reasoning
        for call in piece.tool_calls:
            if call.id:
                assert (call.index, call.name != "") == (len(self.calls), True)
                self.calls.append((call.id, call.name, call.arguments_json))
            else:
                call_id, name, arguments = self.calls[call.index]
                self.calls[call.index] = (call_id, name, arguments + call.arguments_json)
        self.num_correct = parser.num_calls


def settings(format_name: str | None, reasoning: str | None = None, **fields: Any) -> ParserSettings:
    defaults: dict[str, Any] = {
        "tool_calls": TOOL_CALL_FORMATS.get(format_name or ""),
        "reasoning": REASONING_FORMATS.get(reasoning or ""),
        "tool_names": frozenset({"f", "g"}),
        "single_tool_call": False,
        "whole_tool_calls": False,
        "starts_in_reasoning": False,
    }
    return ParserSettings(**(defaults | fields))


def parse(text: str, given: ParserSettings, sizes: list[int] | None = None) -> tuple[Parsed, dict[int, str]]:
    """Return all that comes out, and what was out after some characters; the text comes in pieces of these sizes."""
    parser, parsed, after, at = new_parser(given, lambda index: f"id{index}"), Parsed(), {}, 0
    for size in [*(sizes or []), len(text)]:
        if at < len(text) and not parser.is_complete:
            parser.push(text[at : at + size])
            at = min(at + size, len(text))
            parsed.take(parser)
            after[at] = str(parsed)
    if not parser.is_complete:
        parser.finish()
    parsed.take(parser)
    return parsed, after


@pytest.mark.parametrize(
    ("format_name", "text", "content", "calls"),
    [
        ("hermes", HERMES, "", [("f", {"x": "}"})]),
        ("hermes", f"Sure.\n{HERMES}\n{HERMES}\n", "Sure.", [("f", {"x": "}"})] * 2),
        ("hermes", '<tool_call>{"arguments": {"y": [1, {}]}, "name": "n"}</tool_call>', "", [("n", {"y": [1, {}]})]),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", {})]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}', "", [("f", {})]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("f", {"x": 1})]),
        ("hermes", f"{HERMES}Done", "Done", [("f", {"x": "}"})]),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"a": 1}}]', "",
         [("f", {}), ("g", {"a": 1})]),
        ("mistral", 'Hm[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]x1[ARGS]{}', "Hm",
         [("f", {"a": 1}), ("g", {})]),
        ("llama3", '{"name": "f", "parameters": {"a": "b"}}', "", [("f", {"a": "b"})]),
        ("llama3", '{"type": "function", "name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', "",
         [("f", {}), ("g", {})]),
        ("llama3", '<|python_tag|>{"name": "f", "parameters": {}}', "", [("f", {})]),
        ("harmony", f"{COMMENTARY} to=functions.f <|constrain|>json<|message|>{{}}<|call|>", "", [("f", {})]),
        ("harmony", f' to=functions.f{COMMENTARY} json<|message|>{{"x": "<|e"}} ', "", [("f", {"x": "<|e"})]),
        ("harmony", f"{COMMENTARY}<|message|>I look.<|end|>{START}{COMMENTARY} to=functions.f.g-h<|message|>{{}}"
         f"<|end|>{START}{COMMENTARY} to=functions.g<|message|>{{}}<|end|>{FINAL}So.\n",
         "I look.\n\nSo.\n", [("f.g-h", {}), ("g", {})]),
        ("harmony", "<|channel|>analysis to=f code<|message|>{}<|call|>", "", [("f", {})]),
        ("json", '{"name": "f", "arguments": {}}', "", [("f", {})]),
        ("json", '\n[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]', "", [("f", {}), ("g", {})]),
        ("json", 'I call it:\n```json\n{"name": "f", "arguments": {"a": 1}}\n```\n', "I call it:", [("f", {"a": 1})]),
        ("json", '{"type": "function", "function": {"name": "f", "arguments": {}}}', "", [("f", {})]),
    ],
)  # fmt: skip
def test_calls_are_taken_out_of_the_text(
    format_name: str, text: str, content: str, calls: list[tuple[str, Any]]
) -> None:
    whole, _ = parse(text, settings(format_name, whole_tool_calls=True))
    streamed, _ = parse(text, settings(format_name), [1] * len(text))

    assert whole == streamed
    assert whole.text == content
    assert [(name, json.loads(arguments)) for _, name, arguments in whole.calls] == calls
    assert [call_id for call_id, _, _ in whole.calls] == [f"id{index}" for index in range(len(calls))]
    assert whole.num_correct == len(calls)


@pytest.mark.parametrize(
    ("format_name", "text"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": oops}}</tool_call> after'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1'),
        ("hermes", "<tool_call>not JSON</tool_call>"),
        ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        ("hermes", "a < b, <tool_cal"),
        ("hermes", '{"name": "f", "arguments": {}}'),
        ("mistral", "[TOOL_CALLS] is a word\n"),
        ("mistral", '[TOOL_CALLS][{"name": "f"} {"name": '),
        ("llama3", '{"title": "f", "body": {"name": "f"}}'),
        ("llama3", '<|python_tag|>print("x")'),
        ("llama3", '{"name": "unknown", "parameters": {}}'),
        ("harmony", '{"answer": "<|end|>"} '),
        ("harmony", "<|channel"),
        ("harmony", "to=5 <"),
        ("json", '```json\n{"name": "Ann", "arguments": 3}\n```\n'),
        ("json", '{"name": "unknown", "arguments": {}}'),
        ("json", " [1, 2]"),
        ("json", "```python\n{}\n```"),
    ],
)
def test_what_is_no_call_stays_text_to_the_letter(format_name: str, text: str) -> None:
    parsed, _ = parse(text, settings(format_name, whole_tool_calls=True))

    if format_name == "mistral" and parsed.calls:  # the first of two is one
        assert (parsed.text, parsed.calls) == ('{"name": ', [("id0", "f", "{}")])
    else:
        assert (parsed.text, parsed.calls) == (text, [])


def test_arguments_are_sent_as_they_come_and_what_breaks_them_is_text() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"x": 1, oops}</tool_call> tail'
    parser = new_parser(settings("hermes"), str)
    fragments = []
    for character in text[: text.index("oops")]:
        parser.push(character)
        fragments += [call.arguments_json for call in parser.take().tool_calls]
    parsed, _ = parse(text, settings("hermes"))

    assert fragments == list('{"x": 1, ')
    assert (parsed.text, parsed.calls, parsed.num_correct) == ("oops}</tool_call> tail", [("id0", "f", '{"x": 1, ')], 0)


def test_after_one_call_nothing_follows_where_one_is_all_that_may_be() -> None:
    parsed, after = parse(f"{HERMES}{HERMES}", settings("hermes", single_tool_call=True), [1] * 200)

    assert len(parsed.calls) == 1
    assert max(after) == HERMES.index("\n</tool_call>")


@pytest.mark.parametrize(
    ("text", "fields", "reasoning", "content"),
    [
        ("<think>\nhm\n</think>\n\nYes.\n", {}, "hm", "Yes.\n"),
        ("hm</think>Yes.", {"starts_in_reasoning": True}, "hm", "Yes."),
        ("<think>hm", {}, "hm", ""),
        ("<think>\n\n</think>\n\nYes.", {}, "", "Yes."),
        ("Yes, <think> is a tag", {}, "", "Yes, <think> is a tag"),
        ("<thin", {}, "", "<thin"),
        ("  \n", {}, "", "  \n"),
        ("a</th b</think>c", {"starts_in_reasoning": True}, "a</th b", "c"),
    ],
)
def test_reasoning_is_what_is_between_its_marks_at_the_start(
    text: str, fields: dict[str, Any], reasoning: str, content: str
) -> None:
    parsed, _ = parse(text, settings(None, "think", **fields))

    assert (parsed.reasoning, parsed.text) == (reasoning, content)


@pytest.mark.parametrize(
    ("text", "fields", "reasoning", "content"),
    [
        (f"{ANALYSIS}Hm.<|end|>{FINAL}Yes.", {}, "Hm.", "Yes."),
        (f"Hm.<|end|>{FINAL}Yes.<|return|>", {"starts_in_reasoning": True}, "Hm.", "Yes."),
        (f"{ANALYSIS}a <|x<|end|>{START}{ANALYSIS}b<|end|>{FINAL[:-3]}", {}, "a <|x\n\nb", ""),
        (f"{ANALYSIS}to=functions.f {HERMES}<|end|>{FINAL}{HERMES}", {}, f"to=functions.f {HERMES}", HERMES),
        ("<|channel|>commentary to=functions.f<|message|>no JSON<|end|>", {}, "", "no JSON"),
        (f"<|channel|>{'x' * 600}", {}, "", f"<|channel|>{'x' * 600}"),
        (f"{COMMENTARY} to=python code<|message|>print()<|end|>{FINAL}Yes.", {}, "print()", "Yes."),
        (f"{COMMENTARY} to=assistant{ANALYSIS}a<|end|>{START} to=user{COMMENTARY}<|message|>b", {}, "a", "b"),
        (f"{COMMENTARY} to=functions.f<|message|>{{}}", {"tool_calls": None}, "{}", ""),
        (f"{ANALYSIS}a{FINAL[:-3]}", {}, "a", ""),
        (" to=functions.f", {}, "", ""),
    ],
)  # fmt: skip
def test_messages_go_where_their_channel_says(text: str, fields: dict[str, Any], reasoning: str, content: str) -> None:
    parsed, _ = parse(text, settings("harmony", "harmony", **fields))

    assert (parsed.reasoning, parsed.text, parsed.calls) == (reasoning, content, [])


def test_a_call_can_follow_reasoning_and_is_none_inside_it() -> None:
    parsed, _ = parse(f"<think>{HERMES}?</think>\n{HERMES}", settings("hermes", "think"))

    assert parsed.reasoning == f"{HERMES}?"
    assert [name for _, name, _ in parsed.calls] == ["f"]


ALPHABET = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "```json", "```", "<think>", "</think>",
    '{"name": "f", "arguments": {"x": 1}}', '{"name": "g", "parameters": {"y": "\\""}}', '"', "{", "}", "[", "]", ",",
    ";", " ", "\n", "f", "<", "<|message|>", "<|end|>", f"{COMMENTARY} to=functions.f", "<|channel|>analysis", FINAL,
    '{"name": "f", "arguments": ', '{"x": {"y": ', "1", "\\", "é",
]  # fmt: skip


@given(
    st.lists(st.sampled_from(ALPHABET), max_size=12).map("".join),
    st.sampled_from([*TOOL_CALL_FORMATS, None]),
    st.sampled_from(["think", "harmony", None]),
    st.lists(st.integers(1, 9), max_size=40),
    st.booleans(),
    st.booleans(),
)
@example('<tool_call>{"name": "f", "arguments": {"x": 1}x', "hermes", None, [], False, False)
def test_what_is_out_depends_on_the_characters_and_not_on_their_arrival(
    text: str, format_name: str | None, reasoning: str | None, sizes: list[int], whole: bool, single: bool
) -> None:
    given = settings(format_name, reasoning, whole_tool_calls=whole, single_tool_call=single)
    one_by_one, single_after = parse(text, given, [1] * len(text))
    in_pieces, after = parse(text, given, sizes)

    assert in_pieces == one_by_one
    last = max(single_after, default=0)
    assert {at: single_after[min(at, last)] for at in after} == after


@given(st.lists(st.sampled_from(ALPHABET), max_size=12).map("".join), st.sampled_from([*TOOL_CALL_FORMATS]))
def test_no_letter_is_lost(text: str, format_name: str) -> None:
    parsed, _ = parse(text, settings(format_name, "think", whole_tool_calls=True))

    if not parsed.calls and not parsed.reasoning and "think>" not in text and "|>" not in text:
        assert parsed.text == text
    for _, name, arguments in parsed.calls:
        assert name
        assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize(
    ("template", "tool_calls", "reasoning"),
    [
        ("{{ '<tool_call>' }}{% if enable_thinking %}<think>{% endif %}", "hermes", "think"),
        ("[AVAILABLE_TOOLS][TOOL_CALLS][THINK]", "mistral", "mistral"),
        ('{"name": function name, "parameters": dictionary of argument name and its value}', "llama3", "none"),
        ("<|channel|>analysis<|message|><|end|>{{ '<|channel|>commentary to=functions.' }}", "harmony", "harmony"),
        ("<|system|>{{ messages }}<|end|><|assistant|>", "json", "none"),
        ("{{ messages }}", "json", "none"),
    ],
)  # fmt: skip
def test_the_chat_template_tells_the_formats(template: str, tool_calls: str, reasoning: str) -> None:
    assert (detect_tool_call_format(template), detect_reasoning_format(template)) == (tool_calls, reasoning)
