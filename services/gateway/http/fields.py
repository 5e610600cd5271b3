"""Every field that the endpoints know: one table for reading requests, /openapi.json and docs/openai.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

Schema = dict[str, Any]


class Support(Enum):
    """What happens to a field."""

    SUPPORTED = "supported"
    IGNORED = "ignored"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a JSON object."""

    schema: Schema
    description: str
    """What it does; of one that is refused: why, or what to do instead."""
    support: Support = Support.SUPPORTED
    allowed: tuple[Any, ...] = ()
    """The values that one that is refused may have all the same, because they ask for nothing."""


Fields = Mapping[str, Field]
_TEXT: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number"}
_BOOLEAN: Schema = {"type": "boolean"}
_OBJECT: Schema = {"type": "object"}
_ARRAY: Schema = {"type": "array"}
_TOKEN_ID: Schema = {"type": "integer", "minimum": 0}
_TOKEN_IDS: Schema = {"type": "array", "items": _TOKEN_ID}
_TEXTS: Schema = {"type": "array", "items": _TEXT}
_OBJECTS: Schema = {"type": "array", "items": _OBJECT}


def _whole(minimum: int = 0) -> Schema:
    return {"type": "integer", "minimum": minimum}


def _one_of(*schemas: Schema) -> Schema:
    return {"oneOf": list(schemas)}


def _refused(schema: Schema, why: str, *allowed: Any) -> Field:
    return Field(schema, why, Support.REFUSED, allowed)


def _ignored(schema: Schema, why: str = "changes nothing here") -> Field:
    return Field(schema, why, Support.IGNORED)


