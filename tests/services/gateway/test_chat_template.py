"""Chat templates: what they can do, and what they cannot."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import jinja2.filters
import psutil
import pytest
import pytest_asyncio

from octavo.inference.v1 import generation_pb2
from octavo.services.common.errors import ServingError
from octavo.services.gateway.requests.chat import read_chat
from octavo.services.gateway.tokenization.chat_template import ChatTemplate, TemplateFacts, render_request
from octavo.services.gateway.tokenization.template_process import RenderError, Template, TemplateError

USER = [{"role": "user", "content": "hi"}]


def render(source: str, messages: Any = USER, **options: Any) -> str:
    return Template(source, {"bos_token": "<s>"}).render(messages, **options)


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
    for name in ("messages", "bos_token", "_private", "add_generation_prompt", "not a name"):
        with pytest.raises(RenderError) as failure:
            render("x", options={name: 1})
        assert failure.value.field == "generation.chat.template_options_json"


CONTINUED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>{% endfor %}{{ '<x>' if add_generation_prompt }}"
)
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def continued(source: str, text: str) -> str:
    return render(source, [*USER, {"role": "assistant", "content": text}], continue_final_message=True)


def test_a_final_message_can_be_continued() -> None:
    assert render(CONTINUED, [*USER, {"role": "assistant", "content": "I am "}]) == (
        "<user>hi<end><assistant>I am<end><x>"
    )
    assert continued(CONTINUED, "I am ") == "<user>hi<end><assistant>I am"


@pytest.mark.parametrize("text", ["<", "end", "i", "|", "im_end", "<|im_end|>", "assistant", "hi", " a ", "a\n\n"])
def test_a_final_message_is_continued_at_its_own_end_whatever_else_is_like_it(text: str) -> None:
    assert continued(CHATML, text) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n" + text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (CHATML, ""),
        (CHATML, " \n"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changed"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "twice"),
        ("{{ messages[0].content }}", "left out"),
    ],
)
def test_a_final_message_that_the_template_does_not_write_as_it_is_cannot_be_continued(source: str, text: str) -> None:
    with pytest.raises(RenderError) as failure:
        continued(source, text)
    assert failure.value.field == "generation.chat.continue_final_message"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('only one system message') }}",
        "{{ messages[9].content.x }}",
        "{{ 1 / 0 }}",
        "{{ range(10 ** 9) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'file' %}",
        "{{ raise_exception('x' * 1000000) }}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    ],
)
def test_a_template_that_refuses_or_fails_is_the_client_s_error(source: str) -> None:
    with pytest.raises(RenderError) as failure:
        render(source)

    assert failure.value.field == "generation.chat.messages"
    assert len(failure.value.description) <= 500


def test_a_template_s_own_words_reach_the_client() -> None:
    with pytest.raises(RenderError, match="only one system message"):
        render("{{ raise_exception('only one system message') }}")


def test_a_template_that_does_not_compile_cannot_be_served() -> None:
    for source in ("{% for %}", "{{ x", "{{ x | nofilter }}", "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}"):
        with pytest.raises(TemplateError):
            Template(source, {})
    with pytest.raises(TemplateError):
        ChatTemplate("{# " + "x" * 300_000 + " #}", {})


def test_compiling_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def indent(*arguments: object) -> str:
        calls.append(arguments)
        return ""

    monkeypatch.setitem(jinja2.filters.FILTERS, "indent", indent)

    Template("{{ 'x' | indent(1500000000, true) }}{% set a = 'x' | indent(2) %}{% if 'x' | indent(3) %}{% endif %}", {})

    assert calls == []


# -- in the process --------------------------------------------------------------------------------

DOUBLING = (
    "{%% set ns = namespace(s='x') %%}{%% for i in range(60) %%}{%% set ns.s = %s %%}{%% endfor %%}{{ ns.s | length }}"
)
HOSTILE = {
    "calls": "{% macro f(n) %}{% if n > 0 %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursive loops": (
        "{% set ns = namespace(d=0) %}{% for x in [1,2] recursive %}{% if ns.d < 40 %}{% set ns.d = ns.d + 1 %}"
        "{{ loop([1,2]) }}{% set ns.d = ns.d - 1 %}{% endif %}{% endfor %}"
    ),
    "large numbers": DOUBLING.replace("'x'", "3") % "ns.s * ns.s",
    "power": "{{ 10 ** 999999999 }}",
    "sums": DOUBLING % "ns.s + ns.s",
    "concatenations": DOUBLING % "ns.s ~ ns.s",
    "product": "{{ 'x' * 9999999999 }}",
    "padding": "{{ 'x'.ljust(9999999999) }}",
    "format": "{{ '{:9999999999}'.format(1) | length }}",
    "old format": "{{ ('%9999999999d' % 1) | length }}",
    "tabs": "{{ '\t'.expandtabs(tabsize=2000000000) | length }}",
    "indent": "{{ ('x' | indent(2000000000, true)) | length }}",
    "join": "{{ (range(60000) | map('string') | join('z' * 40000)) | length }}",
    "batch": "{{ ([1] | batch(1000000000, 'x') | list)[0] | length }}",
    "tojson": "{{ [1] | tojson(indent=2000000000) | length }}",
    "lipsum": "{{ lipsum(n=100000, min=1000, max=2000) | length }}",
}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def hostile() -> AsyncIterator[ChatTemplate]:
    """One template with all of them in it: the first message says which is rendered."""
    branches = "".join(
        f"{{% {'el' if index else ''}if messages[0].content == '{name}' %}}{source}"
        for index, (name, source) in enumerate(HOSTILE.items())
    )
    template = ChatTemplate(branches + "{% else %}{{ messages[0].content }}{% endif %}", {})
    yield template
    await template.close()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", HOSTILE)
async def test_what_takes_too_much_is_refused_and_the_next_one_is_rendered(hostile: ChatTemplate, name: str) -> None:
    before = psutil.Process().memory_info().rss

    with pytest.raises(ServingError) as failure:
        await hostile.render(render_request([{"role": "user", "content": name}]))

    # Where the processor is somebody else's, a rendering may not even get the time that it may take.
    assert failure.value.reason in ("INVALID_FIELD", "QUEUE_FULL")
    assert psutil.Process().memory_info().rss - before < 64 << 20
    assert await hostile.render(render_request(USER)) == "hi"


@pytest.mark.asyncio(loop_scope="module")
async def test_another_tenant_s_prompt_is_rendered_beside_a_hostile_one(hostile: ChatTemplate) -> None:
    slow = asyncio.create_task(hostile.render(render_request([{"role": "user", "content": "loops"}]), "a"))
    await asyncio.sleep(0)

    assert await hostile.render(render_request(USER), "b") == "hi"

    assert not slow.done()
    with pytest.raises(ServingError):
        await slow


@pytest.mark.asyncio(loop_scope="module")
async def test_a_rendering_that_nobody_waits_for_keeps_its_turn(hostile: ChatTemplate) -> None:
    request = render_request([{"role": "user", "content": "loops"}])
    tasks = [asyncio.create_task(hostile.render(request, "a")) for _ in range(20)]
    await asyncio.sleep(0)
    await hostile.render(render_request(USER), "b")
    (process,) = [each for each in psutil.Process().children() if "template_process" in " ".join(each.cmdline())]

    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

    assert await hostile.render(render_request(USER), "b") == "hi"
    assert len(process.children()) <= 3  # two at once, and one that was idle


@pytest.mark.asyncio(loop_scope="module")
async def test_messages_reach_the_template_as_they_are() -> None:
    template = ChatTemplate("{{ messages | tojson }}{{ tools | tojson }}{{ x }}", {})
    messages = [
        {"role": "user", "content": "ü€\U0001f600" * 100_000},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "function": {"arguments": {"a": "é" * 200_000}}}],
        },
    ]
    tools = [{"name": "f"}]

    prompt = await template.render(render_request(messages, tools, {"x": [1]}))

    assert prompt == json.dumps(messages, ensure_ascii=False) + json.dumps(tools) + "[1]"
    with pytest.raises(ServingError, match="not Unicode"):
        await template.render(render_request([{"role": "user", "content": "\ud800"}]))
    await template.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_one_process_renders_many() -> None:
    others = set(psutil.Process().children())  # another test's may still be at work on what nobody waits for
    template = ChatTemplate("{{ messages[0].content }}", {})
    assert await template.render(render_request(USER)) == "hi"
    (process,) = set(psutil.Process().children()) - others
    before = {each.pid for each in process.children()}

    for index in range(50):
        assert await template.render(render_request([{"role": "user", "content": f"n{index}"}])) == f"n{index}"

    assert {each.pid for each in process.children()} == before
    await template.close()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for %}", "does not compile"),
        ("{% autoescape 10 ** 999999999 %}{% endautoescape %}", "processor time to compile"),
    ],
)
async def test_a_template_that_takes_too_much_to_compile_cannot_be_served(source: str, says: str) -> None:
    template = ChatTemplate(source, {})

    with pytest.raises(TemplateError, match=says):
        await template.facts()

    await template.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_the_process_is_started_again_when_it_was_killed(hostile: ChatTemplate) -> None:
    assert await hostile.render(render_request(USER)) == "hi"
    (process,) = [each for each in psutil.Process().children() if "template_process" in " ".join(each.cmdline())]
    forks = process.children()
    process.kill()
    psutil.wait_procs([process])

    with contextlib.suppress(ServingError):  # it may not have been noticed yet: then the client is told to try again
        await hostile.render(render_request(USER))
    assert await hostile.render(render_request(USER)) == "hi"
    assert psutil.wait_procs(forks, timeout=10)[1] == []


# -- what templates get ----------------------------------------------------------------------------


def chat_of(*messages: Any, **fields: Any) -> generation_pb2.Chat:
    return generation_pb2.Chat(messages=messages, **fields)


def facts(source: str, texts: tuple[str, ...] = ()) -> TemplateFacts:
    return TemplateFacts(source, "tools" in source, "tool_calls" in source, frozenset(texts))


def test_roles_are_the_usual_ones_and_those_the_template_names() -> None:
    source = "{% if messages[0].role == 'critic' %}x{% endif %}"
    template = facts(source, tuple(Template(source, {}).texts))

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

    read = read_chat(chat, facts("{{ tools }}{{ messages[0].tool_calls }}"), "chat")

    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert read.messages == [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "r", "tool_call_id": "1"},
        {"role": "tool", "content": "s", "tool_call_id": "2"},
    ]
    assert (read.tools, read.options) == ([{"type": "function"}], {"k": 1})


def test_of_calls_in_one_message_each_is_written_with_its_result_where_templates_take_one() -> None:
    parts = [{"tool_call": {"id": each, "name": each, "arguments_json": "{}"}} for each in "ab"]
    results = [{"role": "tool", "parts": [{"tool_result": {"id": each, "text": each}}]} for each in "bac"]
    messages = [{"role": "assistant", "parts": [{"text": "I look."}, *parts]}, *results, {"role": "user"}]
    source = "{% for m in messages %}{{ m.content }}{% if 'tool_calls' in m %}{{ m.tool_calls[0].function.name }}"

    def read(source: str) -> list[tuple[str, list[str], str]]:
        return [
            (each["content"], [call["id"] for call in each.get("tool_calls", ())], each.get("tool_call_id", ""))
            for each in read_chat(chat_of(*messages), facts(source), "chat").messages
        ]

    assert read(source) == [
        ("I look.", ["a"], ""), ("a", [], "a"), ("", ["b"], ""), ("b", [], "b"), ("c", [], "c"), ("", [], "")
    ]  # fmt: skip
    for loop in ("{% for call in m.tool_calls %}", "{% for call in m['tool_calls'] %}", "{% for call in tool_calls %}"):
        assert read(source + loop)[0] == ("I look.", ["a", "b"], "")


def test_a_tool_needs_no_description_though_the_template_does() -> None:
    source = "{% for tool in tools %}{% set tool = tool.function %}{{ '// ' + tool.description }}{% endfor %}"
    tools = ['{"type": "function", "function": {"name": "f"}}', '{"function": {"description": null}}']

    read = read_chat(chat_of(tools_json=tools), facts(source), "chat")

    assert Template(source, {}).render(read.messages, read.tools) == "// // "


def test_all_broken_json_is_reported_with_its_place() -> None:
    chat = chat_of(
        {"role": "assistant", "parts": [{"tool_call": {"name": "f", "arguments_json": "[1]"}}]},
        tools_json=["{}", "{", "[" * 100_000],
        template_options_json="1",
    )

    with pytest.raises(ServingError) as failure:
        read_chat(chat, facts(""), "chat")

    assert [violation.field for violation in failure.value.violations] == [
        "chat.messages[0].parts[0].tool_call.arguments_json",
        "chat.tools_json[1]",
        "chat.tools_json[2]",
        "chat.template_options_json",
    ]
