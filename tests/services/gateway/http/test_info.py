"""Models, tokens, health, version, and the listener's own description."""

from __future__ import annotations

import re
from typing import Any

import httpx
import openai
import pytest
from starlette.routing import Route

import octavo
from octavo.services.gateway.http.adapters import AdapterEndpoints
from octavo.services.gateway.http.app import make_app


async def test_models_are_listed_under_each_name(sdk: openai.AsyncOpenAI) -> None:
    models = (await sdk.models.list()).data
    one = await sdk.models.retrieve("little")

    assert [(model.id, model.object, model.owned_by) for model in models] == [
        ("tiny", "model", "octavo"),
        ("little", "model", "octavo"),
    ]
    assert one == models[1]
    assert one.model_dump()["max_model_len"] == 64


async def test_text_becomes_tokens_and_text_again(harness: Any, http: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "prompt": "hello", "return_token_strs": True}
    tokens = (await http.post("/tokenize", json=body)).json()
    text = await http.post("/detokenize", json={"model": "tiny", "tokens": [0, *tokens["tokens"]]})

    ids = harness.ids("hello")
    assert tokens == {"count": len(ids), "max_model_len": 64, "tokens": ids, "token_strs": ["he", "ll", "o"]}
    assert text.json() == {"prompt": "<|end|>hello"}


async def test_a_conversation_becomes_the_tokens_of_its_prompt(harness: Any, http: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "hi"}]
    tokens = (await http.post("/tokenize", json={"model": "tiny", "messages": messages})).json()

    text = harness.tokenizer.decode(tokens["tokens"], skip_special_tokens=False)
    assert text == "<|start|>user\nhi<|end|>\n<|start|>assistant\n"
    assert tokens["token_strs"] is None


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {"model": "tiny"}, 400, "messages"),
        ("/tokenize", {"model": "x", "prompt": "x"}, 404, "model"),
        ("/tokenize", {"model": "tiny", "prompt": 5}, 400, "prompt"),
        ("/tokenize", {"model": "tiny", "prompt": "x", "tokens": 1}, 400, "tokens"),
        ("/detokenize", {"model": "tiny", "tokens": [5000]}, 400, "tokens"),
        ("/detokenize", {"model": "tiny", "tokens": "x"}, 400, "tokens"),
        ("/detokenize", {"tokens": []}, 400, "model"),
    ],
)
async def test_a_wrong_field_is_named(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    response = await http.post(path, json=body)

    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


async def test_health_follows_the_scheduler(harness: Any, http: httpx.AsyncClient, tools: Any) -> None:
    healthy = [(await http.get(path)).status_code for path in ("/health", "/ping")]
    await harness.scheduler.stop()
    await tools.until(lambda: not harness.gateway.schedulers.connected)
    ill = [(await http.get(path)).status_code for path in ("/health", "/ping")]

    assert (healthy, ill) == ([200, 200], [503, 503])


async def test_the_list_of_models_is_there_with_a_slash_too(http: httpx.AsyncClient) -> None:
    assert (await http.get("/v1/models/")).json() == (await http.get("/v1/models")).json()


@pytest.mark.parametrize("path", ["/", "/docs"])
async def test_the_first_page_says_what_there_is(http: httpx.AsyncClient, path: str) -> None:
    about = (await http.get(path)).json()

    assert about["description"] == "/openapi.json"
    assert {"/v1/chat/completions", "/v1/models/{model}"} <= set(about["paths"])


async def test_the_version_is_that_of_the_package(http: httpx.AsyncClient) -> None:
    assert (await http.get("/version")).json() == {"version": octavo.__version__}


async def test_the_description_has_every_route_and_no_other(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()

    anything: Any = _Anything()
    app = make_app(anything, anything, anything, anything, 1, anything, (), AdapterEndpoints(anything, anything).routes)
    routes = set()
    for route in app.routes:
        assert isinstance(route, Route)
        methods = (route.methods or set()) - {"HEAD"}
        routes |= {(re.sub(r":\w+}", "}", route.path), method.lower()) for method in methods}
    assert {(path, method) for path, item in document["paths"].items() for method in item} == routes


class _Anything:
    """Has every handler."""

    def __getattr__(self, name: str) -> Any:
        async def handler(request: Any) -> None: ...

        return handler
