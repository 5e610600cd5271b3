"""Chat templates: what they can do, and what they cannot."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.inference.v1 import generation_pb2
from octavo.services.common.errors import ServingError
from octavo.services.gateway import chat_template
from octavo.services.gateway.chat import read_chat
from octavo.services.gateway.chat_template import ChatTemplate, TemplateError

USER = [{"role": "user", "content": "hi"}]


def render(source: str, messages: Any = USER, **options: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **options)


def test_blocks_are_trimmed_and_special_tokens_and_loop_controls_are_there() -> None:
    source = """{{ bos_token }}
    {% for m in messages %}
[{{ m.role }}]{{ m['content'] }}
    {% if loop.last %}{% break %}{% endif %}
    {% endfor %}
{%- generation %}x{% endgeneration %}"""

    assert render(source) == "<s>\n[user]hi\nx"


def test_tojson_escapes_nothing_and_keeps_order() -> None:
    assert render("{{ {'b': '<é>', 'a': 1} | tojson }}") == '{"b": "<é>", "a": 1}'
    assert render("{{ tools[0] | tojson(indent=2) }}", tools=[{"a": 1}]) == '{\n  "a": 1\n}'


def test_loop_length_and_last_work_in_metered_loops() -> None:
    source = "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% endfor %}"

    assert render(source, USER * 3) == "1/3,2/3,3/3"
    assert render("{% macro f(xs) %}{% for x in xs %}{{ x }}{% endfor %}{% endmacro %}{{ f([1, 2]) }}") == "12"


def test_options_are_variables_and_cannot_replace_the_template_s_own() -> None:
    assert render("{{ enable_thinking }}", options={"enable_thinking": False}) == "False"
    for name in ("messages", "bos_token", "_budget", "add_generation_prompt", "not a name"):
        with pytest.raises(ServingError) as failure:
            render("x", options={name: 1})
        assert failure.value.violations[0].field == "generation.chat.template_options_json"


def test_a_final_message_can_be_continued() -> None:
    source = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>{% endfor %}"
        "{{ '<x>' if add_generation_prompt }}"
    )
    messages = [*USER, {"role": "assistant", "content": "I am "}]

    assert render(source, messages) == "<user>hi<end><assistant>I am<end><x>"
    assert render(source, messages, continue_final_message=True) == "<user>hi<end><assistant>I am"
    with pytest.raises(ServingError):
        render(source, [*USER, {"role": "assistant", "content": ""}], continue_final_message=True)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('only one system message') }}",
        "{{ messages[9].content.x }}",
        "{{ 1 / 0 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 1000 }}{% endfor %}{% endfor %}",
        "{{ 'x' * 999999999 }}",
        "{{ 'x'.ljust(999999999) }}",
        "{{ 10 ** 999999999 }}",
        "{{ range(10 ** 9) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'file' %}",
    ],
)
def test_a_template_that_refuses_fails_or_goes_too_far_is_the_client_s_error(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "MAX_LOOP_STEPS", 100_000)
    monkeypatch.setattr(chat_template, "MAX_OUTPUT_CHARS", 100_000)

    with pytest.raises(ServingError) as failure:
        render(source)

    assert failure.value.reason == "INVALID_FIELD"
    assert failure.value.violations[0].field == "generation.chat.messages"


def test_a_template_s_own_words_reach_the_client() -> None:
    with pytest.raises(ServingError, match="only one system message"):
        render("{{ raise_exception('only one system message') }}")


def test_a_template_that_does_not_compile_or_is_too_long_cannot_be_served() -> None:
    for source in ("{% for %}", "{{ x", "{# " + "x" * 300_000 + " #}"):
        with pytest.raises(TemplateError):
            ChatTemplate(source, {})


def chat_of(*messages: Any, **fields: Any) -> generation_pb2.Chat:
    return generation_pb2.Chat(messages=messages, **fields)


def test_roles_are_the_usual_ones_and_those_the_template_names() -> None:
    template = ChatTemplate("{% if messages[0].role == 'critic' %}x{% endif %}", {})

    assert template.knows_role("critic")
    assert template.knows_role("developer")
    assert not template.knows_role("pirate")


def test_tool_calls_and_results_become_the_dicts_that_templates_expect() -> None:
    chat = chat_of(
        {"role": "user", "parts": [{"text": "a"}, {"text": "b"}]},
        {
            "role": "assistant",
            "parts": [{"tool_call": {"id": "1", "name": "f", "arguments_json": '{"x": 1}'}}],
        },
        {
            "role": "tool",
            "parts": [{"tool_result": {"id": "1", "text": "r"}}, {"tool_result": {"id": "2", "text": "s"}}],
        },
        tools_json=['{"type": "function"}'],
        template_options_json='{"k": 1}',
    )

    read = read_chat(chat, ChatTemplate("{{ tools }}{{ messages[0].tool_calls }}", {}), "chat")

    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert read.messages == [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "r", "tool_call_id": "1"},
        {"role": "tool", "content": "s", "tool_call_id": "2"},
    ]
    assert (read.tools, read.options) == ([{"type": "function"}], {"k": 1})


def test_all_broken_json_is_reported_with_its_place() -> None:
    chat = chat_of(
        {"role": "assistant", "parts": [{"tool_call": {"name": "f", "arguments_json": "[1]"}}]},
        tools_json=["{}", "{", "[" * 100_000],
        template_options_json="1",
    )

    with pytest.raises(ServingError) as failure:
        read_chat(chat, ChatTemplate("", {}), "chat")

    assert [violation.field for violation in failure.value.violations] == [
        "chat.messages[0].parts[0].tool_call.arguments_json",
        "chat.tools_json[1]",
        "chat.tools_json[2]",
        "chat.template_options_json",
    ]
