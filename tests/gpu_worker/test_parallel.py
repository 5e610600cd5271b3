"""A model split over ranks is the model: gloo on loopback, each rank in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch

from octavo.gpu_worker.devices.reference.device import ReferenceDevice
from octavo.gpu_worker.distributed import collectives
from octavo.gpu_worker.distributed.collectives import Collectives
from octavo.gpu_worker.distributed.parallel import ParallelModel
from octavo.gpu_worker.distributed.rendezvous import new_store, open_store
from octavo.gpu_worker.errors import RankError
from octavo.gpu_worker.loading.loading import load_model
from octavo.gpu_worker.loading.sharding import Sharding

from .paged import MAX_BLOCKS, Paged
from .test_models import load, random_tokens
from .tiny import make_checkpoint

T = TypeVar("T")


def on_ranks(num_ranks: int, folder: Path, run: Callable[[Collectives], T], timeout_s: float = 20) -> list[T]:
    """Return what `run` returns on each of `num_ranks` connected ranks; raise what one raised."""
    place, _ = new_store(f"ipc://{folder}/ranks.sock", num_ranks, timeout_s)
    results: dict[int, T] = {}
    errors: list[Exception] = []

    def one(rank: int) -> None:
        try:
            store = open_store(place, num_ranks, timeout_s)
            results[rank] = run(Collectives(store, rank, num_ranks, "127.0.0.1", timeout_s))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(num_ranks)]


def test_a_rank_on_a_gpu_gives_nccl_the_time_out_of_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the options, which all releases of torch take."""
    made: list[tuple[Any, ...]] = []

    class Options:
        _timeout = timedelta(minutes=10)

    class Nccl:
        def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
            made.append((rank, size, options))

    Nccl.Options = Options  # type: ignore[attr-defined]
    monkeypatch.setattr(collectives.dist, "ProcessGroupNCCL", Nccl, raising=False)
    monkeypatch.setattr(collectives.dist, "PrefixStore", lambda name, store: (name, store))
    group = Collectives.__new__(Collectives)
    group.rank, group.world_size, group._store, group._nccl = 1, 2, None, None
    group._timeout = timedelta(seconds=7)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))

    assert group._group_of(on_gpu) is group._group_of(on_gpu)

    ((rank, size, options),) = made
    assert (rank, size) == (1, 2)
    assert isinstance(options, Options)
    assert options._timeout == timedelta(seconds=7)


def load_part(folder: Path, collectives: Collectives) -> Paged:
    sharding = Sharding(collectives.rank, collectives.world_size)
    loaded = load_model(folder, "auto", 0, lambda *_: None, sharding)
    return Paged(ReferenceDevice(ParallelModel(loaded.model, collectives), 512, 8, MAX_BLOCKS))


# Two key heads: on four ranks each is on two of them. Three ranks have no last piece of the
# vocabulary as long as the others.
@pytest.mark.parametrize(
    ("name", "num_ranks", "settings"),
    [
        ("llama", 2, {}),
        ("llama", 4, {}),
        ("llama_biased", 2, {}),
        ("llama_biased", 4, {}),
        ("qwen2", 2, {}),
        ("qwen2", 4, {"tie_word_embeddings": False}),
        ("qwen3", 4, {"attention_bias": True}),
        ("mistral", 2, {}),
        ("mixtral", 2, {}),
        ("gpt_oss", 2, {}),
        ("granite_moe_shared", 2, {}),
        ("qwen3_moe", 2, {}),
        ("qwen2_moe", 4, {}),
        ("glm4_moe", 2, {}),
        ("ernie4_5_moe", 2, {}),
        ("deepseek_v2", 4, {}),
        ("deepseek_v3", 2, {}),
        ("gemma2", 2, {}),
        ("gemma3", 2, {}),
        ("phi3", 2, {}),
        ("glm4", 2, {}),
        ("ernie4_5", 2, {}),
        ("llama", 3, {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}),
    ],
)
def test_split_logits_are_those_of_one_process(
    name: str, num_ranks: int, settings: dict[str, object], tmp_path: Path
) -> None:
    make_checkpoint(tmp_path, name, **settings)
    token_ids = random_tokens(100)

    def compute(collectives: Collectives) -> torch.Tensor:
        paged = load_part(tmp_path, collectives)
        return paged.compute(paged.new(token_ids), 37)

    first, *others = on_ranks(num_ranks, tmp_path, compute)

    paged = load(tmp_path)
    whole = paged.compute(paged.new(token_ids), 37)
    assert (first - whole).abs().max() < 1e-4
    assert torch.equal(first.argmax(-1), whole.argmax(-1))
    assert all(torch.equal(first, other) for other in others), "ranks would draw different tokens"


