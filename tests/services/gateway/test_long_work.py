"""Long requests are worked on in threads, with no call of C code that holds the GIL for long."""

from __future__ import annotations

import gc
import json
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2, tokenizer_pb2, tokenizer_pb2_grpc
from octavo.services.common.errors import ServingError
from octavo.services.gateway.http import endpoint
from octavo.services.gateway.offload import long_json
from octavo.services.gateway.output.candidate_output import CandidateOutput
from octavo.services.gateway.requests import calls, chat, prepare
from octavo.services.gateway.rpc import tokenizer_service
from octavo.services.gateway.schedulers import peers as scheduler_peers
from octavo.services.gateway.schedulers import prefix_index
from octavo.services.gateway.schedulers.router import Router
from octavo.services.gateway.tokenization import chunk_encoder
from octavo.services.gateway.tokenization.chat_template import TemplateFacts
from octavo.services.gateway.tokenization.chunk_encoder import ChunkEncoder, TooManyTokensError
from octavo.services.gateway.tokenization.input_encoder import InputEncoder
from octavo.services.gateway.validation import RequestValidator, is_longer

from .conftest import make_tokenizer, rejection

LONG = "hello world " * 2000


@pytest.fixture
def context() -> int:
    return 131_072


@pytest.fixture
def on_loop(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], Counter[str]]:
    """Count where a function is called: on the event loop's thread, or in another one."""

    def watch(owner: Any, name: str) -> Counter[str]:
        calls: Counter[str] = Counter()
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            calls["loop" if threading.current_thread() is threading.main_thread() else "thread"] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)
        return calls

    return watch


