"""Renders a model's own chat template (Jinja), as transformers does: what the forks of a limited process do.

A template comes with a model and values come from a client, so neither may read anything, change anything or run for
long. The sandbox is Jinja's immutable one; time and memory, those of compiling included, are limited by the system
(see `limited_server`).

The frame that sets it up is JSON, `{"source", "special_tokens"}`, and is answered with `{"error"}` or with what is
known of the template. A request is a size and so many bytes of JSON, the arguments of `Template.render`, with the
size of its UTF-8 in place of each message's content; then all contents. Its answer is `P` and the prompt, or `E` and
JSON, `[field, description]`.
"""

from __future__ import annotations

import datetime
import json
import secrets
import struct
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from jinja2.parser import Parser

from octavo.services.gateway.offload.limited_server import Answer, Limits, limit, serve

LIMITS = Limits(cpu_s=1.0, wall_s=10.0, memory=512 << 20, max_requests=10_000)
MAX_OUTPUT_CHARS = 16_777_216
_MAX_DESCRIPTION_CHARS = 500
HEAD = struct.Struct(">I")
PROMPT, ERROR = b"P", b"E"
MESSAGES_FIELD = "generation.chat.messages"
TOO_LONG = f"the model's chat template takes more than {LIMITS.cpu_s:g} s of processor time with them; shorten them"
TOO_LARGE = "the model's chat template takes too much memory with them, or is nested too deeply; shorten them"
_OPTIONS_FIELD = "generation.chat.template_options_json"
_RESERVED = ("messages", "tools", "add_generation_prompt", "continue_final_message")


class TemplateError(ValueError):
    """The template itself cannot be used."""


class RenderError(ValueError):
    """A template cannot be rendered with these values."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(field, description)
        self.field = field
        self.description = description[:_MAX_DESCRIPTION_CHARS]


class _RefusedError(jinja2.TemplateError):
    """The template refused the conversation: it called raise_exception."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what the model wrote; for a prompt it means nothing."""

    tags = {"generation"}  # noqa: RUF012 - how Jinja declares it

    def parse(self, parser: Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    """Computes nothing: `optimized=False` leaves constant expressions to be computed that are written to the output."""

    def _output_child_to_const(self, node: jinja2.nodes.Expr, frame: Any, finalize: Any) -> str:
        if not isinstance(node, (jinja2.nodes.TemplateData, jinja2.nodes.Const)):
            raise jinja2.nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    code_generator_class = _CodeGenerator


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
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Template:
    """A compiled template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile `source`; `special_tokens` ("bos_token": "<s>", ...) are its variables. Raises TemplateError."""
        self._special_tokens = dict(special_tokens)
        environment = _Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
            optimized=False,
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except RecursionError:
            raise TemplateError("it is nested too deeply") from None
        except MemoryError:
            raise TemplateError("it takes too much memory to compile, or is nested too deeply") from None
        except (jinja2.TemplateError, SyntaxError, ValueError) as error:
            raise TemplateError(f"it does not compile: {error}") from None
        names = tree.find_all(jinja2.nodes.Name)  # `jinja2.meta` would compile, and compute constants
        self.takes_tools = any(name.name == "tools" and name.ctx == "load" for name in names)
        self.texts = {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """Return the prompt. Raises RenderError."""
        variables = dict(options or {})
        for name in variables:
            if name in _RESERVED or name in self._special_tokens or not name.isidentifier() or name.startswith("_"):
                raise RenderError(_OPTIONS_FIELD, f"{name!r} is not free for use; rename or remove it")
        mark = ""
        if continue_final_message:
            messages, mark = _with_mark(messages)
        variables |= self._special_tokens
        variables |= {
            "messages": list(messages),
            "tools": list(tools) or None,
            "documents": variables.get("documents"),
            "add_generation_prompt": not continue_final_message,
            "continue_final_message": continue_final_message,
        }
        try:
            prompt = self._collect(variables)
        except _RefusedError as error:
            raise RenderError(MESSAGES_FIELD, f"the model's chat template refuses them: {error}") from None
        except RenderError:
            raise
        except (MemoryError, RecursionError):
            raise RenderError(MESSAGES_FIELD, TOO_LARGE) from None
        except Exception as error:  # template code can fail in any way that Python code can
            description = f"the model's chat template fails with them: {type(error).__name__}: {error}"
            raise RenderError(MESSAGES_FIELD, description) from None
        return _before_mark(prompt, mark) if mark else prompt

    def _collect(self, variables: dict[str, Any]) -> str:
        pieces: list[str] = []
        size = 0
        for piece in self._template.generate(variables):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_OUTPUT_CHARS:
                description = f"the model's chat template makes a prompt of more than {MAX_OUTPUT_CHARS} characters"
                raise RenderError(MESSAGES_FIELD, description + "; shorten them")
        return "".join(pieces)


def _with_mark(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    """Return the messages with a mark behind the last one's content, which nobody can guess."""
    *before, last = messages
    if not str(last["content"]).strip():
        raise _cannot_continue()
    mark = f"end{secrets.token_hex(8)}"
    # The blank tells whether the template trims the content.
    return [*before, {**last, "content": f"{last['content']}{mark} "}], mark


def _before_mark(prompt: str, mark: str) -> str:
    """Return the prompt up to the end of the last message's content, so that the model goes on with it."""
    content, found, rest = prompt.rpartition(mark)
    if not found or mark in content:
        raise _cannot_continue()
    # A template that trims the content leaves its last blanks out: the model goes on without them.
    return content if rest.startswith(" ") else content.rstrip()


def _cannot_continue() -> RenderError:
    return RenderError(
        "generation.chat.continue_final_message",
        "the last message has no text, or the chat template changes it; end with a message of plain text",
    )


def answer_with(template: Template, request: bytes) -> bytes:
    """Return the answer to a request."""
    try:
        return PROMPT + template.render(**_arguments(request)).encode()
    except RenderError as error:
        failure = [error.field, error.description]
    except UnicodeEncodeError as error:
        failure = [MESSAGES_FIELD, f"the prompt that the model's chat template makes of them is not Unicode: {error}"]
    return ERROR + json.dumps(failure).encode()


def _arguments(request: bytes) -> dict[str, Any]:
    (size,) = HEAD.unpack_from(request)
    view, at = memoryview(request), HEAD.size + size
    arguments: dict[str, Any] = json.loads(request[HEAD.size : at])
    for message in arguments["messages"]:
        end = at + message["content"]
        message["content"] = str(view[at:end], "utf-8", "surrogatepass")
        at = end
    return arguments


def main() -> None:
    """Serve until stdin ends."""
    serve(_set_up, LIMITS)


def _set_up(first: bytes) -> tuple[Answer, bytes]:
    limit(LIMITS.cpu_s, LIMITS.memory)  # compiling has the limits of a rendering
    given = json.loads(first)
    try:
        template = Template(given["source"], given["special_tokens"])
    except TemplateError as error:
        return bytes, json.dumps({"error": str(error)}).encode()
    facts = {"takes_tools": template.takes_tools, "texts": sorted(template.texts)}
    return partial(answer_with, template), json.dumps(facts).encode()


if __name__ == "__main__":
    main()
