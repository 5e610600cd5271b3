"""GenerateStream and Generate: events, numbers, text."""

from __future__ import annotations

from typing import Any

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2


async def test_a_stream_is_started_deltas_finished_completed_with_numbers_without_gaps(harness: Any) -> None:
    call = harness.stream("hello", output={"token_ids": True})
    submit = await harness.scheduler.next_admitted()
    wanted = harness.ids("hello wörld")
    for token_id in wanted:
        harness.scheduler.tokens(submit.handle, [token_id])
    harness.scheduler.tokens(
        submit.handle,
        [0],
        finish=common_pb2.FINISH_REASON_END_OF_SEQUENCE,
        stop_token_id=0,
        usage=common_pb2.Usage(prompt_tokens=3, cached_prompt_tokens=2, output_tokens=len(wanted) + 1),
        timing=common_pb2.Timing(queue_us=1, prefill_us=2, decode_us=3, preemptions=4),
    )

    events = [response.event async for response in call]

    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].WhichOneof("payload") == "started"
    assert [event.WhichOneof("payload") for event in events[-2:]] == ["candidate_finished", "completed"]
    deltas = [event.delta for event in events[1:-2]]
    offset = 0
    for delta in deltas:
        assert delta.token_offset == offset
        assert delta.token_count == len(delta.token_ids) > 0
        offset += delta.token_count
    assert [token for delta in deltas for token in delta.token_ids] == [*wanted, 0]
    assert "".join(delta.text for delta in deltas) == "hello wörld"
    finished, completed = events[-2].candidate_finished, events[-1].completed
    assert finished.finish_reason == common_pb2.FINISH_REASON_END_OF_SEQUENCE
    assert (finished.WhichOneof("matched"), finished.stop_token_id) == ("stop_token_id", 0)
    assert finished.output_tokens == len(wanted) + 1
    assert completed.usage == common_pb2.Usage(prompt_tokens=3, cached_prompt_tokens=2, output_tokens=len(wanted) + 1)
    assert completed.timing == common_pb2.Timing(queue_us=1, prefill_us=2, decode_us=3, preemptions=4)
    assert completed.failovers == 0
    trailers = dict(await call.trailing_metadata())
    assert trailers["x-usage-prompt-tokens"] == "3"
    assert trailers["x-usage-cached-tokens"] == "2"
    assert trailers["x-usage-output-tokens"] == str(len(wanted) + 1)
    assert await harness.scheduler_is_silent()


async def test_nothing_is_sent_before_admission_and_headers_and_started_at_it(harness: Any) -> None:
    call = harness.stream(metadata=(("x-request-id", "req-7"),))
    submit = await harness.scheduler.next("submit")
    harness.scheduler.admit(submit.handle, cached=1)

    headers = dict(await call.initial_metadata())
    started = (await call.read()).event.started

    assert headers["x-request-id"] == started.request_id == submit.request_id == "req-7"
    assert headers["x-model-version"] == started.model_version != ""
    assert headers["x-scheduler-id"] == "sched"
    assert started.model == "tiny"
    assert (started.prompt_tokens, started.cached_prompt_tokens) == (len(submit.prompt_token_ids), 1)


async def test_the_unary_answer_equals_the_concatenated_stream(harness: Any) -> None:
    request = generation_pb2.GenerateRequest(generation=harness.generation(output={"token_ids": True}))
    call = harness.stub.Generate(request)
    submit = await harness.scheduler.next_admitted()
    ids = harness.ids("to be € or not")
    for token_id in ids[:-1]:
        harness.scheduler.tokens(submit.handle, [token_id])
    harness.scheduler.tokens(submit.handle, ids[-1:], finish=common_pb2.FINISH_REASON_MAX_TOKENS)

    answer = await call

    assert answer.started.request_id == submit.request_id
    (candidate,) = answer.candidates
    assert candidate.text == "to be € or not"
    assert list(candidate.token_ids) == ids
    assert candidate.finished.finish_reason == common_pb2.FINISH_REASON_MAX_TOKENS
    assert candidate.finished.WhichOneof("matched") is None
    assert answer.completed.usage.output_tokens == len(ids)


