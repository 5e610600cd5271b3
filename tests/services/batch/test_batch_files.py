"""Files of requests and of results."""

from __future__ import annotations

import json
import resource
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.services.batch.lines import MAX_LINE_BYTES, Line, read_lines
from octavo.services.batch.results import Answer, ResultFile, ResultsError

GOOD = Answer(200, "r", {"choices": []})


def lines_of(path: Path, *texts: str, **defaults: Any) -> list[Line]:
    path.write_text("\n".join(texts) + "\n")
    return list(read_lines(path, defaults))


def line(index: int, custom_id: str = "") -> Line:
    return Line(index, custom_id or f"line-{index + 1}", "/v1/completions", {}, 0)


@pytest.mark.parametrize(
    ("text", "url", "body"),
    [
        ('"Hello"', "/v1/completions", {"prompt": "Hello"}),
        ('{"prompt": [1, 2]}', "/v1/completions", {"prompt": [1, 2]}),
        ('{"messages": []}', "/v1/chat/completions", {"messages": []}),
        ('{"input": "x"}', "/v1/embeddings", {"input": "x"}),
        ('{"custom_id": "a", "url": "/v1/responses", "body": {"input": "x"}}', "/v1/responses", {"input": "x"}),
        ('{"custom_id": "a", "method": "POST", "body": {"prompt": "x"}}', "/v1/completions", {"prompt": "x"}),
    ],
)
def test_a_request_is_read(tmp_path: Path, text: str, url: str, body: dict[str, Any]) -> None:
    (read,) = lines_of(tmp_path / "in", text)
    assert (read.url, read.body, read.fault) == (url, body, "")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "line 1 is no JSON"),
        ("[1]", "line 1 must be a JSON object or a string"),
        ("{}", "none of the fields body, messages, prompt and input"),
        ('{"body": 1}', "no JSON object"),
        ('{"url": "/v1/files", "body": {}}', "has the url '/v1/files'"),
        ('{"method": "GET", "body": {"prompt": ""}}', "the method 'GET'"),
        ('{"prompt": "x", "stream": true}', "asks for a stream"),
        ("[" * 100_000, "line 1"),
    ],
)
def test_a_line_that_is_no_request_says_why(tmp_path: Path, text: str, fault: str) -> None:
    (read,) = lines_of(tmp_path / "in", text)
    assert fault in read.fault
    assert not read.url


def test_places_defaults_and_empty_lines(tmp_path: Path) -> None:
    found = lines_of(tmp_path / "in", '"a"', "", '{"custom_id": "mine", "prompt": "b", "max_tokens": 1}', max_tokens=7)
    assert [(each.index, each.custom_id, each.body["max_tokens"]) for each in found] == [
        (0, "line-1", 7),
        (2, "mine", 1),
    ]
    assert found[-1].end_offset == (tmp_path / "in").stat().st_size


def test_a_line_that_is_too_long_is_passed_over(tmp_path: Path) -> None:
    found = lines_of(tmp_path / "in", '"' + "x" * (2 * MAX_LINE_BYTES) + '"', '"short"')
    assert "longer than" in found[0].fault
    assert found[1].body == {"prompt": "short"}
    assert found[1].end_offset == (tmp_path / "in").stat().st_size


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        for each in read_lines(Path(file.name), {}):
            assert bool(each.fault) != bool(each.url)


def test_results_outlive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with ResultFile(path) as results:
        results.add(line(3, 'odd "id" \\ é'), GOOD)
        results.add(line(0), Answer(400, "r", {"error": {}}))
        results.add(line(5), Answer(0, "", {"code": "invalid_line", "message": '"status_code": 200,'}))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:70])
    with ResultFile(path) as results:
        assert path.read_bytes() == whole, "a half line is left"
        assert (results.num_done, results.num_failed) == (3, 2)
        assert [results.has(line(index)) for index in (0, 1, 2, 4, 5, 99)] == [True, False, False, False, True, False]
        assert results.has(line(3, 'odd "id" \\ é'))
        results.add(line(1), GOOD)
    assert [json.loads(text)["id"] for text in path.read_text().splitlines()] == [
        f"batch_req_{index}" for index in (3, 0, 5, 1)
    ]


