"""Columns of a step, their places, and their padding to captured sizes: plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.gpu_worker.devices.cuda.accelerator import HostAccelerator
from octavo.gpu_worker.devices.cuda.step import Columns, Layout, Planner, Staging
from octavo.gpu_worker.steps.batch import LAST_TOKEN, Step
from octavo.gpu_worker.steps.rows import Rows
from octavo.kernels.configs import AttentionConfig

CONFIG = AttentionConfig(16, 32, 4, 2, 64)
MAX_TOKENS, MAX_RUNNING, MAX_BLOCKS, MAX_SLOTS = 96, 8, 20, 6


def planner(windows: tuple[int, ...] = (0, 40)) -> Planner:
    return Planner(CONFIG, 8, list(windows), MAX_BLOCKS, MAX_SLOTS)


def make_step(lengths: list[int], contexts: list[int], samples: list[bool] | None = None) -> Step:
    none = np.zeros(0, np.int64)
    return Step(
        freed_slots=none.astype(np.uint32),
        opened=[],
        block_slots=none,
        first_blocks=none,
        block_counts=none,
        block_ids=none.astype(np.uint32),
        copy_pairs=none.astype(np.int32).reshape(-1, 2),
        rows=Rows(
            slots=np.arange(len(lengths))[::-1].copy(),
            query_lengths=np.array(lengths),
            samples=np.array(samples or [True] * len(lengths)),
            follows=np.ones(len(lengths), np.bool_),
        ),
        context_lengths=np.array(contexts),
        token_ids=np.full(sum(lengths), LAST_TOKEN, np.int32),
    )


def test_a_mixed_step_keeps_its_sizes() -> None:
    columns = planner().columns(make_step([1, 30, 2], [50, 10, 0], [True, False, True]))

    assert (columns.sizes.num_rows, columns.sizes.num_tokens, columns.sizes.num_samples) == (3, 33, 2)
    assert columns.query_start_loc.tolist() == [0, 1, 31, 33]
    assert columns.seq_lens.tolist() == [51, 40, 2]
    assert columns.logits_rows.tolist() == [0, 32]
    assert columns.sampled_slots.tolist() == [2, 0]
    assert columns.sampled_positions.tolist() == [51, 2]
    assert not planner().fits(columns, 8)


def test_padding_is_rows_of_no_slot_and_work_of_no_sequence() -> None:
    plan = planner()
    columns = plan.columns(make_step([1, 1, 1], [150, 3, 70]))
    assert plan.fits(columns, 4)

    padded = plan.pad(columns, 4)

    assert padded.sizes == plan.graph_sizes(4)
    assert padded.slots.tolist() == [2, 1, 0, -1]
    assert padded.sampled_slots.tolist() == [2, 1, 0, -1]
    assert padded.query_start_loc.tolist() == [0, 1, 2, 3, 4]
    assert padded.logits_rows.tolist() == [0, 1, 2, 3]
    assert padded.seq_lens.tolist() == [151, 4, 71, 1]
    for (whole,), (exact,) in zip(padded.attention, columns.attention, strict=True):
        count = len(exact.work)
        np.testing.assert_array_equal(whole.work[:count], exact.work)
        assert (whole.work[count:, 0] == -1).all()
        assert (whole.combines[len(exact.combines) :, 0] == -1).all()


def test_a_step_with_more_partial_results_than_a_graph_has_room_for_does_not_fit() -> None:
    plan = planner(windows=(0,))
    columns = plan.columns(make_step([1] * 4, [300] * 4))  # five pieces each, six slots in all
    assert len(columns.sizes.attention[0][1]) == 4
    assert not plan.fits(columns, 4)
    assert plan.fits(plan.columns(make_step([1], [300])), 4)


def test_a_captured_step_of_padding_has_no_work() -> None:
    columns = planner().padding(8)
    assert columns.sizes == planner().graph_sizes(8)
    assert (columns.slots == -1).all()
    assert all((plan.work[:, 0] == -1).all() for (plan,) in columns.attention)


def send(columns: Columns) -> list[torch.Tensor]:
    layout = Layout(columns.sizes)
    staging = Staging(HostAccelerator(), layout.end)
    layout.fill(staging.begin(), columns)
    staging.send(layout.end)
    return layout.views(staging.words)


def test_every_column_arrives_at_a_place_of_its_own_that_is_aligned() -> None:
    columns = planner().columns(make_step([1, 30, 2], [150, 10, 0], [True, False, True]))

    views = send(columns)

    assert len(views) == len(columns.parts())
    for view, part in zip(views, columns.parts(), strict=True):
        np.testing.assert_array_equal(view.numpy(), part)
        assert view.storage_offset() % 4 == 0


@pytest.mark.parametrize("seed", range(20))
def test_no_step_needs_more_words_than_are_kept(seed: int) -> None:
    random = np.random.default_rng(seed)
    count = int(random.integers(1, MAX_RUNNING + 1))
    lengths = random.multinomial(MAX_TOKENS - count, [1 / count] * count) + 1
    contexts = [int(random.integers(0, MAX_BLOCKS * 16 - length + 1)) for length in lengths]
    plan = planner()
    most = plan.max_words(MAX_TOKENS, MAX_RUNNING)

    assert Layout(plan.columns(make_step(lengths.tolist(), contexts)).sizes).end <= most
    assert Layout(plan.graph_sizes(MAX_RUNNING)).end <= most