async def test_bad_words_are_sent_as_tokens_with_and_without_a_space_and_echoed_as_they_are(harness: Any) -> None:
    call = harness.stream(sampling={"bad_words": ["  the", "zq", "\n"]}, scheduling={"resume_window_ms": 1000})
    submit = await harness.scheduler.next_admitted()
    started = (await call.read()).event.started

    expected = []
    for text in ("the", "zq", "\n"):
        first, spaced = harness.ids(text), harness.ids(" " + text)
        expected.append(first)
        if len(first) == len(spaced) and first[0] != spaced[0]:
            expected.append(spaced)
    assert [list(word.ids) for word in submit.sampling.bad_words_token_ids] == expected
    assert list(submit.sampling.bad_words) == []
    kept = generation_pb2.Generation.FromString(submit.gateway_state).sampling
    for sampling in (kept, started.effective_sampling):
        assert list(sampling.bad_words) == ["  the", "zq", "\n"]
        assert len(sampling.bad_words_token_ids) == 0


async def test_every_setting_in_force_is_echoed_and_sent(harness: Any) -> None:
    call = harness.stream(
        sampling={"temperature": 0.0, "logit_bias": {5: 1.5}},
        stop={"stop_sequences": ["x"], "stop_token_ids": [9]},
        scheduling={"priority": 3, "bypass_prefix_cache": True},
        metadata=(("traceparent", f"00-{'a' * 32}-{'b' * 16}-01"),),
    )
    submit = await harness.scheduler.next_admitted()
    started = (await call.read()).event.started

    sampling = started.effective_sampling
    assert all(sampling.HasField(f.name) for f in sampling.DESCRIPTOR.fields if f.has_presence)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (0, 1, 0, 1)
    assert dict(sampling.logit_bias) == {5: 1.5}
    assert submit.sampling == sampling
    stop = started.effective_stop
    assert stop.max_new_tokens == 64 - len(submit.prompt_token_ids)  # all the room there is
    assert stop.HasField("min_new_tokens")
    assert stop.HasField("ignore_end_of_sequence")
    assert (list(stop.stop_sequences), list(stop.stop_token_ids)) == (["x"], [9])
    assert list(submit.stop.stop_sequences) == []  # the gateway's business
    assert list(submit.end_of_sequence_ids) == [0]
    assert (submit.candidate_count, submit.priority, submit.bypass_prefix_cache) == (1, 3, True)
    assert submit.traceparent.startswith("00-")


async def test_a_seed_is_kept_or_made_up(harness: Any) -> None:
    harness.stream(sampling={"seed": 0})
    given = await harness.scheduler.next("submit")
    harness.stream()
    harness.stream()
    made = [(await harness.scheduler.next("submit")).sampling.seed for _ in range(2)]

    assert given.sampling.seed == 0
    assert made[0] != made[1]


async def test_ignoring_the_end_of_sequence_sends_no_ids_for_it(harness: Any) -> None:
    harness.stream(stop={"ignore_end_of_sequence": True})

    assert list((await harness.scheduler.next("submit")).end_of_sequence_ids) == []


async def test_cache_salts_differ_as_the_clients_do(harness: Any) -> None:
    salts = []
    for salt in ("", "a", "a", "b"):
        harness.stream(scheduling={"cache_salt": salt})
        salts.append((await harness.scheduler.next("submit")).cache_salt)

    assert salts[1] == salts[2]
    assert len(set(salts)) == 3
    assert all(salts)


async def test_a_chat_becomes_a_prompt_by_the_template(harness: Any) -> None:
    chat = {"messages": [{"role": "user", "parts": [{"text": "he"}, {"text": "llo"}]}]}
    harness.stream(chat=chat)

    submit = await harness.scheduler.next("submit")

    wanted = harness.ids("<|start|>user\nhello<|end|>\n<|start|>assistant\n")
    assert list(submit.prompt_token_ids) == wanted
    assert wanted.count(1) == 2  # the special tokens are tokens, not text


async def test_a_stop_string_ends_the_candidate_at_the_token_that_completes_it(harness: Any) -> None:
    call = harness.stream(stop={"stop_sequences": ["never", "STOP"]}, output={"token_ids": True})
    submit = await harness.scheduler.next_admitted()
    ids = harness.ids("one STOP")
    harness.scheduler.tokens(submit.handle, [*ids, *harness.ids(" two")])

    events = [response.event async for response in call]

    deltas = [event.delta for event in events if event.HasField("delta")]
    assert "".join(delta.text for delta in deltas) == "one "
    assert [token for delta in deltas for token in delta.token_ids] == ids
    finished = events[-2].candidate_finished
    assert finished.finish_reason == common_pb2.FINISH_REASON_STOP_SEQUENCE
    assert finished.stop_sequence == "STOP"
    assert finished.output_tokens == events[-1].completed.usage.output_tokens == len(ids)
    assert (await harness.scheduler.next("cancel")).handle == submit.handle
    assert await harness.scheduler_is_silent()


