"""Every field that the endpoints know: one table for reading requests, /openapi.json and docs/openai.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from google.protobuf.message import Message

from octavo.common.v1 import rules_pb2
from octavo.inference.v1 import embedding_pb2, generation_pb2

Schema = dict[str, Any]


class Support(Enum):
    """What happens to a field."""

    SUPPORTED = "supported"
    IGNORED = "ignored"
    HINT = "hint"
    """Ignored; with `--unknown-fields refuse` it is refused."""
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a JSON object."""

    schema: Schema
    description: str
    """What it does; of one that is refused: why, or what to do instead."""
    support: Support = Support.SUPPORTED
    allowed: tuple[Any, ...] = ()
    """The values that ask for nothing: they are never refused, nor called ignored."""
    alias_of: str = ""
    """The field that this one is another name of; empty: none."""


Fields = Mapping[str, Field]
_GENERATION = generation_pb2.Generation()
_TEXT: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number"}
_BOOLEAN: Schema = {"type": "boolean"}
_OBJECT: Schema = {"type": "object"}
_ARRAY: Schema = {"type": "array"}
_TOKEN_ID: Schema = {"type": "integer", "minimum": 0}
_TOKEN_IDS: Schema = {"type": "array", "items": _TOKEN_ID}
_TEXTS: Schema = {"type": "array", "items": _TEXT}
_OBJECTS: Schema = {"type": "array", "items": _OBJECT}


def _whole(minimum: int = 0, maximum: int = 2**32 - 1) -> Schema:
    return {"type": "integer", "minimum": minimum, "maximum": maximum}


def _one_of(*schemas: Schema) -> Schema:
    return {"oneOf": list(schemas)}


def _refused(schema: Schema, why: str, *allowed: Any) -> Field:
    return Field(schema, why, Support.REFUSED, allowed)


def _ignored(schema: Schema, why: str = "changes nothing here") -> Field:
    return Field(schema, why, Support.IGNORED)


def _hint(schema: Schema, why: str = "is not known here; leave it out", *allowed: Any) -> Field:
    return Field(schema, why, Support.HINT, allowed)


def _alias(schema: Schema, name: str, *allowed: Any) -> Field:
    return Field(schema, f"the same as {name}", Support.SUPPORTED, allowed, name)


def _rules(message: Message, path: str) -> rules_pb2.FieldRules:
    """Return the limits that stand beside a field of our own."""
    *outer, name = path.split(".")
    descriptor = message.DESCRIPTOR
    for each in outer:
        inner = descriptor.fields_by_name[each].message_type
        assert inner is not None, f"{each} of {path} is no message"
        descriptor = inner
    options = descriptor.fields_by_name[name].GetOptions()
    rules: rules_pb2.FieldRules = options.Extensions[rules_pb2.rules]  # type: ignore[index]
    return rules


def _limited(message: Message, path: str) -> Schema:
    """Return the schema of a whole number with the limits of a field of our own."""
    limits = _rules(message, path)
    return {"type": "integer", "minimum": int(limits.min), "maximum": int(limits.max)}


def _few(schema: Schema, path: str, name: str = "maxItems") -> Schema:
    """Return a schema with as many items as a field of a Generation has at most."""
    return {**schema, name: _rules(_GENERATION, path).max_items}


