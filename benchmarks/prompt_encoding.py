"""What it takes to turn prompts into tokens, as the tokenizer does it and as the gateway: prompt_encoding.py.

The prompts are those of benchmark cases, with the demo model's tokenizer: 32 that begin with the same 1,024 tokens, 128
of a chat, and documents. Either way in turn, the gateway's with nothing remembered at first; processor
time, medians of as many rounds as --rounds says.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from octavo.services.bench import cases
from octavo.services.cli import demo_model
from octavo.services.gateway.tokenization.chunk_encoder import ChunkEncoder
from octavo.services.gateway.tokenization.model_files import read_model


def main() -> None:
    """Measure and print a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    tokenizer = read_model(demo_model.fetch(demo_model.cache_dir(), lambda *_: None)).tokenizer
    print("| case | prompts | tokens | tokenizer ms | gateway ms | ratio |\n" + "| --- " * 6 + "|")
    for case in ("prefix", "c32", "prefill"):
        whole_ms, chunks_ms = [], []
        for number in range(rounds):
            texts = [prompt.text for prompt in cases.work(case, number, cases.Plan())[0]]
            whole, ms = timed(texts, lambda text: tokenizer.encode(text).ids)
            whole_ms.append(ms)
            encoder = ChunkEncoder(tokenizer)
            in_chunks, ms = timed(texts, lambda text, encoder=encoder: encoder.encode(text, True, ""))  # type: ignore[misc]
            chunks_ms.append(ms)
            assert whole == in_chunks
        before, after = statistics.median(whole_ms), statistics.median(chunks_ms)
        cells = case, len(texts), f"{sum(map(len, whole)):,}", f"{before:.1f}", f"{after:.1f}", f"{before / after:.1f}"
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def timed(texts: list[str], encode: Callable[[str], list[int]]) -> tuple[list[list[int]], float]:
    """Return the tokens of texts, and the milliseconds that they took."""
    started = time.process_time()
    token_ids = [encode(text) for text in texts]
    return token_ids, (time.process_time() - started) * 1e3


if __name__ == "__main__":
    main()