async def test_a_possible_stop_string_is_held_back_and_released_at_the_end(harness: Any) -> None:
    call = harness.stream(stop={"stop_sequences": ["STOP"], "include_stop_sequence": True})
    submit = await harness.scheduler.next_admitted()
    await call.read()

    harness.scheduler.tokens(submit.handle, harness.ids("a ST"))
    first = (await call.read()).event.delta
    harness.scheduler.send(step_outputs={"finished": [{"handle": submit.handle, "reason": "FINISH_REASON_TIME_LIMIT"}]})
    tail = (await call.read()).event.delta

    assert (first.text, first.token_count) == ("a ", 4)
    assert (tail.text, tail.token_count, tail.token_offset) == ("ST", 0, 4)
    finished = (await call.read()).event.candidate_finished
    assert finished.finish_reason == common_pb2.FINISH_REASON_TIME_LIMIT


async def test_stop_strings_do_not_count_before_min_new_tokens(harness: Any) -> None:
    call = harness.stream(stop={"stop_sequences": ["ab"], "min_new_tokens": 4})
    submit = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(submit.handle, harness.ids("abcabc"))

    events = [response.event async for response in call]

    assert "".join(event.delta.text for event in events) == "abc"
    assert events[-2].candidate_finished.output_tokens == 5


async def test_candidates_have_offsets_of_their_own_and_each_ends_once(harness: Any) -> None:
    call = harness.stream(candidate_count=3, stop={"stop_sequences": ["X"]})
    submit = await harness.scheduler.next_admitted()
    send = harness.scheduler.tokens
    send(submit.handle, harness.ids("aa"), candidate=0)
    send(submit.handle, harness.ids("bX"), candidate=1)
    send(submit.handle, harness.ids("ccc"), candidate=2, finish=common_pb2.FINISH_REASON_MAX_TOKENS)
    cancel = await harness.scheduler.next("cancel")
    send(submit.handle, harness.ids("late"), candidate=1)
    send(submit.handle, harness.ids("a"), candidate=0, finish=common_pb2.FINISH_REASON_MAX_TOKENS)

    events = [response.event async for response in call]

    texts, offsets, ends = ["", "", ""], [0, 0, 0], []
    for event in events:
        if event.HasField("delta"):
            index = event.delta.candidate_index
            assert index not in ends
            assert event.delta.token_offset == offsets[index]
            offsets[index] += event.delta.token_count
            texts[index] += event.delta.text
        if event.HasField("candidate_finished"):
            ends.append(event.candidate_finished.candidate_index)
    assert submit.candidate_count == 3
    assert texts == ["aaa", "b", "ccc"]
    assert sorted(ends) == [0, 1, 2]
    assert (cancel.handle, cancel.candidate_index) == (submit.handle, 1)
    assert events[-1].completed.usage.output_tokens == 3 + 2 + 3
    assert await harness.scheduler_is_silent()


async def test_log_probabilities_go_with_their_tokens_also_past_a_cancelled_request(harness: Any) -> None:
    gone = harness.stream(output={"logprobs": 3})
    gone_submit = await harness.scheduler.next_admitted()
    await gone.read()
    gone.cancel()
    await harness.scheduler.next("cancel")
    plain = harness.stream()
    plain_submit = await harness.scheduler.next_admitted()
    call = harness.stream(output={"logprobs": 2})
    submit = await harness.scheduler.next_admitted()
    a, b = harness.ids("ab")

    harness.scheduler.send(
        step_outputs={
            "handles": [gone_submit.handle, plain_submit.handle, submit.handle],
            "token_counts": [1, 1, 2],
            "token_ids": [9, 9, a, b],
            "logprobs": [-9, -0.5, -1.5],
            "ranks": [9, 1, 2],
            "candidate_token_ids": [9, 9, 9, a, b, b, a],
            "candidate_logprobs": [-9, -9, -9, -0.5, -2, -1.25, -1.5],
        }
    )

    assert (await call.read()).event.HasField("started")
    delta = (await call.read()).event.delta
    assert delta.text == "ab"
    assert delta.logprobs == common_pb2.LogprobColumns(
        chosen=[-0.5, -1.5],
        ranks=[1, 2],
        width=2,
        candidate_token_ids=[a, b, b, a],
        candidate_logprobs=[-0.5, -2, -1.25, -1.5],
    )
    await plain.read()
    assert not (await plain.read()).event.delta.HasField("logprobs")


