"""Every kind of error: its status, and an error object that names OpenAI's parameter."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import openai
import pytest

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.errors import Reason, ServingError, invalid_field
from octavo.services.gateway.http import formats, generate
from octavo.services.gateway.http.errors import in_openai_words

USER: Any = [{"role": "user", "content": "hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def error_of(response: httpx.Response) -> Any:
    """The error object, which has the same four keys always."""
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert "Traceback" not in response.text
    assert "generation." not in body["error"]["message"]
    assert response.headers["x-request-id"]
    return body["error"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 17}, "n"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 1000}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"min_tokens": 9, "max_tokens": 4}, "min_tokens"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": 5}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop_token_ids": [5000]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5]"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"seed": 2**64}, "seed"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": 1}}, "stream_options.continuous_usage_stats"),
        ({"stream": True, "stream_options": {"include_usages": True}}, "stream_options.include_usages"),
        ({"skip_special_tokens": "no"}, "skip_special_tokens"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "f"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": ["f"]}, "tools[0]"),
        ({"tools": [{"type": 5}]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "any", "tools": []}}}, "tool_choice"),
        ({"metadata": "x"}, "metadata"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"priority": 101}, "priority"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "pirate", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "poem"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "x", "contents": "x"}]}, "messages[0].contents"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages[0].tool_calls",
        ),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages"),
        ({"tools": ["x"]}, "tools[0]"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format"),
        ({"response_format": {"type": "poem"}}, "response_format.type"),
        ({"guided_regex": "a+"}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "a" * 70_000}, "guided_regex"),
        ({"structured_outputs": {"grammar": "a" * 300_000}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs.choice"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"n_predict": 5, "max_tokens": 4}, "n_predict"),
    ],
)
async def test_a_wrong_field_is_named(http: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    response = await http.post(CHAT, content=json.dumps({"model": "tiny", "messages": USER, **fields}), headers=JSON)

    error = error_of(response)
    assert response.status_code == 400, error
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["x", 1]}, "prompt"),
        ({"prompt": [5000]}, "prompt[0]"),
        ({"prompt": ["x"] * 257}, "prompt"),
        ({"prompt": "x" * 100}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"messages": USER}, "messages"),
    ],
)
async def test_a_wrong_field_of_a_completion_is_named(
    http: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    response = await http.post(TEXT, json={"model": "tiny", "prompt": "x", **fields})

    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == param


async def test_null_is_the_same_as_absent(harness: Any, http: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "prompt": "x", "temperature": None, "stop": None, "suffix": None, "never_heard_of": None}
    call = asyncio.ensure_future(http.post(TEXT, json=body))
    submit = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(submit.handle, [0], finish=1)

    assert (await call).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}, None),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
        ),
    ],
)
async def test_what_is_switched_off_is_a_400_with_its_code(
    http: httpx.AsyncClient, fields: dict[str, Any], param: str | None
) -> None:
    response = await http.post(CHAT, json={"model": "tiny", "messages": USER, **fields})

    assert response.status_code == 400
    assert error_of(response)["code"] == "feature_disabled"
    if param is not None:
        assert error_of(response)["param"] == param


async def test_an_empty_list_of_allowed_tokens_is_refused_as_it_allows_none(http: httpx.AsyncClient) -> None:
    response = await http.post(TEXT, json={"model": "tiny", "prompt": "x", "allowed_token_ids": []})

    assert (response.status_code, error_of(response)["param"]) == (400, "allowed_token_ids")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    ],
)
async def test_what_is_not_json_is_a_400(http: httpx.AsyncClient, body: bytes) -> None:
    response = await http.post(TEXT, content=body, headers=JSON)

    assert response.status_code == 400
    assert error_of(response)["code"] == "malformed_request"


async def test_a_number_of_too_many_digits_is_told_of_as_one(http: httpx.AsyncClient) -> None:
    body = b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 5000 + b"}"
    response = await http.post(TEXT, content=body, headers=JSON)

    assert error_of(response)["message"].endswith("it has a number of more than 4300 digits")


async def test_a_page_of_another_site_cannot_send_a_plain_form(http: httpx.AsyncClient) -> None:
    response = await http.post(TEXT, content=b"{}", headers={"content-type": "text/plain"})

    assert response.status_code == 415
    assert error_of(response)["code"] == "unsupported_media_type"


async def test_a_packed_body_is_a_415_that_names_its_encoding(http: httpx.AsyncClient) -> None:
    response = await http.post(TEXT, content=b"\x1f\x8b", headers={**JSON, "content-encoding": "gzip"})

    assert response.status_code == 415
    assert response.headers["accept-encoding"] == "identity"
    assert "'gzip'" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("/chat/completions", "did you mean /v1/chat/completions? A base URL ends with one /v1"),
        ("/v1/v1/chat/completions", "did you mean /v1/chat/completions? A base URL ends with one /v1"),
        ("/api/chat", "not Ollama's"),
        ("/v1/files", "OCTAVO_BATCH_DIR"),
        ("/v1/batches/batch_1/cancel", "OCTAVO_BATCH_DIR"),
        ("/v1/images", "GET / lists what there is"),
    ],
)
async def test_a_path_that_is_not_there_has_advice(http: httpx.AsyncClient, path: str, advice: str) -> None:
    response = await http.post(path, json={})

    error = error_of(response)
    assert (response.status_code, error["code"]) == (404, "unknown_url")
    assert advice in error["message"]


@pytest.mark.parametrize(
    ("fields", "limits"),
    [
        ({"max_tokens": -1}, "from 1 up to 1048576"),
        ({"n": 0}, "from 1 up to 16"),
        ({"n": 17}, "from 1 up to 16"),
        ({"top_k": -2}, "from -1 up to 1048576"),
        ({"priority": 101}, "from -100 up to 100"),
        ({"logprobs": True, "top_logprobs": 21}, "from 0 up to 20"),
    ],
)
async def test_a_limit_in_a_message_is_the_true_one(
    http: httpx.AsyncClient, fields: dict[str, Any], limits: str
) -> None:
    response = await http.post(CHAT, json={"model": "tiny", "messages": USER, **fields})

    assert limits in error_of(response)["message"]


@pytest.mark.parametrize(
    ("name", "item", "most"),
    [
        ("bad_words", "x", 1024),
        ("stop", "x", 16),
        ("stop_token_ids", 1, 128),
        ("allowed_token_ids", 1, 1024),
        ("logit_bias", 1, 1024),
    ],
)
@pytest.mark.parametrize("factor", [1, 5])
async def test_a_list_that_is_too_long_is_told_how_long_it_may_be(
    http: httpx.AsyncClient, name: str, item: Any, most: int, factor: int
) -> None:
    many: Any = [item] * (most * factor + 1)
    value = {str(index): item for index in range(len(many))} if name == "logit_bias" else many

    response = await http.post("/v1/completions", json={"model": "tiny", "prompt": "x", name: value})

    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert message.startswith(f"{name}: ")
    assert {str(most), str(len(many))} <= set(re.findall(r"\d+", message.replace(",", ""))), message


async def test_an_unknown_model_is_a_404(sdk: openai.AsyncOpenAI) -> None:
    for call in (sdk.completions.create(model="huge", prompt="x"), sdk.models.retrieve("huge")):
        with pytest.raises(openai.NotFoundError) as caught:
            await call
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_unknown_routes_and_methods_have_an_error_object(http: httpx.AsyncClient) -> None:
    unknown = await http.post("/v1/images", json={})
    wrong = await http.get(CHAT)

    assert (unknown.status_code, error_of(unknown)["code"]) == (404, "unknown_url")
    assert (wrong.status_code, error_of(wrong)["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("code", "reason", "status", "kind"),
    [
        (3, "KV_CAPACITY_EXCEEDED", 400, "invalid_request_error"),
        (8, "QUEUE_FULL", 429, "rate_limit_error"),
        (14, "NO_WORKERS", 503, "server_error"),
        (4, "QUEUE_TIMEOUT", 504, "server_error"),
        (13, "WORKER_FAULT", 500, "server_error"),
        (10, "STREAM_INTERRUPTED", 503, "server_error"),
        (16, "UNAUTHENTICATED", 401, "authentication_error"),
        (7, "", 403, "permission_error"),
    ],
)
async def test_the_scheduler_s_refusals_have_their_status(
    harness: Any, http: httpx.AsyncClient, code: int, reason: str, status: int, kind: str
) -> None:
    call = asyncio.ensure_future(http.post(TEXT, json={"model": "tiny", "prompt": "x", "stream": True}))
    submit = await harness.scheduler.next("submit")
    rejected = scheduler_pb2.Rejected(
        handle=submit.handle, code=code, reason=reason, message="no", retry_after_ms=1500 if status in (429, 503) else 0
    )
    harness.scheduler.send(rejected=rejected)
    response = await call

    assert (response.status_code, error_of(response)["type"]) == (status, kind)
    assert response.headers.get("retry-after") == ("2" if status in (429, 503) else None)
    assert response.headers.get("x-ratelimit-remaining-requests") == ("0" if status == 429 else None)
    assert response.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)
    assert (error_of(response)["code"] == "invalid_api_key") is (status == 401)


async def test_an_error_in_the_middle_of_a_stream_is_its_last_event(harness: Any, sdk: openai.AsyncOpenAI) -> None:
    opening = asyncio.ensure_future(sdk.completions.create(model="tiny", prompt="x", stream=True))
    submit = await harness.scheduler.next_admitted()
    stream = await opening
    harness.scheduler.tokens(submit.handle, harness.ids("he"))
    first = await anext(aiter(stream))
    harness.scheduler.send(failed=scheduler_pb2.Failed(handle=submit.handle, code=13, reason="WORKER_FAULT"))

    with pytest.raises(openai.APIError) as caught:
        await anext(aiter(stream))
    assert first.choices[0].text == "he"
    assert caught.value.code == "worker_fault"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bug_is_a_500_without_its_traceback(
    harness: Any, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: Any, stream: bool
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret")

    if not stream:
        monkeypatch.setattr(generate, "read_completion_call", fail)
    monkeypatch.setattr(formats.ChunkFormat, "delta", fail)
    call = asyncio.ensure_future(http.post(TEXT, json={"model": "tiny", "prompt": "x", "stream": stream}))
    if stream:
        submit = await harness.scheduler.next_admitted()
        harness.scheduler.tokens(submit.handle, [9])
    response = await call

    assert response.status_code == (200 if stream else 500)
    assert '"code":"internal"' in response.text.replace(" ", "")
    assert "secret" not in response.text
    assert "secret" in caplog.text


def test_words_that_a_client_wrote_stay_as_they_are() -> None:
    names = {"name": "lora_name"}
    said = "no name 'generation.model', \"max_new_tokens\" or 'name'; the model's renames: max_new_tokens"
    other = in_openai_words(ServingError(Reason.ADAPTER_NOT_FOUND, said), names)
    field = in_openai_words(invalid_field("name", "the name 'name' is taken"), names)

    assert other.message == said.removesuffix("max_new_tokens") + "max_tokens"
    assert not other.violations
    assert field.message == "lora_name: the name 'name' is taken"