_MAX_TOKENS = _limited(_GENERATION, "stop.max_new_tokens")
_ALTERNATIVES = _limited(_GENERATION, "output.logprobs")
_TOP_K = {**_limited(_GENERATION, "sampling.top_k"), "minimum": -1}
_PRIORITY = _limited(_GENERATION, "scheduling.priority")
_STRUCTURED = "needs the feature structured_output"
SAMPLING: Fields = {
    "temperature": Field(_NUMBER, "divides the logits; 0 takes the most likely token; unset: the model's default"),
    "top_p": Field(_NUMBER, "keeps the most likely tokens that sum to this"),
    "top_k": Field(_TOP_K, "keeps so many tokens; 0 or -1 keeps all"),
    "min_p": Field(_NUMBER, "keeps tokens at least so likely, compared to the most likely one"),
    "top_n_sigma": Field(_NUMBER, "keeps tokens within so many standard deviations of the highest logit; 0 keeps all"),
    "typical_p": Field(_NUMBER, "keeps the tokens of the most typical information that sum to this; 1 keeps all"),
    "presence_penalty": Field(_NUMBER, "against tokens that are in the output, from -2 to 2"),
    "frequency_penalty": Field(_NUMBER, "the same, for each time, from -2 to 2"),
    "repetition_penalty": Field(_NUMBER, "against tokens in prompt or output; 1 is neutral"),
    "seed": Field({"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1}, "fixes the output"),
    "logit_bias": Field(
        _few(_OBJECT, "sampling.logit_bias", "maxProperties"),
        "by token id, what is added to its logit, from -100 to 100",
    ),
    "allowed_token_ids": Field(_few(_TOKEN_IDS, "sampling.allowed_token_ids"), "only these can be produced"),
    "bad_words": Field(_few(_TEXTS, "sampling.bad_words"), "strings whose tokens are not produced"),
    "min_tokens": Field(_limited(_GENERATION, "stop.min_new_tokens"), "the output does not end before"),
    "stop": Field(_few(_one_of(_TEXT, _TEXTS), "stop.stop_sequences"), "strings that end the output"),
    "stop_token_ids": Field(_few(_TOKEN_IDS, "stop.stop_token_ids"), "tokens that end the output"),
    "ignore_eos": Field(_BOOLEAN, "goes on after the end-of-sequence token"),
    "include_stop_str_in_output": Field(_BOOLEAN, "keeps the stop string that matched"),
    "skip_special_tokens": Field(_BOOLEAN, "false keeps special tokens in the text"),
    "priority": Field(_PRIORITY, "smaller numbers are served first, from -100 to 100"),
    "cache_salt": Field(_TEXT, "shares cached prefixes only with requests of the same salt"),
    "prompt_cache_key": Field(_TEXT, "requests of one key are kept together where that helps the prefix cache"),
    "guided_json": Field(_one_of(_OBJECT, _TEXT), f"a JSON Schema for the output; {_STRUCTURED}"),
    "guided_regex": Field(_TEXT, f"a regular expression for the output; {_STRUCTURED}"),
    "guided_choice": Field(_TEXTS, f"possible outputs; {_STRUCTURED}"),
    "guided_grammar": Field(_TEXT, f"a grammar of the output; {_STRUCTURED}"),
    "structured_outputs": Field(_OBJECT, f"one of json, regex, choice, grammar, json_object; {_STRUCTURED}"),
    "user": _ignored(_TEXT),
    "safety_identifier": _ignored(_TEXT),
    "metadata": _ignored(_OBJECT),
    "prompt_cache_retention": _ignored(_TEXT, "the prefix cache keeps what it has room for"),
    "prompt_cache_options": _ignored(_OBJECT, "the prefix cache keeps what it has room for"),
    "store": _hint(_BOOLEAN, "nothing is stored here; leave it out", False),
    "service_tier": _hint(_TEXT, "there is one tier; leave it out", "auto", "default"),
    "client_metadata": _hint(_OBJECT),
    "repeat_penalty": _alias(_NUMBER, "repetition_penalty"),
    "moderation": _refused(_OBJECT, "nothing is moderated here; leave it out"),
    "length_penalty": _refused(_NUMBER, "there is no beam search here; leave it out", 1),
    "use_beam_search": _refused(_BOOLEAN, "there is no beam search here; leave it out", False),
    "spaces_between_special_tokens": _refused(_BOOLEAN, "only true is supported; leave it out", True),
    "truncate_prompt_tokens": _refused(_whole(-1), "a prompt is never cut here; shorten it yourself"),
    "prompt_logprobs": _refused(_whole(), "is not supported; /v1/completions has them with echo and logprobs"),
    "request_id": _refused(_TEXT, "send it as the header x-request-id"),
    "return_tokens_as_token_ids": _refused(_BOOLEAN, "is not supported; use return_token_ids", False),
    "kv_transfer_params": _refused(_OBJECT, "caches are not moved between servers here; leave it out"),
    "vllm_xargs": _refused(_OBJECT, "there are no extensions here; leave it out"),
    "logits_processors": _refused(_ARRAY, "code is not taken from requests; leave it out", []),
}
"""What all endpoints that generate have in common."""

_OTHERS_HINTS: Fields = {
    "id": _hint(_TEXT),
    "chat_id": _hint(_TEXT),
    "session_id": _hint(_TEXT, "is a header here, x-session-id; leave it out"),
    "background_tasks": _hint(_OBJECT),
    "cache_prompt": _hint(_BOOLEAN, "prefixes are cached always; leave it out", True),
    "id_slot": _hint({"type": "integer"}, "this server gives out slots itself; leave it out", -1),
    "n_keep": _hint({"type": "integer"}, "a conversation is never shortened here; leave it out", 0),
    "options": _hint(_OBJECT, "settings stand beside it here; leave it out"),
    "keep_alive": _hint(_one_of(_TEXT, _NUMBER), "the model stays loaded; leave it out"),
    "repeat_last_n": _hint({"type": "integer"}, "repetition_penalty is about all tokens; leave it out"),
    "top_a": _hint(_NUMBER, "is not supported; use min_p", 0),
    "timings_per_token": _hint(_BOOLEAN, "is not supported; leave it out", False),
    "models": _hint(_TEXTS, "this server chooses no other model; leave it out"),
    "provider": _hint(_OBJECT, "there are no providers to choose from; leave it out"),
    "plugins": _hint(_ARRAY, "this server has no plugins; leave it out"),
    "transforms": _hint(_TEXTS, "a conversation is never shortened here; leave it out"),
    "usage": _hint(_OBJECT, "usage is in every answer; leave it out"),
}
"""What front ends and agents send that are made for other servers."""
_GENERATE: Fields = {
    **SAMPLING,
    **_OTHERS_HINTS,
    "reasoning": _hint(_OBJECT, "is not supported; use reasoning_effort"),
    "thinking": _hint(_OBJECT, "is not supported; use chat_template_kwargs"),
    "n_predict": _alias(_MAX_TOKENS, "max_tokens", -1),
    "max_new_tokens": _alias(_MAX_TOKENS, "max_tokens"),
    "grammar": _alias(_TEXT, "guided_grammar", ""),
    "json_schema": _alias(_one_of(_OBJECT, _TEXT), "guided_json"),
    "n": Field({**_limited(_GENERATION, "candidate_count"), "minimum": 1}, "how many outputs of each prompt"),
    "max_tokens": Field(_MAX_TOKENS, "most tokens to produce"),
    "max_completion_tokens": Field(_MAX_TOKENS, "the same as max_tokens"),
    "stream": Field(_BOOLEAN, "sends server-sent events, one for each piece of output"),
    "stream_options": Field(_OBJECT, "what else a stream has; see below"),
    "return_token_ids": Field(_BOOLEAN, "adds token_ids to choices, and prompt_token_ids"),
    "response_format": Field(_OBJECT, f"text, json_object or json_schema; all but text: {_STRUCTURED}"),
}
_OTHER_TOOLS = "tools of other types are hints"
_CONVERSATION: Fields = {
    "messages": Field(
        {"type": "array", "items": {"$ref": "#/components/schemas/Message"}}, "the conversation, oldest first"
    ),
    "tools": Field(_OBJECTS, f"functions that the model may call; {_OTHER_TOOLS}"),
    "tool_choice": Field(
        _one_of(_TEXT, _OBJECT), f"auto, none, required, one function, or allowed_tools; to demand a call {_STRUCTURED}"
    ),
    "chat_template_kwargs": Field(_OBJECT, "further variables for the model's chat template"),
    "reasoning_effort": Field(_TEXT, "the variable reasoning_effort of the chat template; none: no thinking"),
    "documents": Field(_OBJECTS, "the variable documents of the chat template"),
    "continue_final_message": Field(_BOOLEAN, "the last message is continued instead of answered"),
    "add_generation_prompt": Field(_BOOLEAN, "the opposite of continue_final_message"),
    "chat_template": _refused(_TEXT, "templates come with the model; use the one it has"),
    "enable_thinking": Field(_BOOLEAN, "the variable enable_thinking of the chat template"),
    "mm_processor_kwargs": _hint(_OBJECT, "this server takes text only; leave it out"),
}
CHAT: Fields = {
    "model": Field(_TEXT, "a name from GET /v1/models"),
    **_CONVERSATION,
    **_GENERATE,
    "echo": _refused(_BOOLEAN, "is not supported; put the prompt before the output yourself", False),
    "logprobs": Field(_BOOLEAN, "returns log probabilities"),
    "top_logprobs": Field(_ALTERNATIVES, "how many alternatives for each token, up to 20"),
    "parallel_tool_calls": Field(_BOOLEAN, "false: the output ends after one tool call"),
    "include_reasoning": Field(_BOOLEAN, "false leaves reasoning_content out"),
    "add_special_tokens": _refused(_BOOLEAN, "the chat template has them already; leave it out", False),
    "functions": _refused(_ARRAY, "is the old form of tools; use tools", []),
    "function_call": _refused(_one_of(_TEXT, _OBJECT), "is the old form of tool_choice; use tool_choice", "none"),
    "audio": _refused(_OBJECT, "this server makes text only; leave it out"),
    "modalities": _refused(_TEXTS, 'this server makes text only; leave it out or send ["text"]', ["text"]),
    "prediction": _hint(_OBJECT, "predicted outputs are not used here; leave it out"),
    "web_search_options": _refused(_OBJECT, "this server does not search the web; leave it out"),
    "verbosity": _hint(_TEXT, "is not known to models here; say it in a message", "medium"),
    "thinking_token_budget": _refused(_whole(), "is not supported; use max_tokens"),
}
COMPLETION: Fields = {
    "model": CHAT["model"],
    **_GENERATE,
    "prompt": Field(
        _one_of(_TEXT, _TEXTS, _TOKEN_IDS, {"type": "array", "items": _TOKEN_IDS}),
        "one prompt or several, as text or token ids",
    ),
    "prompt_token_ids": Field(_TOKEN_IDS, "one prompt as token ids; instead of prompt"),
    "logprobs": Field(_ALTERNATIVES, "returns log probabilities, with so many alternatives for each token, up to 20"),
    "echo": Field(_BOOLEAN, "puts the prompt before the output; with logprobs also those of its tokens"),
    "max_tokens": Field({**_MAX_TOKENS, "minimum": 0}, "most tokens to produce; 0 is allowed with echo"),
    "best_of": Field(_whole(1), "must equal n: all outputs are returned"),
    "suffix": _refused(_TEXT, "is not supported: this server only continues a prompt", ""),
    "add_special_tokens": _refused(_BOOLEAN, "only true is supported here; send token ids instead", True),
    "prompt_embeds": _refused(_one_of(_TEXT, _TEXTS), "this server takes text and token ids only"),
}
TOKENIZE: Fields = {
    "model": CHAT["model"],
    "prompt": Field(_TEXT, "a text; or else messages"),
    **_CONVERSATION,
    "add_special_tokens": Field(_BOOLEAN, "adds what the tokenizer puts around a text by itself; true if unset"),
    "return_token_strs": Field(_BOOLEAN, "adds the text of each token"),
}
DETOKENIZE: Fields = {"model": CHAT["model"], "tokens": Field(_TOKEN_IDS, "what to decode")}
MESSAGE: Fields = {
    "role": Field(_TEXT, "which roles exist is up to the model's chat template"),
    "content": Field(_one_of(_TEXT, _OBJECTS), "text, or parts of type text"),
    "tool_calls": Field(_OBJECTS, "calls that the assistant made"),
    "tool_call_id": Field(_TEXT, "in a message of a tool: the call it answers"),
    "reasoning_content": Field(_TEXT, "what the assistant thought; up to the chat template"),
    "reasoning": Field(_TEXT, "the same as reasoning_content"),
    "name": _ignored(_TEXT),
    "refusal": _ignored(_TEXT),
    "id": _hint(_TEXT),
    "annotations": _hint(_ARRAY, "is not known here; leave it out", []),
    "reasoning_details": _hint(_ARRAY, "is not known here; use reasoning_content", []),
    "audio": _refused(_OBJECT, "this server takes text only; leave it out"),
    "function_call": _refused(_OBJECT, "is the old form of tool_calls; use tool_calls"),
}
STREAM_OPTIONS: Fields = {
    "include_usage": Field(_BOOLEAN, "a last chunk with the usage"),
    "continuous_usage_stats": Field(_BOOLEAN, "with include_usage: every chunk has the usage up to it"),
    "include_obfuscation": _hint(_BOOLEAN, "is not supported; leave it out", False),
}
RESPONSES: Fields = {
    "model": CHAT["model"],
    "input": Field(_one_of(_TEXT, _OBJECTS), "a text, or items: messages, function calls and their outputs, reasoning"),
    "instructions": Field(_TEXT, "the system message"),
    **SAMPLING,
    **_OTHERS_HINTS,
    "n": _refused(_whole(1), "there is one output; leave it out", 1),
    "max_output_tokens": Field(_MAX_TOKENS, "most tokens to produce"),
    "stream": Field(_BOOLEAN, "sends server-sent events"),
    "stream_options": Field(_OBJECT, "include_obfuscation, which is a hint"),
    "text": Field(_OBJECT, f"format: text, json_object or json_schema; all but text: {_STRUCTURED}"),
    "tools": CHAT["tools"],
    "tool_choice": CHAT["tool_choice"],
    "parallel_tool_calls": CHAT["parallel_tool_calls"],
    "reasoning": Field(_OBJECT, "effort: the variable reasoning_effort of the chat template; none: no thinking"),
    "chat_template_kwargs": CHAT["chat_template_kwargs"],
    "include": Field(_TEXTS, "message.output_text.logprobs; what there is nothing of here is ignored"),
    "top_logprobs": Field(_ALTERNATIVES, "how many alternatives for each token, up to 20"),
    "previous_response_id": _refused(_TEXT, "nothing is stored here; send the whole conversation as input"),
    "conversation": _refused(_one_of(_TEXT, _OBJECT), "nothing is stored here; send the whole conversation as input"),
    "prompt": _refused(_OBJECT, "nothing is stored here; send instructions and input"),
    "background": _refused(_BOOLEAN, "nothing is stored here; use stream", False),
    "background_options": _refused(_OBJECT, "nothing is stored here; leave it out"),
    "context_management": _hint(_ARRAY, "a conversation is never shortened here; leave it out", []),
    "truncation": _hint(_TEXT, "a conversation is never shortened here; do it yourself", "disabled"),
    "max_tool_calls": _hint(_whole(1), "this server runs no tools itself; leave it out"),
    "image": _refused(_OBJECT, "this server makes text only; leave it out"),
    "access_programs": _refused(_OBJECT, "is not known here; leave it out"),
}
MESSAGES: Fields = {
    "model": CHAT["model"],
    "messages": Field(_OBJECTS, "the conversation, oldest first; blocks of type text, thinking, tool_use, tool_result"),
    "system": Field(_one_of(_TEXT, _OBJECTS), "the system message"),
    "max_tokens": Field(_MAX_TOKENS, "most tokens to produce"),
    "stop_sequences": _alias(_TEXTS, "stop"),
    "stream": Field(_BOOLEAN, "sends server-sent events"),
    "tools": Field(_OBJECTS, f"functions that the model may call; {_OTHER_TOOLS}"),
    "tool_choice": Field(
        _OBJECT, f"auto, none, any or tool, and disable_parallel_tool_use; any and tool: {_STRUCTURED}"
    ),
    "thinking": Field(_OBJECT, "type: the variable enable_thinking of the chat template; budgets are not kept to"),
    "output_config": Field(_OBJECT, "effort: the variable reasoning_effort; format: json_schema"),
    **SAMPLING,
    "cache_control": _ignored(_OBJECT, "prefixes are cached always"),
    "container": _hint(_one_of(_TEXT, _OBJECT), "nothing is stored here; leave it out"),
    "context_management": _hint(_OBJECT, "a conversation is never shortened here; leave it out"),
    "inference_geo": _hint(_TEXT),
    "mcp_servers": _hint(_ARRAY, "this server runs no tools; leave it out", []),
    "speed": _hint(_TEXT, "there is one speed; leave it out", "standard"),
}
OUTPUT_CONFIG: Fields = {
    "effort": Field(_TEXT, "the variable reasoning_effort of the chat template"),
    "format": Field(_OBJECT, f"json_schema, with a schema: {_STRUCTURED}"),
}
THINKING: Fields = {
    "type": Field(_TEXT, "enabled, adaptive or disabled: the variable enable_thinking of the chat template"),
    "budget_tokens": Field(_MAX_TOKENS, "is not kept to"),
    "display": Field(_TEXT, "changes nothing here"),
}
STREAM_OPTIONS_OF_RESPONSES: Fields = {"include_obfuscation": STREAM_OPTIONS["include_obfuscation"]}
TEXT_OF_RESPONSES: Fields = {
    "format": Field(_OBJECT, f"text, json_object or json_schema; all but text: {_STRUCTURED}"),
    "verbosity": _hint(_TEXT, "is not known to models here; say it in the instructions", "medium"),
}
REASONING: Fields = {
    "effort": Field(_TEXT, "the variable reasoning_effort of the chat template; none: no thinking"),
    "summary": _hint(_TEXT, "summaries are not made here; reasoning is in the output as it is", "auto"),
    "generate_summary": _hint(_TEXT, "summaries are not made here; reasoning is in the output as it is", "auto"),
}
STRUCTURED_OUTPUTS: Fields = {
    "json": Field(_one_of(_OBJECT, _TEXT), "a JSON Schema for the output"),
    "json_object": Field(_BOOLEAN, "any JSON object"),
    "regex": Field(_TEXT, "a regular expression for the output"),
    "choice": Field(_TEXTS, "possible outputs"),
    "grammar": Field(_TEXT, "a grammar of the output"),
    "structural_tag": _refused(_one_of(_TEXT, _OBJECT), "is not supported; use one of json, regex, choice, grammar"),
    "disable_any_whitespace": Field(_BOOLEAN, "false lets JSON have line breaks and indentation"),
    "whitespace_pattern": _hint(_TEXT, "is not supported; use disable_any_whitespace"),
    "disable_additional_properties": _hint(_BOOLEAN, "is not supported; say it in the schema", False),
    "disable_fallback": _hint(_BOOLEAN, "there is nothing to fall back to; leave it out"),
    "backend": _hint(_TEXT, "there is one; leave it out"),
}
_INPUTS: Fields = {
    "truncate": Field(_BOOLEAN, "cuts what is too long; false refuses it; unset: true"),
    "priority": SAMPLING["priority"],
    "user": _ignored(_TEXT),
}
_DIMENSIONS = _limited(embedding_pb2.EmbedRequest(), "dimensions")
EMBEDDINGS: Fields = {
    "model": CHAT["model"],
    "input": Field(
        _one_of(_TEXT, _TEXTS, _TOKEN_IDS, {"type": "array", "items": _TOKEN_IDS}),
        "one input or several, at most 2048, as text or token ids",
    ),
    "encoding_format": Field(_TEXT, "float, or base64: float32, little-endian"),
    "dimensions": Field(_DIMENSIONS, "keeps the first so many elements, and normalizes after that"),
    "prompt_name": Field(_TEXT, "which of the model's prompts goes before each text"),
    "normalize": Field(_BOOLEAN, "scales vectors to length 1; unset: as the model's files say"),
    **_INPUTS,
}
RERANK: Fields = {
    "model": CHAT["model"],
    "query": Field(_TEXT, "what is looked for"),
    "documents": Field(_ARRAY, "what is ranked, at most 2048: texts, or objects with a text"),
    "top_n": Field(_whole(1), "returns only the best ones"),
    "return_documents": Field(_BOOLEAN, "adds each document's text to its result"),
    **_INPUTS,
}
SCORE: Fields = {
    "model": CHAT["model"],
    "text_1": Field(_one_of(_TEXT, _TEXTS), "a query for all documents, or one for each"),
    "text_2": Field(_one_of(_TEXT, _TEXTS), "what is scored, at most 2048"),
    "queries": Field(_one_of(_TEXT, _TEXTS), "another name of text_1"),
    "documents": Field(_one_of(_TEXT, _TEXTS), "another name of text_2"),
    **_INPUTS,
}
CLASSIFY: Fields = {
    "model": CHAT["model"],
    "input": Field(
        _one_of(_TEXT, _TEXTS, _TOKEN_IDS, {"type": "array", "items": _TOKEN_IDS}),
        "one input or several, at most 2048, as text or token ids",
    ),
    "text_pair": Field(_one_of(_TEXT, _TEXTS), "the second text of each input, for models of pairs"),
    **_INPUTS,
}
OBJECTS: Mapping[str, Fields] = {
    "ChatCompletionRequest": CHAT,
    "CompletionRequest": COMPLETION,
    "ResponsesRequest": RESPONSES,
    "MessagesRequest": MESSAGES,
    "MessagesOutput": OUTPUT_CONFIG,
    "EmbeddingsRequest": EMBEDDINGS,
    "RerankRequest": RERANK,
    "ScoreRequest": SCORE,
    "ClassifyRequest": CLASSIFY,
    "Message": MESSAGE,
    "StreamOptions": STREAM_OPTIONS,
    "StructuredOutputs": STRUCTURED_OUTPUTS,
    "ResponsesText": TEXT_OF_RESPONSES,
    "ResponsesReasoning": REASONING,
    "TokenizeRequest": TOKENIZE,
    "DetokenizeRequest": DETOKENIZE,
}
"""The tables by the names of their schemas."""
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "ChatCompletionRequest": ("model", "messages"),
    "CompletionRequest": ("model",),
    "ResponsesRequest": ("model", "input"),
    "MessagesRequest": ("model", "messages"),
    "EmbeddingsRequest": ("model", "input"),
    "RerankRequest": ("model", "query", "documents"),
    "ScoreRequest": ("model",),
    "ClassifyRequest": ("model", "input"),
    "Message": ("role",),
    "TokenizeRequest": ("model",),
    "DetokenizeRequest": ("model", "tokens"),
}
"""What cannot be left out."""
_ENDPOINTS: Mapping[str, str] = {
    "ChatCompletionRequest": "/v1/chat/completions",
    "CompletionRequest": "/v1/completions",
    "ResponsesRequest": "/v1/responses",
    "MessagesRequest": "/v1/messages",
    "EmbeddingsRequest": "/v1/embeddings",
    "RerankRequest": "/v1/rerank",
    "ScoreRequest": "/score",
    "ClassifyRequest": "/classify",
    "TokenizeRequest": "/tokenize",
    "DetokenizeRequest": "/detokenize",
}


def endpoints_with(name: str) -> list[str]:
    """Return which endpoints do something with a field of this name."""
    known = ((path, OBJECTS[schema].get(name)) for schema, path in _ENDPOINTS.items())
    return [path for path, field in known if field is not None and field.support is Support.SUPPORTED]