def test_results_of_another_input_are_not_taken(tmp_path: Path) -> None:
    with ResultFile(tmp_path / "out") as results:
        results.add(line(0, "theirs"), GOOD)
        with pytest.raises(ResultsError, match="belongs to another input"):
            results.has(line(0, "mine"))


@pytest.mark.parametrize(
    ("texts", "defaults"),
    [
        (['"b"'], {}),
        (['{"prompt": "a"}'], {"max_tokens": 8}),
        (['{"messages": [{"role": "user", "content": "a"}]}'], {}),
    ],
)
def test_results_of_other_requests_of_the_same_name_are_not_taken(
    tmp_path: Path, texts: list[str], defaults: dict[str, Any]
) -> None:
    """Lines without a custom_id are named after their place alone."""
    (before,) = lines_of(tmp_path / "in", '{"prompt": "a"}')
    with ResultFile(tmp_path / "out") as results:
        results.add(before, GOOD)
    with ResultFile(tmp_path / "out") as results:
        assert results.has(before)
        (changed,) = lines_of(tmp_path / "in", *texts, **defaults)
        assert changed.custom_id == before.custom_id
        with pytest.raises(ResultsError, match="belongs to another input"):
            results.has(changed)


def test_results_of_an_earlier_version_count(tmp_path: Path) -> None:
    (known,) = lines_of(tmp_path / "in", '"a"')
    with ResultFile(tmp_path / "out") as results:
        results.add(line(0), GOOD)  # without a checksum
    with ResultFile(tmp_path / "out") as results:
        assert results.has(known)


@pytest.mark.parametrize("index", ["300000000", "9" * 20])
def test_what_a_number_in_a_result_costs_does_not_depend_on_it(tmp_path: Path, index: str) -> None:
    with ResultFile(tmp_path / "out") as results:
        results.add(line(0), GOOD)
    text = (tmp_path / "out").read_text()
    (tmp_path / "out").write_text(text + text.replace("batch_req_0", f"batch_req_{index}"))
    tracemalloc.start()
    try:
        with ResultFile(tmp_path / "out") as results:
            assert results.num_done == 2
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("is_link", [False, True])
def test_failures_are_tried_again_if_that_is_wanted(tmp_path: Path, is_link: bool) -> None:
    path = tmp_path / "out"
    if is_link:
        (tmp_path / "elsewhere").touch(0o640)
        path.symlink_to(tmp_path / "elsewhere")
    with ResultFile(path) as results:
        results.add(line(0), GOOD)
        results.add(line(1), Answer(429, "r", {"error": {}}))
        results.add(line(2), Answer(0, "", {"message": '"response": {"status_code": 200,'}))
        results.add(line(3), GOOD)
    with ResultFile(path, retry_failed=True) as results:
        assert [results.has(line(index)) for index in range(4)] == [True, False, False, True]
        assert (results.num_done, results.num_failed) == (2, 0)
        with pytest.raises(ResultsError, match="another run"), ResultFile(path):
            pass
        results.add(line(2), GOOD)
    assert [json.loads(text)["id"] for text in path.read_text().splitlines()] == [
        f"batch_req_{index}" for index in (0, 3, 2)
    ]
    assert path.is_symlink() == is_link
    assert {each.name for each in tmp_path.iterdir()} <= {"out", "elsewhere"}


def test_a_file_that_is_something_else_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious\n")
    with pytest.raises(ResultsError, match="something else"), ResultFile(tmp_path / "out"):
        pass
    assert (tmp_path / "out").read_text() == "precious\n"


def test_one_run_writes_a_file(tmp_path: Path) -> None:
    with (
        ResultFile(tmp_path / "out"),
        pytest.raises(ResultsError, match="another run"),
        ResultFile(tmp_path / "out"),
    ):
        pass


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ResultFile(tmp_path / "out") as results:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            with pytest.raises(ResultsError, match="cannot write"):
                results.add(line(0), GOOD)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_stays_full_is_told_in_the_same_words(tmp_path: Path) -> None:
    """Closing the file tries again to write what there was no room for."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(ResultsError, match="cannot write"), ResultFile(tmp_path / "out") as results:  # noqa: PT012
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
            results.add(line(0), GOOD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_results_need_a_regular_file() -> None:
    with pytest.raises(ResultsError, match="no regular file"), ResultFile(Path("/dev/full")):
        pass
