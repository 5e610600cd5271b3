"""Sizes of captured decode steps, and the order in which they are captured."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from octavo.gpu_worker.devices.cuda.graphs import Graphs, common_sizes, graph_sizes


@pytest.mark.parametrize(
    ("max_running", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (20, [1, 2, 4, 8, 16, 20]),
        (300, [1, 2, 4, *range(8, 257, 8), 272, 288, 300]),
        (1000, [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)]),
    ],
)
def test_sizes_are_cut_at_the_most_sequences(max_running: int, sizes: list[int]) -> None:
    assert graph_sizes(max_running) == sizes


@pytest.mark.parametrize("max_running", [1, 3, 8, 64, 256, 512])
def test_common_sizes_hold_the_largest_and_one_and_are_few(max_running: int) -> None:
    sizes = graph_sizes(max_running)
    common = common_sizes(sizes)
    assert {1, sizes[-1]} <= set(common) <= set(sizes)
    assert common == sorted(set(common))
    assert len(common) <= 9


class Capture:
    """Counts what was captured and replayed."""

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.replayed: list[int] = []

    def __call__(self, size: int) -> Callable[[], None]:
        self.captured.append(size)
        return lambda: self.replayed.append(size)


def test_the_common_sizes_come_first_the_rest_when_idle_and_the_largest_before_smaller_ones() -> None:
    capture = Capture()
    sizes = graph_sizes(64)
    graphs = Graphs(sizes, capture)

    graphs.capture_common()
    assert capture.captured == [64, 32, 16, 8, 4, 2, 1]
    while graphs.capture_next():
        pass

    assert capture.captured[7:] == [56, 48, 40, 24]
    assert sorted(capture.captured) == sizes


def test_a_step_takes_the_smallest_captured_size_with_room() -> None:
    capture = Capture()
    graphs = Graphs(graph_sizes(24), capture)
    assert graphs.size_for(1) is None
    graphs.capture_common()  # 24, 8, 4, 2, 1

    assert [graphs.size_for(rows) for rows in (1, 3, 9, 24, 25)] == [1, 4, 24, 24, None]
    graphs.capture_next()
    assert graphs.size_for(9) == 16
    graphs.replay(16)
    assert capture.replayed == [16]