def test_a_row_has_the_same_bits_in_any_company_on_four_ranks(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    token_ids = random_tokens(60)

    def compute(collectives: Collectives) -> tuple[torch.Tensor, torch.Tensor]:
        paged = load_part(tmp_path, collectives)
        alone = paged.compute(paged.new(token_ids), 60)
        crowded, other = paged.new(token_ids), paged.new(random_tokens(100, seed=1))
        for count, other_count in ((7, 50), (33, 1), (20, 49)):
            paged.step([(other, other_count), (crowded, count)])
        return alone, torch.stack(crowded.logits)

    for alone, crowded in on_ranks(4, tmp_path, compute):
        assert torch.equal(alone, crowded)


@pytest.mark.parametrize("has_scratch", [False, True])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_sums_are_made_in_the_order_of_the_ranks(num_ranks: int, has_scratch: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    addends = [torch.randn(5, 6, generator=generator) * 10.0 ** (3 * rank) for rank in range(num_ranks)]
    total = addends[0].clone()
    for addend in addends[1:]:
        total += addend

    def run(ranks: Collectives) -> tuple[torch.Tensor, torch.Tensor]:
        x = addends[ranks.rank].clone()
        return x, ranks.all_reduce(x, torch.empty_like(x) if has_scratch else None)

    for x, found in on_ranks(num_ranks, tmp_path, run):
        assert torch.equal(found, total)
        assert found is x, "the sum is made in place"


def test_columns_are_joined_and_the_least_is_agreed_on(tmp_path: Path) -> None:
    def run(ranks: Collectives) -> tuple[list[list[float]], int]:
        columns = torch.tensor([[0.0, 1.0], [2.0, 3.0]]) + 10 * ranks.rank
        return ranks.join_columns(columns).tolist(), ranks.least(7 - ranks.rank)

    assert on_ranks(3, tmp_path, run) == [([[0, 1, 10, 11, 20, 21], [2, 3, 12, 13, 22, 23]], 5)] * 3


def test_a_rank_that_does_not_come_is_waited_for_only_so_long(tmp_path: Path) -> None:
    def run(ranks: Collectives) -> None:
        if ranks.rank == 0:
            with pytest.raises(RankError, match="gone or hangs"):
                ranks.least(1)

    on_ranks(2, tmp_path, run, timeout_s=0.5)


def test_a_store_over_tcp_listens_at_its_address_only() -> None:
    place, store = new_store("tcp://127.0.0.1:1", 2, 5)
    open_store(place, 2, 5).set("key", "value")
    assert store.get("key") == b"value"
    host, port = place.removeprefix("tcp:").split(":")
    assert host == "127.0.0.1"
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if line.split()[3] == "0A"]
    assert [each for each in listening if int(each.split(":")[1], 16) == int(port)] == [f"0100007F:{int(port):04X}"]
    listening6 = Path("/proc/net/tcp6")
    assert not listening6.exists() or f":{int(port):04X} 0000" not in listening6.read_text()


def test_a_store_that_is_not_there_is_told() -> None:
    with pytest.raises(RankError, match=r"store tcp:127\.0\.0\.1:1 cannot be reached"):
        open_store("tcp:127.0.0.1:1", 2, 1)
