"""Ray Data: every row gets its result, whatever dies."""

from __future__ import annotations

import threading
import time
from typing import Any

import psutil
import pyarrow as pa
import ray

import octavo
import octavo.ray
from octavo.services.cli import demo_model

from .processes import kill_tree, titled

ENGINE: dict[str, Any] = {"device": "cpu", "kv_cache_memory": "256MiB"}
ROWS = 1000
OPTIONS: dict[str, Any] = {"max_new_tokens": 3, "temperature": 0}


def fetch(model: demo_model.DemoModel) -> str:
    return str(demo_model.fetch(demo_model.cache_dir(), lambda what, done, total: None, model))


class Killer(threading.Thread):
    """Kills a worker process that has computed for a while, then an actor with all its processes."""

    def __init__(self, cluster: psutil.Process) -> None:
        super().__init__(daemon=True)
        self._cluster = cluster
        self.killed: list[str] = []

    def run(self) -> None:
        worker = self._busy_worker()
        worker.kill()
        self.killed.append("worker")
        worker = self._busy_worker(other_than=worker.pid)
        (actor,) = [each for each in worker.parents() if "MapWorker" in " ".join(each.cmdline())]
        kill_tree(actor)
        self.killed.append("actor")

    def _busy_worker(self, other_than: int = 0) -> psutil.Process:
        while True:
            for worker in titled("octavo worker", self._cluster):
                try:
                    if worker.pid != other_than and worker.cpu_times().user > 1.5:  # its start takes less
                        return worker
                except psutil.NoSuchProcess:
                    continue
            time.sleep(0.02)


def test_a_killed_worker_and_a_killed_actor_cost_no_row_and_repeat_none(cluster: psutil.Process) -> None:
    model = fetch(demo_model.SMOLLM2)
    prompts = [f"{number} plus one is" for number in range(ROWS)]
    with octavo.LLM(model, **ENGINE) as llm:
        undisturbed = [result.text for result in llm.generate(prompts, **OPTIONS)]
    rows = [{"id": number, "prompt": prompt} for number, prompt in enumerate(prompts)]
    dataset = ray.data.from_items(rows, override_num_blocks=10)
    killer = Killer(cluster)
    killer.start()

    results = octavo.ray.generate(dataset, model, engine_options=ENGINE, **OPTIONS).take_all()

    assert killer.killed == ["worker", "actor"]
    assert [row["id"] for row in results] == list(range(ROWS))
    assert [row["prompt"] for row in results] == prompts
    assert {row["error"] for row in results} == {None}
    assert [row["text"] for row in results] == undisturbed
    assert {row["output_tokens"] for row in results} == {3}


def test_a_row_that_cannot_be_generated_has_its_error_and_the_others_have_their_texts(cluster: psutil.Process) -> None:
    table = {"q": [[1, 2, 3], [49_999_999], None, [4, 5]], "keep": [{"a": 1}, None, {"a": 3}, {"a": 4}]}
    dataset = ray.data.from_arrow(pa.table(table))

    results = octavo.ray.generate(
        dataset, fetch(demo_model.SMOLLM2), column="q", prefix="o_", engine_options=ENGINE, **OPTIONS
    ).take_all()

    assert [row["keep"] for row in results] == table["keep"]
    assert [row["o_output_tokens"] for row in results] == [3, None, None, 3]
    assert [row["o_error"] for row in results][::3] == [None, None]
    assert "49999999" in results[1]["o_error"]
    assert results[2]["o_error"] == "there is no prompt"


def test_vectors_are_those_of_the_llm(cluster: psutil.Process) -> None:
    model = fetch(demo_model.MINILM)
    texts = ["a cat", "a dog", "", "the theory of everything"]
    with octavo.LLM(model, **ENGINE) as llm:
        expected = [list(vector) for vector in llm.embed(texts)]

    dataset = ray.data.from_items([{"text": text} for text in [*texts, None]], override_num_blocks=1)
    results = octavo.ray.embed(dataset, model, engine_options=ENGINE).take_all()

    assert [row["text"] for row in results] == [*texts, None]
    assert [row["embedding"] for row in results[:4]] == expected
    assert (results[4]["embedding"], results[4]["error"]) == (None, "there is no text")