async def test_the_unary_answer_gathers_log_probabilities(harness: Any) -> None:
    output = {"logprobs": 1, "chosen_logprob": True}
    call = harness.stub.Generate(generation_pb2.GenerateRequest(generation=harness.generation(output=output)))
    submit = await harness.scheduler.next_admitted()
    for index, token_id in enumerate(harness.ids("abc")):
        step: dict[str, Any] = {
            "handles": [submit.handle],
            "token_ids": [token_id],
            "logprobs": [-index],
            "ranks": [1],
            "candidate_token_ids": [token_id],
            "candidate_logprobs": [-index],
        }
        if index == 2:
            step["finished"] = [{"handle": submit.handle, "reason": "FINISH_REASON_MAX_TOKENS"}]
        harness.scheduler.send(step_outputs=step)

    (candidate,) = (await call).candidates

    assert list(candidate.logprobs.chosen) == [0, -1, -2]
    assert list(candidate.logprobs.candidate_token_ids) == harness.ids("abc")
    assert candidate.logprobs.width == 1


async def test_tokens_may_gather_but_the_first_and_the_end_are_not_held_back(harness: Any) -> None:
    call = harness.stream(output={"max_coalesce_ms": 10_000})
    submit = await harness.scheduler.next_admitted()
    await call.read()
    a, b, c = harness.ids("abc")

    harness.scheduler.tokens(submit.handle, [a])
    first = (await call.read()).event.delta
    for token_id in (b, c):
        harness.scheduler.tokens(submit.handle, [token_id])
    harness.scheduler.tokens(submit.handle, [a], finish=common_pb2.FINISH_REASON_MAX_TOKENS)
    rest = (await call.read()).event.delta

    assert first.text == "a"
    assert (rest.text, rest.token_count, rest.token_offset) == ("bca", 3, 1)


async def test_text_can_be_left_out_and_stop_strings_still_work(harness: Any) -> None:
    call = harness.stream(stop={"stop_sequences": ["b"]}, output={"omit_text": True, "token_ids": True})
    submit = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(submit.handle, harness.ids("abc"))

    events = [response.event async for response in call]

    assert "".join(event.delta.text for event in events) == ""
    assert events[-2].candidate_finished.stop_sequence == "b"
    assert events[-2].candidate_finished.output_tokens == 2


async def test_a_continued_output_goes_on_where_it_was(harness: Any) -> None:
    done = harness.ids("one ST")
    call = harness.stream(continue_output={"ids": done}, stop={"stop_sequences": ["STOP"], "max_new_tokens": 20})
    submit = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(submit.handle, harness.ids("AY"), finish=common_pb2.FINISH_REASON_MAX_TOKENS)

    events = [response.event async for response in call]

    delta = events[1].delta
    assert list(submit.continue_token_ids) == done
    assert submit.stop.max_new_tokens == 20
    assert (delta.token_offset, delta.token_count) == (len(done), 2)
    assert delta.text == "STAY"  # the two letters held back before are not lost
    assert events[-2].candidate_finished.output_tokens == len(done) + 2


async def test_progress_is_passed_on_while_no_token_comes(harness: Any) -> None:
    call = harness.stream(output={"progress_interval_ms": 100})
    submit = await harness.scheduler.next_admitted()
    await call.read()

    harness.scheduler.send(
        progress={
            "handles": [submit.handle],
            "phases": [generation_pb2.Progress.PHASE_PREFILL],
            "queue_positions": [0],
            "prefill_tokens_done": [2],
        }
    )

    event = (await call.read()).event
    assert submit.progress_interval_ms == 100
    assert event.progress.phase == generation_pb2.Progress.PHASE_PREFILL
    assert event.progress.prefill_tokens_done == 2
    assert event.sequence_number == 1
