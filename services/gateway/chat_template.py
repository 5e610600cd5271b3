"""Renders a model's own chat template (Jinja), as transformers does, within limits.

A template comes with a model and values come from a client, so neither may read anything, change
anything or run for long: the sandbox is Jinja's immutable one, every loop draws on a budget, and
time and output are bounded.
"""

from __future__ import annotations

import datetime
import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox
from jinja2.parser import Parser

from octavo.services.common.errors import ServingError, invalid_field
from octavo.services.gateway import long_json

MAX_TEMPLATE_BYTES = 262_144
MAX_OUTPUT_CHARS = 16_777_216
MAX_LOOP_STEPS = 2_000_000
MAX_RENDER_S = 5.0
_MAX_PRODUCT = 16_777_216
_MAX_WIDTH = 65_536
_BUDGET = "_budget"
_MESSAGES_FIELD = "generation.chat.messages"
_COMMON_ROLES = frozenset({"system", "user", "assistant", "tool", "developer"})
_RESERVED = ("messages", "tools", "add_generation_prompt", "continue_final_message")


class TemplateError(ValueError):
    """The template itself cannot be used."""


class _RefusedError(jinja2.TemplateError):
    """The template refused the conversation: it called raise_exception."""


class _LimitError(Exception):
    """A limit was passed while rendering."""


class _Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self._steps = MAX_LOOP_STEPS
        self._end = time.monotonic() + MAX_RENDER_S

    def loop(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield the items, each at a price."""
        for item in items:
            self._steps -= 1
            if self._steps < 0:
                raise _LimitError(f"loops took more than {MAX_LOOP_STEPS} steps")
            if self._steps % 256 == 0:
                self.check_time()
            yield item

    def check_time(self) -> None:
        if time.monotonic() > self._end:
            raise _LimitError(f"rendering took more than {MAX_RENDER_S:g} s")


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what the model wrote; for a prompt it means nothing."""

    tags = {"generation"}  # noqa: RUF012 - how Jinja declares it

    def parse(self, parser: Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with loops that draw on the budget and products of bounded size."""

    intercepted_binops = frozenset({"*", "**"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in list(template.find_all(jinja2.nodes.For)):
            meter = jinja2.nodes.Getattr(jinja2.nodes.Name(_BUDGET, "load"), "loop", "load")
            loop.iter = jinja2.nodes.Call(meter, [loop.iter], [], None, None).set_lineno(loop.lineno)
            loop.iter.set_environment(self)
        return template

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        for text, count in ((left, right), (right, left)):
            if isinstance(text, (str, list, tuple)) and isinstance(count, int) and len(text) * count > _MAX_PRODUCT:
                raise _LimitError("a repeated value is too long")
        if operator == "**" and not (abs(left) <= 1_000_000 and abs(right) <= 64):
            raise _LimitError("a power is too large")
        return super().call_binop(context, operator, left, right)

    def call(self, context: jinja2.runtime.Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(obj, "__self__", None), str) and any(
            isinstance(argument, int) and argument > _MAX_WIDTH for argument in args
        ):
            raise _LimitError("a text is padded too far")
        return super().call(context, obj, *args, **kwargs)


def _raise_exception(message: object) -> str:
    raise _RefusedError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which is wrong in a prompt.
    return long_json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled template. Immutable: threads may render at the same time."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile `source`; `special_tokens` ("bos_token": "<s>", ...) are its variables. Raises TemplateError."""
        if len(source.encode()) > MAX_TEMPLATE_BYTES:
            raise TemplateError(f"the chat template is longer than {MAX_TEMPLATE_BYTES} bytes")
        self.source = source
        self.sha256 = hashlib.sha256(source.encode()).hexdigest()
        self._special_tokens = dict(special_tokens)
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        del environment.filters["center"], environment.globals["lipsum"]  # they make long texts of small numbers
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TemplateError(f"the chat template does not compile: {error}") from None
        self.takes_tools = "tools" in jinja2.meta.find_undeclared_variables(tree)
        """The template tells the model of tools."""
        self.writes_tool_calls = "tool_calls" in source
        """It writes the calls that the assistant made."""
        texts = {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
        self._roles = _COMMON_ROLES | texts

    def written_role(self, role: str) -> str:
        """Return the role to write: OpenAI's newer word for the system is known to few templates."""
        return "system" if role == "developer" and role not in self.source else role

    def knows_role(self, role: str) -> bool:
        """Return whether a role is one of the usual ones or named in the template."""
        return role in self._roles

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """Return the prompt. Raises ServingError INVALID_FIELD if the template refuses or a limit is passed."""
        variables = dict(options or {})
        for name in variables:
            if name in _RESERVED or name in self._special_tokens or not name.isidentifier() or name.startswith("_"):
                raise invalid_field(
                    "generation.chat.template_options_json", f"{name!r} is not free for use; rename or remove it"
                )
        budget = _Budget()
        variables |= self._special_tokens
        variables |= {
            "messages": list(messages),
            "tools": list(tools) or None,
            "documents": variables.get("documents"),
            "add_generation_prompt": not continue_final_message,
            "continue_final_message": continue_final_message,
            _BUDGET: budget,
        }
        try:
            prompt = self._collect(variables, budget)
        except _RefusedError as error:
            raise invalid_field(_MESSAGES_FIELD, f"the model's chat template refuses them: {error}") from None
        except _LimitError as error:
            raise invalid_field(_MESSAGES_FIELD, f"the model's chat template ran into a limit: {error}") from None
        except (MemoryError, RecursionError):
            raise invalid_field(_MESSAGES_FIELD, "the model's chat template ran into a limit of memory") from None
        except Exception as error:  # template code can fail in any way that Python code can
            raise invalid_field(
                _MESSAGES_FIELD, f"the model's chat template fails with them: {type(error).__name__}: {error}"
            ) from None
        return _cut_after_final(prompt, messages) if continue_final_message else prompt

    def _collect(self, variables: dict[str, Any], budget: _Budget) -> str:
        pieces: list[str] = []
        size = 0
        for piece in self._template.generate(variables):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_OUTPUT_CHARS:
                raise _LimitError(f"the prompt is longer than {MAX_OUTPUT_CHARS} characters")
            budget.check_time()
        return "".join(pieces)


def _cut_after_final(prompt: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the prompt up to the end of the last message's content, so that the model goes on with it."""
    content = str(messages[-1]["content"])
    backwards = prompt[::-1]
    for text in (content, content.strip()):
        # The last place that it is at. Not by `rfind`, whose time grows with the product of the lengths.
        after = backwards.find(text[::-1])
        if text and after >= 0:
            # A template that trims the content leaves the blanks out: the model goes on without them.
            return prompt[: len(prompt) - after]
    raise _cannot_continue()


def _cannot_continue() -> ServingError:
    return invalid_field(
        "generation.chat.continue_final_message",
        "the last message has no text, or the chat template changes it; end with a message of plain text",
    )