class BatchesOnly:
    """A tokenizer that may be used by the calls that let go of the GIL only; notes in which threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.threads: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        assert name in ("encode_batch", "encode_batch_fast", "decode_batch"), f"{name} holds the GIL"
        self.threads.add("loop" if threading.current_thread() is threading.main_thread() else "thread")
        return getattr(self._tokenizer, name)


@pytest.fixture
def batches_only(harness: Any, monkeypatch: pytest.MonkeyPatch) -> BatchesOnly:
    tokenizer = harness.gateway._tokenizer
    watched = BatchesOnly(tokenizer._tokenizer)
    monkeypatch.setattr(tokenizer, "_tokenizer", watched)
    return watched


@pytest.mark.parametrize("byte_offsets", [False, True])
async def test_tokenize_lets_go_of_the_gil_in_a_thread(
    harness: Any, batches_only: BatchesOnly, byte_offsets: bool
) -> None:
    stub = harness.service(tokenizer_pb2_grpc.TokenizerServiceStub)
    request = tokenizer_pb2.TokenizeRequest(model="tiny", texts=[LONG], byte_offsets=byte_offsets)

    (answer,) = (await stub.Tokenize(request)).tokenizations

    assert answer.token_ids == harness.ids(LONG)
    assert len(answer.byte_offsets) == (len(answer.token_ids) if byte_offsets else 0)
    assert batches_only.threads == {"thread"}


async def test_detokenize_lets_go_of_the_gil_in_a_thread(harness: Any, batches_only: BatchesOnly) -> None:
    stub = harness.service(tokenizer_pb2_grpc.TokenizerServiceStub)
    request = tokenizer_pb2.DetokenizeRequest(model="tiny", sequences=[{"ids": harness.ids(LONG)}])

    assert (await stub.Detokenize(request)).texts == [LONG]
    assert batches_only.threads == {"thread"}


async def test_tokens_and_texts_of_one_call_are_bounded_together(harness: Any) -> None:
    stub = harness.service(tokenizer_pb2_grpc.TokenizerServiceStub)
    text = "a" * (tokenizer_service.MAX_TEXT_BYTES // 2)
    half = [5] * (tokenizer_service.MAX_TOKENS // 2)
    Request = tokenizer_pb2.TokenizeRequest  # noqa: N806 - a class

    for call, field in (
        (stub.Tokenize(Request(model="tiny", texts=[text, text, "a"])), "texts"),
        (stub.Tokenize(Request(model="tiny", texts=[text], byte_offsets=True)), "texts"),
        (stub.Tokenize(Request(model="tiny", texts=[text + text + "a"])), "texts[0]"),
        (
            stub.Detokenize(
                tokenizer_pb2.DetokenizeRequest(model="tiny", sequences=[{"ids": half}, {"ids": half}, {"ids": [5]}])
            ),
            "sequences",
        ),
    ):
        refused = await rejection(call)
        assert (refused.reason, refused.fields) == ("INVALID_FIELD", [field])


async def test_continued_output_is_turned_into_text_once_and_in_a_thread(harness: Any, on_loop: Any) -> None:
    pushes = on_loop(CandidateOutput, "push")
    continued = harness.ids(LONG)
    call = harness.stub.Generate(
        generation_pb2.GenerateRequest(
            generation=harness.generation(continue_output={"ids": continued}, stop={"stop_sequences": ["#"]})
        )
    )

    submit = await harness.scheduler.next_admitted()
    assert pushes == {"thread": 1}
    harness.scheduler.tokens(submit.handle, harness.ids("he"), finish=common_pb2.FINISH_REASON_MAX_TOKENS)
    answer = await call

    assert answer.candidates[0].text == "he"


async def test_a_long_request_is_checked_and_made_ready_in_a_thread(harness: Any, on_loop: Any) -> None:
    steps = [on_loop(prepare, name) for name in ("_checked", "_submit", "_check_values", "read_chat")]
    generation = harness.generation(chat={"messages": [{"role": "user", "parts": [{"text": LONG}]}]})
    call = harness.stub.Generate(generation_pb2.GenerateRequest(generation=generation))

    await harness.scheduler.next_admitted()
    call.cancel()

    assert [step["loop"] for step in steps] == [0, 0, 0, 0]
    assert [step["thread"] for step in steps] == [1, 1, 1, 1]


async def test_a_lot_of_output_at_once_goes_out_in_pieces(harness: Any) -> None:
    token_ids = harness.ids(LONG)
    stream = harness.stream()
    submit = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(submit.handle, token_ids, finish=common_pb2.FINISH_REASON_MAX_TOKENS)

    deltas = [each.event.delta async for each in stream if each.event.HasField("delta")]

    assert "".join(delta.text for delta in deltas) == LONG
    assert max(delta.token_count for delta in deltas) <= 2048
    assert [delta.token_offset for delta in deltas] == [
        sum(before.token_count for before in deltas[:index]) for index in range(len(deltas))
    ]


async def test_a_prompt_s_hashes_are_made_once_and_not_on_the_loop(
    harness: Any, on_loop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[Sequence[int]] = []
    made, anew = on_loop(calls, "prompt_block_hashes"), on_loop(scheduler_peers, "prompt_block_hashes")
    choose = Router.choose

    def watched(self: Router, request: Any, block_hashes: Any, *more: Any) -> Any:
        known.append(block_hashes(16))
        return choose(self, request, block_hashes, *more)

    monkeypatch.setattr(Router, "choose", watched)
    monkeypatch.setattr(Router, "block_sizes", [16])
    call = harness.stub.Generate(generation_pb2.GenerateRequest(generation=harness.generation(LONG)))

    submit = await harness.scheduler.next_admitted()
    call.cancel()

    assert made == {"thread": 1}
    assert not anew
    assert known[0] == prefix_index.prompt_block_hashes(submit, 16)


# -- texts beyond the context -----------------------------------------------------------------------


@pytest.mark.parametrize("text", ["hello world and so on " * 2000, "\x01" * 20_000, "ab" * 10_000])
def test_a_text_of_more_tokens_than_the_limit_is_refused_before_all_are_made(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(chunk_encoder, "_SLICE_CHARS", 2048)
    monkeypatch.setattr(chunk_encoder, "_BORDER_TOKENS", 8)
    watched = BatchesOnly(make_tokenizer())
    encoder = ChunkEncoder(make_tokenizer())
    encoder._tokenizer = watched  # type: ignore[assignment]
    num_chars = 0
    encode = watched._tokenizer.encode_batch_fast

    class Counted:
        def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
            nonlocal num_chars
            num_chars += sum(map(len, texts))
            return encode(texts, **options)

    encoder._tokenizer = Counted()  # type: ignore[assignment]
    num_tokens = len(make_tokenizer().encode(text).ids)

    with pytest.raises(TooManyTokensError) as caught:
        encoder.encode(text, True, "", 100)
    assert 100 < caught.value.count <= num_tokens
    assert num_chars <= 4096
    assert encoder.encode(text, True, "", num_tokens) == make_tokenizer().encode(text).ids


class Watched:
    """Counts what a tokenizer is given and what it makes."""

    def __init__(self, encoder: ChunkEncoder) -> None:
        self._tokenizer, self.num_chars, self.most_tokens = encoder._tokenizer, 0, 0
        encoder._tokenizer = self  # type: ignore[assignment]

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        encodings = self._tokenizer.encode_batch_fast(texts, **options)
        self.num_chars += sum(map(len, texts))
        self.most_tokens = max(self.most_tokens, *map(len, encodings), 0)
        return encodings


def test_a_text_of_many_tokens_a_character_is_refused_before_they_fill_the_memory() -> None:
    encoder = ChunkEncoder(make_tokenizer())
    watched = Watched(encoder)

    with pytest.raises(TooManyTokensError):
        encoder.encode("\u0301\u200d🙂" * 100_000, True, "", 8192)

    assert watched.most_tokens <= 4 << 15  # some 40 MB


def test_pieces_of_few_tokens_hide_none_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_encoder, "_SLICE_CHARS", 2048)
    monkeypatch.setattr(chunk_encoder, "_BORDER_TOKENS", 2000)
    encoder = ChunkEncoder(make_tokenizer())
    watched = Watched(encoder)
    text = "the" * 6_827 + "\x01" * 20_480

    with pytest.raises(TooManyTokensError):
        encoder.encode(text, True, "", 100)

    assert watched.num_chars < len(text)


def test_cuts_are_found_across_windows_of_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["x" * length + " y" * 3 + "." * length + "a bc d " * 300 for length in range(500, 530)]
    whole = [list(chunk_encoder.chunks_of(text)) for text in texts]

    for width in (1, 2, 3, 7):
        monkeypatch.setattr(chunk_encoder, "_SEARCH_CHARS", width)
        assert [list(chunk_encoder.chunks_of(text)) for text in texts] == whole


@pytest.mark.parametrize("text", ["hello world " * 5000, "\x01" * 50_000, "wwww" * 20_000])
def test_no_more_of_an_input_is_encoded_than_is_kept(text: str) -> None:
    encoder = InputEncoder(make_tokenizer().to_str().encode())
    plain = make_tokenizer()
    plain.enable_truncation(50)

    (single,) = encoder.encode([text], 50)
    (pair,) = encoder.encode([("hello", text)], 50)
    (short,) = encoder.encode(["hello"], 50)

    assert list(single.token_ids) == plain.encode(text).ids
    assert list(pair.token_ids) == plain.encode("hello", text).ids
    assert (single.is_truncated, pair.is_truncated, short.is_truncated) == (True, True, False)


# -- JSON ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [b"[],", b'{"a":1},', b"1,"])
def test_a_body_with_too_many_values_is_refused_unparsed(monkeypatch: pytest.MonkeyPatch, mark: bytes) -> None:
    def loads(data: bytes, **options: Any) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(endpoint, "loads", loads)

    with pytest.raises(ServingError, match="send at most"):
        endpoint.parse_object(b'{"messages":[' + mark * (endpoint.MAX_MARKS + 1) + b"1]}")


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True, "x,[{:"], "b": {"c": {}, "d": []}},
        {"many": [[]] * 60_000},
        {str(index): index for index in range(60_000)},
        {"text": "[{,:" * 100_000},
    ],
)
def test_many_values_are_read_and_written_as_few_are(value: Any) -> None:
    text = json.dumps(value)

    assert long_json.loads(text) == value
    assert endpoint.parse_object(text.encode()) == value
    assert long_json.dumps(value) == text
    assert long_json.dumps(value, indent=1, ensure_ascii=False) == json.dumps(value, indent=1, ensure_ascii=False)
    assert json.loads(long_json.to_json_in_pieces(value)) == value


def test_many_values_are_never_parsed_or_written_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    in_python: Counter[str] = Counter()
    written: list[int] = []

    def patient(**options: Any) -> json.JSONDecoder:
        in_python["read"] += 1
        return json.JSONDecoder(**options)

    def write(value: Any) -> str:
        written.append(len(json.dumps(value)))
        return json.dumps(value)

    monkeypatch.setattr(long_json, "_PatientDecoder", patient)
    monkeypatch.setattr(long_json, "to_json", write)

    long_json.loads("[" + "[]," * 10_000 + "[]]")
    assert not in_python
    long_json.loads("[" + "[]," * 300_000 + "[]]")
    long_json.to_json_in_pieces({"data": [{"embedding": [0.5] * 100} for _ in range(1000)], "ids": [1] * 100_000})

    assert in_python == {"read": 1}
    assert max(written) < 40_000


def test_a_long_text_is_written_in_pieces() -> None:
    text = '"ü\U0001f600\ud800' * 100_000

    assert json.loads(long_json.to_json_in_pieces({"a": [text]})) == {"a": [text]}


def test_a_conversation_has_a_limit_on_all_its_json() -> None:
    template = TemplateFacts("{{ messages }}{{ tools }}", True, False, frozenset())
    tool = '{"a":[' + "[]," * (chat.MAX_MARKS // 16) + "[]]}"
    message = generation_pb2.Message(role="user", parts=[{"text": "x"}])
    few = generation_pb2.Chat(messages=[message], tools_json=[tool] * 7)
    many = generation_pb2.Chat(messages=[message], tools_json=[tool] * 9)

    assert len(chat.read_chat(few, template, "chat").tools) == 7
    with pytest.raises(ServingError, match=r"chat.tools_json\[7\]: has too many values"):
        chat.read_chat(many, template, "chat")


def test_a_list_that_is_too_long_is_not_looked_at() -> None:
    parts = [generation_pb2.Part(text="x" * 20)] * 257
    message = generation_pb2.Message(role="x" * 5000, parts=parts)
    validator = RequestValidator()

    found = validator.violations(generation_pb2.Chat(messages=[message] * 4097))

    assert [violation.field for violation in found] == ["messages"]


@pytest.mark.parametrize(
    ("fields", "is_long"),
    [
        ({"text": "x" * 100}, False),
        ({"text": "x" * 101}, True),
        ({"token_ids": {"ids": [1] * 100}}, True),  # and the message that they are in
        ({"token_ids": {"ids": [1] * 99}}, False),
        ({"chat": {"messages": [{"parts": [{}] * 100}]}}, True),
        ({"chat": {"messages": [{"parts": [{"text": "x" * 90}]}]}}, False),
        ({"chat": {"tools_json": ["x" * 40] * 3}}, True),
        ({"sampling": {"logit_bias": dict.fromkeys(range(101), 1.0)}}, True),
        ({"sampling": {"logit_bias": {1: 1.0}}}, False),
    ],
)
def test_a_message_is_long_by_what_is_in_it(fields: Any, is_long: bool) -> None:
    assert is_longer(generation_pb2.Generation(**fields), 100) is is_long


# -- memory, and shares ----------------------------------------------------------------------------


async def test_refusals_leave_nothing_behind(harness: Any) -> None:
    """Each with a prompt that would be missed, for several reasons."""
    prompt = {"ids": [40] * 5000}
    requests = [
        generation_pb2.GenerateRequest(generation=generation_pb2.Generation(**fields))
        for fields in (
            {"model": "tiny", "token_ids": {"ids": [40] * 5000 + [4000]}},
            {"model": "nobody's", "token_ids": prompt},
            {"model": "tiny", "text": "\x01" * 140_000},
            {"model": "tiny", "token_ids": prompt, "output": {"logprobs": 21}},
            {"model": "tiny", "token_ids": prompt, "adapter": "none"},
        )
    ]

    async def refuse(times: int) -> int:
        for _ in range(times):
            for request in requests:
                await rejection(harness.stub.Generate(request))
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = await refuse(20)
        after = await refuse(100)
    finally:
        tracemalloc.stop()

    assert after - before < 5 * 20_000  # less than a prompt for each reason


async def test_one_tenant_does_not_take_every_call(harness: Any) -> None:
    running = harness.gateway._calls
    limit = running.max_requests
    held = []
    while running._shares.take("greedy"):
        held.append("greedy")

    with running._counted("other"):
        pass
    with pytest.raises(ServingError, match="of them yours"), running._counted("greedy"):
        pass
    assert limit // 2 < len(held) < limit
    for tenant in held:
        running._shares.give_back(tenant)
    assert running.num_requests == 0


@pytest.mark.parametrize("point", ["", "0."])
def test_numbers_of_thousands_of_digits_are_refused_in_a_long_text(point: str) -> None:
    """The library reads a few thousand of them in a second, with the GIL held."""
    number = point + "9" * 4000
    for text in (f"[{(number + ',') * 100}1]", f"[{(number + ',') * 100}1]".encode()):
        with pytest.raises(ValueError, match="send at most 300"):
            long_json.loads(text)


def test_long_runs_of_digits_in_texts_and_short_numbers_are_no_trouble() -> None:
    value = {"prompt": "3." + "1415926535" * 40_000, "ids": list(range(1000)), "big": int("9" * 300)}
    assert long_json.loads(json.dumps(value)) == value
