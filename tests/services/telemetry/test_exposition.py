"""What a scraper gets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from prometheus_client.parser import text_string_to_metric_families

from octavo.services.telemetry import catalog, exposition
from octavo.services.telemetry.exposition import MetricsServer, on_loop
from octavo.services.telemetry.store import BoundedNames, Store


@contextmanager
def serving(store: Store, refresh: Callable[[], None] = lambda: None) -> Iterator[str]:
    server = MetricsServer("127.0.0.1:0", {"/metrics": store}, refresh)
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.close()


def scrape(url: str) -> dict[str, float]:
    """Return every sample by its name and labels, as Prometheus' own parser reads them."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        sample.name + "".join(f"[{value}]" for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_scrape_has_what_was_recorded_under_our_name_and_vllms() -> None:
    store = Store((catalog.OUTPUT_TOKENS, catalog.TTFT, catalog.WAITING), model="m")
    store.value(catalog.OUTPUT_TOKENS, "a").add(3)
    store.value(catalog.OUTPUT_TOKENS, "b").add(4)
    store.value(catalog.WAITING).set(7)
    store.histogram(catalog.TTFT, "a").observe(0.05)  # a bound is part of its bucket
    store.histogram(catalog.TTFT, "b").observe(0.06, 2)
    store.histogram(catalog.TTFT, "b").observe(1000.0)
    with serving(store) as url:
        samples = scrape(url)

    assert samples["octavo_output_tokens_total[a]"] == 3
    assert samples["vllm:generation_tokens_total[m]"] == 7
    assert samples["octavo_sequences_waiting"] == samples["vllm:num_requests_waiting[m]"] == 7
    assert samples["octavo_time_to_first_token_seconds_bucket[0.05][a]"] == 1
    assert samples["octavo_time_to_first_token_seconds_bucket[0.05][b]"] == 0
    assert samples["octavo_time_to_first_token_seconds_bucket[0.1][b]"] == 2
    assert samples["octavo_time_to_first_token_seconds_bucket[+Inf][b]"] == 3
    assert samples["vllm:time_to_first_token_seconds_bucket[+Inf][m]"] == 4
    assert samples["vllm:time_to_first_token_seconds_sum[m]"] == pytest.approx(1000.17)


def test_what_nobody_asks_for_is_not_recorded() -> None:
    store = Store((catalog.OUTPUT_TOKENS, catalog.ITL), enabled=False)
    store.value(catalog.OUTPUT_TOKENS, "a").add(3)
    store.histogram(catalog.ITL).observe(1.0)
    assert store.value(catalog.OUTPUT_TOKENS, "a").value == 0
    assert store.value(catalog.OUTPUT_TOKENS, "a") is store.value(catalog.OUTPUT_TOKENS, "b")


def test_names_past_the_limit_share_one_label() -> None:
    label = BoundedNames(2)
    assert [label(name) for name in ("a", "b", "a", "c", "d", "b")] == ["a", "b", "a", "other", "other", "b"]


async def test_gauges_are_read_on_the_event_loop_and_a_loop_that_hangs_is_a_failed_scrape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exposition, "_REFRESH_S", 0.5)
    store = Store((catalog.WAITING, catalog.LOOP_LAG))
    threads: list[threading.Thread] = []

    def refresh() -> None:
        threads.append(threading.current_thread())
        store.value(catalog.WAITING).set(len(threads))

    loop = asyncio.get_running_loop()
    with serving(store, on_loop(loop, store, refresh)) as url:
        samples = await asyncio.to_thread(scrape, url)
        assert samples["octavo_sequences_waiting"] == 1
        assert 0 <= samples["octavo_event_loop_lag_seconds"] < 0.5
        assert threads == [threading.current_thread()]
        with pytest.raises(urllib.error.HTTPError, match="503"):
            scrape(url)  # this blocks the loop


def test_a_client_that_sends_byte_by_byte_keeps_no_other_waiting_and_is_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exposition, "_CLIENT_S", 1.0)
    store = Store((catalog.WAITING,))
    store.value(catalog.WAITING).set(1)
    with serving(store) as url, socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as slow:

        def drip() -> None:
            with contextlib.suppress(OSError):
                for _ in range(1200):
                    slow.send(b"G")
                    time.sleep(0.05)
                is_cut_off.clear()

        is_cut_off = threading.Event()
        is_cut_off.set()
        dripping = threading.Thread(target=drip, daemon=True)
        dripping.start()
        assert scrape(url)["octavo_sequences_waiting"] == 1
        dripping.join(60)
        assert is_cut_off.is_set()


def test_of_too_many_clients_that_send_nothing_the_oldest_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "_CLIENT_S", 600.0)
    monkeypatch.setattr(exposition._Handler, "timeout", 600.0)
    store = Store((catalog.WAITING,))
    store.value(catalog.WAITING).set(1)
    with serving(store) as url, contextlib.ExitStack() as stack:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        silent = [
            stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(exposition._MAX_CLIENTS)
        ]
        assert scrape(url)["octavo_sequences_waiting"] == 1
        assert silent[0].recv(1) == b""


def test_another_path_is_not_found_and_a_client_that_sends_nothing_blocks_no_other_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exposition._Handler, "timeout", 0.1)
    store = Store((catalog.WAITING,))
    store.value(catalog.WAITING).set(1)
    with serving(store) as url:
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{url}/other", timeout=10)
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as silent:
            silent.send(b"GET /metr")
            assert scrape(url)["octavo_sequences_waiting"] == 1
