"""A seed names the prompts; no two repeats share one that a cache could answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.services.bench import workloads
from octavo.services.bench.cases import check_case


def test_a_seed_always_draws_the_same_prompts_and_another_draws_others() -> None:
    assert workloads.chat(8, "a") == workloads.chat(8, "a")
    assert workloads.chat(8, "a") != workloads.chat(8, "b")
    assert workloads.prefill(2, "a") == workloads.prefill(2, "a")


def test_more_prompts_than_rows_go_round() -> None:
    assert len(workloads.chat(1000, "a", max_tokens=5)) == 1000


def test_documents_differ_from_their_first_line_on() -> None:
    first, second = workloads.prefill(2, "a")

    assert first.text.splitlines()[0] != second.text.splitlines()[0]
    assert first.max_tokens == 1


def test_prompts_with_a_shared_prefix_share_it_and_nothing_else() -> None:
    prompts = [prompt.text for prompt in workloads.shared_prefix("a")]
    prefixes = {text.rsplit("\n\nQuestion: ", 1)[0] for text in prompts}

    assert len(prefixes) == 1
    assert len(set(prompts)) > 1
    assert prefixes != {prompt.text.rsplit("\n\nQuestion: ", 1)[0] for prompt in workloads.shared_prefix("b")}


@pytest.mark.parametrize("content", ["", "{", '{"text": "a"}\n', '{"prompt": "a", "max_tokens": 0}\n', "[]\n"])
def test_a_file_without_usable_prompts_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)

    with pytest.raises(ValueError, match=r"prompts\.jsonl"):
        workloads.chat(1, "a", path=path)


@pytest.mark.parametrize("case", ["c1", "c32", "r2.5", "offline", "prefill", "prefix"])
def test_a_case_is_known(case: str) -> None:
    check_case(case)


@pytest.mark.parametrize("case", ["", "c0", "c", "r0", "r-1", "latency"])
def test_an_unknown_case_is_refused(case: str) -> None:
    with pytest.raises(ValueError, match="case"):
        check_case(case)