_STRUCTURED = "needs the feature structured_output"
SAMPLING: Fields = {
    "temperature": Field(_NUMBER, "divides the logits; 0 takes the most likely token; unset: the model's default"),
    "top_p": Field(_NUMBER, "keeps the most likely tokens that sum to this"),
    "top_k": Field(_whole(-1), "keeps so many tokens; 0 or -1 keeps all"),
    "min_p": Field(_NUMBER, "keeps tokens at least so likely, compared to the most likely one"),
    "presence_penalty": Field(_NUMBER, "against tokens that are in the output, from -2 to 2"),
    "frequency_penalty": Field(_NUMBER, "the same, for each time, from -2 to 2"),
    "repetition_penalty": Field(_NUMBER, "against tokens in prompt or output; 1 is neutral"),
    "seed": Field(_whole(-(2**63)), "fixes the output"),
    "logit_bias": Field(_OBJECT, "by token id, what is added to its logit, from -100 to 100"),
    "allowed_token_ids": Field(_TOKEN_IDS, "only these can be produced"),
    "min_tokens": Field(_whole(), "the output does not end before"),
    "stop": Field(_one_of(_TEXT, _TEXTS), "strings that end the output"),
    "stop_token_ids": Field(_TOKEN_IDS, "tokens that end the output"),
    "ignore_eos": Field(_BOOLEAN, "goes on after the end-of-sequence token"),
    "include_stop_str_in_output": Field(_BOOLEAN, "keeps the stop string that matched"),
    "skip_special_tokens": Field(_BOOLEAN, "false keeps special tokens in the text"),
    "priority": Field({"type": "integer"}, "smaller numbers are served first, from -100 to 100"),
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
    "store": _refused(_BOOLEAN, "nothing is stored here; leave it out", False),
    "service_tier": _refused(_TEXT, "there is one tier; leave it out", "auto", "default"),
    "moderation": _refused(_OBJECT, "nothing is moderated here; leave it out"),
    "length_penalty": _refused(_NUMBER, "there is no beam search here; leave it out", 1),
    "use_beam_search": _refused(_BOOLEAN, "there is no beam search here; leave it out", False),
    "bad_words": _refused(_TEXTS, "is not supported; use logit_bias", []),
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

_GENERATE: Fields = {
    **SAMPLING,
    "n": Field(_whole(1), "how many outputs of each prompt"),
    "max_tokens": Field(_whole(1), "most tokens to produce"),
    "max_completion_tokens": Field(_whole(1), "the same as max_tokens"),
    "stream": Field(_BOOLEAN, "sends server-sent events, one for each piece of output"),
    "stream_options": Field(_OBJECT, "include_usage: a last chunk with the usage"),
    "return_token_ids": Field(_BOOLEAN, "adds token_ids to choices, and prompt_token_ids"),
    "response_format": Field(_OBJECT, f"text, json_object or json_schema; all but text: {_STRUCTURED}"),
}
_CONVERSATION: Fields = {
    "messages": Field(
        {"type": "array", "items": {"$ref": "#/components/schemas/Message"}}, "the conversation, oldest first"
    ),
    "tools": Field(_OBJECTS, "tools that the model may call, in OpenAI's function format"),
    "tool_choice": Field(_one_of(_TEXT, _OBJECT), f"auto, none, required or one function; the last two: {_STRUCTURED}"),
    "chat_template_kwargs": Field(_OBJECT, "further variables for the model's chat template"),
    "reasoning_effort": Field(_TEXT, "the variable reasoning_effort of the chat template; none: no thinking"),
    "documents": Field(_OBJECTS, "the variable documents of the chat template"),
    "continue_final_message": Field(_BOOLEAN, "the last message is continued instead of answered"),
    "add_generation_prompt": Field(_BOOLEAN, "the opposite of continue_final_message"),
    "chat_template": _refused(_TEXT, "templates come with the model; use the one it has"),
    "mm_processor_kwargs": _refused(_OBJECT, "this server takes text only; leave it out"),
}
CHAT: Fields = {
    "model": Field(_TEXT, "a name from GET /v1/models"),
    **_CONVERSATION,
    **_GENERATE,
    "echo": _refused(_BOOLEAN, "is not supported; put the prompt before the output yourself", False),
    "logprobs": Field(_BOOLEAN, "returns log probabilities"),
    "top_logprobs": Field(_whole(), "how many alternatives for each token, up to 20"),
    "parallel_tool_calls": Field(_BOOLEAN, "false: the output ends after one tool call"),
    "include_reasoning": Field(_BOOLEAN, "false leaves reasoning_content out"),
    "add_special_tokens": _refused(_BOOLEAN, "the chat template has them already; leave it out", False),
    "functions": _refused(_ARRAY, "is the old form of tools; use tools", []),
    "function_call": _refused(_one_of(_TEXT, _OBJECT), "is the old form of tool_choice; use tool_choice", "none"),
    "audio": _refused(_OBJECT, "this server makes text only; leave it out"),
    "modalities": _refused(_TEXTS, 'this server makes text only; leave it out or send ["text"]', ["text"]),
    "prediction": _refused(_OBJECT, "predicted outputs are not used here; leave it out"),
    "web_search_options": _refused(_OBJECT, "this server does not search the web; leave it out"),
    "verbosity": _refused(_TEXT, "is not known to models here; say it in a message", "medium"),
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
    "logprobs": Field(_whole(), "returns log probabilities, with so many alternatives for each token, up to 20"),
    "echo": Field(_BOOLEAN, "puts the prompt before the output; with logprobs also those of its tokens"),
    "max_tokens": Field(_whole(), "most tokens to produce; 0 is allowed with echo"),
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
    "annotations": _refused(_ARRAY, "is not known here; leave it out", []),
    "audio": _refused(_OBJECT, "this server takes text only; leave it out"),
    "function_call": _refused(_OBJECT, "is the old form of tool_calls; use tool_calls"),
}
STREAM_OPTIONS: Fields = {
    "include_usage": Field(_BOOLEAN, "a last chunk with the usage"),
    "continuous_usage_stats": _refused(_BOOLEAN, "is not supported; usage comes once, at the end", False),
    "include_obfuscation": _refused(_BOOLEAN, "is not supported; leave it out", False),
}
RESPONSES: Fields = {
    "model": CHAT["model"],
    "input": Field(_one_of(_TEXT, _OBJECTS), "a text, or items: messages, function calls and their outputs, reasoning"),
    "instructions": Field(_TEXT, "the system message"),
    **SAMPLING,
    "max_output_tokens": Field(_whole(1), "most tokens to produce"),
    "stream": Field(_BOOLEAN, "sends server-sent events"),
    "stream_options": Field(_OBJECT, "include_obfuscation, of which only false is supported"),
    "text": Field(_OBJECT, f"format: text, json_object or json_schema; all but text: {_STRUCTURED}"),
    "tools": Field(_OBJECTS, "functions that the model may call; others are refused"),
    "tool_choice": CHAT["tool_choice"],
    "parallel_tool_calls": CHAT["parallel_tool_calls"],
    "reasoning": Field(_OBJECT, "effort: the variable reasoning_effort of the chat template; none: no thinking"),
    "chat_template_kwargs": CHAT["chat_template_kwargs"],
    "include": Field(_TEXTS, "message.output_text.logprobs; reasoning.encrypted_content is ignored"),
    "top_logprobs": Field(_whole(), "how many alternatives for each token, up to 20"),
    "previous_response_id": _refused(_TEXT, "nothing is stored here; send the whole conversation as input"),
    "conversation": _refused(_one_of(_TEXT, _OBJECT), "nothing is stored here; send the whole conversation as input"),
    "prompt": _refused(_OBJECT, "nothing is stored here; send instructions and input"),
    "background": _refused(_BOOLEAN, "nothing is stored here; use stream", False),
    "background_options": _refused(_OBJECT, "nothing is stored here; leave it out"),
    "context_management": _refused(_ARRAY, "a conversation is never shortened here; leave it out", []),
    "truncation": _refused(_TEXT, "a conversation is never shortened here; do it yourself", "disabled"),
    "max_tool_calls": _refused(_whole(1), "this server runs no tools itself; leave it out"),
    "image": _refused(_OBJECT, "this server makes text only; leave it out"),
    "access_programs": _refused(_OBJECT, "is not known here; leave it out"),
}
STREAM_OPTIONS_OF_RESPONSES: Fields = {"include_obfuscation": STREAM_OPTIONS["include_obfuscation"]}
_INPUTS: Fields = {
    "truncate": Field(_BOOLEAN, "cuts what is too long; false refuses it; unset: true"),
    "priority": SAMPLING["priority"],
    "user": _ignored(_TEXT),
}
EMBEDDINGS: Fields = {
    "model": CHAT["model"],
    "input": Field(
        _one_of(_TEXT, _TEXTS, _TOKEN_IDS, {"type": "array", "items": _TOKEN_IDS}),
        "one input or several, at most 2048, as text or token ids",
    ),
    "encoding_format": Field(_TEXT, "float, or base64: float32, little-endian"),
    "dimensions": Field(_whole(1), "keeps the first so many elements, and normalizes after that"),
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
OBJECTS: Mapping[str, Fields] = {
    "ChatCompletionRequest": CHAT,
    "CompletionRequest": COMPLETION,
    "ResponsesRequest": RESPONSES,
    "EmbeddingsRequest": EMBEDDINGS,
    "RerankRequest": RERANK,
    "Message": MESSAGE,
    "StreamOptions": STREAM_OPTIONS,
    "TokenizeRequest": TOKENIZE,
    "DetokenizeRequest": DETOKENIZE,
}
"""The tables by the names of their schemas."""
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "ChatCompletionRequest": ("model", "messages"),
    "CompletionRequest": ("model",),
    "ResponsesRequest": ("model", "input"),
    "EmbeddingsRequest": ("model", "input"),
    "RerankRequest": ("model", "query", "documents"),
    "Message": ("role",),
    "TokenizeRequest": ("model",),
    "DetokenizeRequest": ("model", "tokens"),
}
"""What cannot be left out."""
