"""Plans become batches, and a plan that breaks the contract is refused before anything is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from octavo.gpu_worker.errors import PlanError
from octavo.gpu_worker.ops import StepInput
from octavo.gpu_worker.steps.batch import LAST_TOKEN, Limits, Slots, Step
from octavo.gpu_worker.steps.host_runner import Tables
from octavo.worker.v1 import worker_pb2

LIMITS = Limits(max_running=4, max_batch_tokens=64, max_blocks_per_sequence=4, num_blocks=10, vocab_size=100)


def column(*values: int) -> bytes:
    return np.array(values, "<u4").tobytes()


def opening(*slots: int) -> list[worker_pb2.SamplingUpdate]:
    return [worker_pb2.SamplingUpdate(slot=slot, top_p=1.0) for slot in slots]


def prompts() -> worker_pb2.StepPlan:
    """Slot 2 computes 3 tokens of 3 and samples, slot 0 the first 18 of more."""
    return worker_pb2.StepPlan(
        step_id=1,
        num_sequences=2,
        num_tokens=21,
        slot_indexes=column(2, 0),
        query_lengths=column(3, 18),
        context_lengths=column(0, 0),
        token_ids=column(*range(50, 71)),
        block_table_rows=column(0, 2),
        block_table_counts=column(2, 1),
        block_ids=column(7, 8, 3),
        sampling_updates=opening(0, 2),
        row_flags=bytes([1, 0]),
    )


def apply(slots: Slots, **fields: Any) -> Step:
    return slots.apply(worker_pb2.StepPlan(**fields))


class Host:
    """Slots, and the tables of the host beside them."""

    def __init__(self, token: int) -> None:
        """Compute `prompts`; slot 2 samples `token`."""
        self.slots = Slots(LIMITS)
        self.tables = Tables(LIMITS.max_running, LIMITS.max_blocks_per_sequence)
        step = self.slots.apply(prompts())
        self.tables.append(step)
        self.tables.record(step.rows.sampled_slots, np.array([token], np.uint32))

    def input(self, **fields: Any) -> StepInput:
        step = apply(self.slots, **fields)
        self.tables.append(step)
        return self.tables.step_input(step)


def after_prompts() -> Slots:
    return Host(42).slots


def test_rows_lie_one_after_the_other_on_their_blocks() -> None:
    step = Slots(LIMITS).apply(prompts())
    tables = Tables(LIMITS.max_running, LIMITS.max_blocks_per_sequence)
    tables.append(step)

    batch = tables.step_input(step)
    assert batch.token_ids.tolist() == list(range(50, 71))
    assert batch.positions.tolist() == [0, 1, 2, *range(18)]
    assert batch.slot_mapping.tolist() == [48, 49, 50, *range(112, 128), 128, 129]
    assert batch.query_start_loc.tolist() == [0, 3, 21]
    assert batch.seq_lens.tolist() == [3, 18]
    assert batch.block_tables.tolist() == [[3, 0, 0, 0], [7, 8, 0, 0]]
    assert batch.logits_rows.tolist() == [2]
    assert step.rows.sampled_slots.tolist() == [2]
    assert step.rows.sampled_follow.tolist() == [False]
    assert step.sampled_positions.tolist() == [3]
    assert [slot for slot, _ in step.opened] == [0, 2]
    assert batch.segments is None
    for array in (value for value in vars(batch).values() if value is not None):
        assert array.dtype == np.int32
        assert array.flags.c_contiguous


def test_tokens_only_the_worker_knows_are_filled_in() -> None:
    host = Host(42)
    fields: dict[str, Any] = {
        "num_sequences": 2,
        "num_tokens": 4,
        "slot_indexes": column(0, 2),
        "query_lengths": column(3, 1),
        "context_lengths": column(18, 3),
        "token_ids": column(91, 92, 93),
        "row_flags": bytes([1, 3]),
    }
    step = apply(host.slots, **fields)
    batch = host.tables.step_input(step)
    assert step.token_ids.tolist() == [91, 92, 93, LAST_TOKEN]
    assert batch.token_ids.tolist() == [91, 92, 93, 42]
    assert batch.positions.tolist() == [18, 19, 20, 3]
    assert step.sampled_positions.tolist() == [21, 4]


def test_a_token_that_was_not_finite_counts_as_token_zero() -> None:
    assert Host(0xFFFFFFFF).input(**continuing()).token_ids.tolist() == [0]


def continuing() -> dict[str, Any]:
    """Slot 2 computes the token it sampled."""
    return {
        "num_sequences": 1,
        "num_tokens": 1,
        "slot_indexes": column(2),
        "query_lengths": column(1),
        "context_lengths": column(3),
        "row_flags": bytes([3]),
    }


def test_a_slot_can_be_freed_and_opened_again_in_one_plan() -> None:
    batch = Host(42).input(
        freed_slots=column(2),
        sampling_updates=opening(2),
        block_table_rows=column(2),
        block_table_counts=column(1),
        block_ids=column(9),
        num_sequences=1,
        num_tokens=2,
        slot_indexes=column(2),
        query_lengths=column(2),
        context_lengths=column(0),
        token_ids=column(1, 2),
        row_flags=bytes([1]),
    )
    assert batch.block_tables.tolist() == [[9, 0, 0, 0]]


def test_blocks_are_appended() -> None:
    host = Host(42)
    host.tables.append(
        apply(host.slots, block_table_rows=column(2, 0), block_table_counts=column(2, 0), block_ids=column(4, 5))
    )
    assert host.input(**continuing()).block_tables.tolist() == [[3, 4, 5, 0]]


def test_a_plan_without_rows_only_changes_slots() -> None:
    step = apply(after_prompts(), freed_slots=column(0, 2), copy_pairs=column(1, 2, 2, 3))
    assert len(step.rows.slots) == len(step.token_ids) == 0
    assert step.copy_pairs.tolist() == [[1, 2], [2, 3]]
    assert len(step.rows.sampled_slots) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"freed_slots": column(4)}, "freed_slots: holds 4, must be below 4"),
        ({"freed_slots": b"123"}, "freed_slots: 3 bytes"),
        ({"sampling_updates": opening(4)}, "sampling_updates: slot: holds 4"),
        ({"sampling_updates": opening(1, 1)}, "sampling_updates: slot: names a slot twice"),
        ({"copy_pairs": column(1, 2, 3)}, "copy_pairs"),
        ({"copy_pairs": column(0, 1)}, "block 0"),
        ({"copy_pairs": column(1, 10)}, "copy_pairs: holds 10"),
        ({"block_table_rows": column(2)}, "block_table_counts"),
        ({"block_table_rows": column(2), "block_table_counts": column(2), "block_ids": column(1)}, "2 blocks"),
        (
            {"block_table_rows": column(2), "block_table_counts": column(0xFFFFFFFF), "block_ids": column(1)},
            "block_table_counts",
        ),
        ({"block_table_rows": column(2), "block_table_counts": column(1), "block_ids": column(0)}, "block 0"),
        ({"block_table_rows": column(2), "block_table_counts": column(1), "block_ids": column(10)}, "holds 10"),
        (
            {"block_table_rows": column(1), "block_table_counts": column(1), "block_ids": column(1)},
            "slot 1 is not open",
        ),
        (
            {"block_table_rows": column(2), "block_table_counts": column(4), "block_ids": column(1, 2, 4, 5)},
            "a slot gets 5 blocks, a sequence holds at most 4",
        ),
        ({**continuing(), "num_sequences": 2}, "slot_indexes: 1 rows, but num_sequences is 2"),
        ({**continuing(), "slot_indexes": column(1)}, "slot 1 is not open"),
        ({**continuing(), "slot_indexes": column(9)}, "slot_indexes: holds 9"),
        ({**continuing(), "query_lengths": column(0), "num_tokens": 0}, "a row has no token"),
        ({**continuing(), "num_tokens": 2}, "num_tokens: is 2"),
        ({**continuing(), "query_lengths": column(0xFFFFFFFF)}, "num_tokens"),
        ({**continuing(), "context_lengths": column(16)}, "slot 2 has 1 blocks"),
        ({**continuing(), "context_lengths": column(0xFFFFFFFF)}, "slot 2 has 1 blocks"),
        ({**continuing(), "row_flags": b""}, "row_flags: 0 rows"),
        ({**continuing(), "row_flags": bytes([4])}, "an unknown bit"),
        ({**continuing(), "token_ids": column(5)}, "token_ids: 1 tokens, expected 0"),
        ({**continuing(), "row_flags": bytes([1])}, "token_ids: 0 tokens, expected 1"),
        ({**continuing(), "slot_indexes": column(0), "context_lengths": column(18)}, "none was sampled"),
        (
            {
                "num_sequences": 2,
                "num_tokens": 2,
                "slot_indexes": column(2, 2),
                "query_lengths": column(1, 1),
                "context_lengths": column(3, 4),
                "token_ids": column(1, 2),
                "row_flags": bytes([0, 0]),
            },
            "names a slot twice",
        ),
    ],
)
def test_a_plan_that_breaks_the_contract_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        apply(after_prompts(), **fields)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bias_token_ids": column(100), "bias_values": bytes(4)}, "bias_token_ids holds 100"),
        ({"allowed_token_ids": column(7, 100)}, "allowed_token_ids holds 100"),
        ({"banned_until_min_token_ids": column(100)}, "banned_until_min_token_ids holds 100"),
        ({"history_token_ids": column(3, 100, 5), "prompt_length": 3, "prompt_logprobs": 2}, "history_token_ids"),
        ({"temperature": float("nan"), "chosen_logprob": True, "logprobs": 3}, "temperature is nan"),
        ({}, "token id is not below 100"),
    ],
)
def test_what_is_wrong_with_one_sequence_costs_that_one_alone(wrong: dict[str, Any], message: str) -> None:
    right, plan = Slots(LIMITS).apply(prompts()), prompts()
    plan.sampling_updates[0].MergeFrom(worker_pb2.SamplingUpdate(**wrong))  # slot 0's
    if not wrong:
        plan.token_ids = plan.token_ids[:-4] + column(100)

    slots = Slots(LIMITS)
    step = slots.apply(plan)

    ((slot, problem),) = step.refused
    assert (slot, message in problem) == (0, True), problem
    settings, others = dict(step.opened), dict(right.opened)
    assert vars(settings[2]).keys() == vars(others[2]).keys()
    assert (settings[0].logprobs, settings[0].wants_logprobs) == (wrong.get("logprobs", 0), "logprobs" in wrong)
    assert settings[0].prompt_logprobs == wrong.get("prompt_logprobs", 0)  # it is answered with as many columns
    assert step.token_ids[:3].tolist() == right.token_ids[:3].tolist()
    assert step.token_ids.max() < LIMITS.vocab_size
    assert (step.block_ids.tolist(), step.rows.slots.tolist()) == (right.block_ids.tolist(), [2, 0])
    # Plans that are on their way rely on the rest of this one.
    assert apply(slots, **continuing()).refused == ()


def test_a_step_larger_than_agreed_is_refused() -> None:
    slots = after_prompts()
    apply(slots, block_table_rows=column(0), block_table_counts=column(2), block_ids=column(1, 2))
    apply(slots, sampling_updates=opening(1), block_table_rows=column(1), block_table_counts=column(4),
          block_ids=column(4, 5, 6, 9))  # fmt: skip
    with pytest.raises(PlanError, match="a step holds at most 64"):
        apply(
            slots,
            num_sequences=2,
            num_tokens=65,
            slot_indexes=column(0, 1),
            query_lengths=column(1, 64),
            context_lengths=column(0, 0),
            token_ids=column(*[1] * 65),
            row_flags=bytes([0, 0]),
        )


def decoding(context: int, **fields: Any) -> dict[str, Any]:
    """Slot 2 computes the token it sampled, after `context` others."""
    return {**continuing(), "context_lengths": column(context), **fields}


def test_steps_with_the_same_rows_share_them_and_have_their_own_places() -> None:
    host = Host(42)
    first = apply(host.slots, **decoding(3))
    assert host.tables.step_input(first).slot_mapping.tolist() == [51]
    host.tables.record(first.rows.sampled_slots, np.array([43], np.uint32))

    second = apply(host.slots, **decoding(4))
    batch = host.tables.step_input(second)

    assert second.rows is first.rows
    assert second.rows.sampled_follow.tolist() == [True]
    assert (batch.token_ids.tolist(), batch.positions.tolist(), batch.seq_lens.tolist()) == ([43], [4], [5])
    assert (batch.slot_mapping.tolist(), second.sampled_positions.tolist()) == ([52], [5])


def test_rows_that_go_on_are_on_the_blocks_that_their_slots_got_meanwhile() -> None:
    host = Host(42)
    assert host.input(**decoding(15)).slot_mapping.tolist() == [63]
    with pytest.raises(PlanError, match="slot 2 has 1 blocks, too few"):
        apply(host.slots, **decoding(16))

    growth = {"block_table_rows": column(2), "block_table_counts": column(1), "block_ids": column(9)}
    batch = host.input(**decoding(16, **growth))

    assert batch.block_tables.tolist() == [[3, 9, 0, 0]]
    assert batch.slot_mapping.tolist() == [144]


def test_rows_of_a_slot_that_was_freed_meanwhile_are_refused() -> None:
    host = Host(42)
    host.input(**decoding(3))
    with pytest.raises(PlanError, match="slot 2 is not open"):
        apply(host.slots, **decoding(4, freed_slots=column(2)))


def test_rows_of_a_slot_that_was_opened_again_meanwhile_are_refused() -> None:
    host = Host(42)
    host.input(**decoding(3))
    with pytest.raises(PlanError, match="none was sampled for the slot yet"):
        apply(host.slots, **decoding(0, freed_slots=column(2), sampling_updates=opening(2)))
