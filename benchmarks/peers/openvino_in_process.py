"""Runs cases on OpenVINO GenAI's pipeline, in this process: there is no server of it in its packages.

    PEER/bin/python openvino_in_process.py IR_FOLDER THREADS < work.json > outcomes.json

work.json: {case: {"streams": N (0: all at once), "prefix_cache": bool, "warm_up": [...], "prompts": [...]}},
each prompt {"text", "max_tokens"}. Stands alone: Octavo is not in this environment.
"""

from __future__ import annotations

import json
import sys
import time

import openvino_genai as genai


def pipeline(folder: str, threads: int, prefix_cache: bool) -> genai.ContinuousBatchingPipeline:
    scheduling = genai.SchedulerConfig()
    scheduling.cache_size = 1
    scheduling.max_num_seqs = 64
    scheduling.enable_prefix_caching = prefix_cache
    return genai.ContinuousBatchingPipeline(folder, scheduling, "CPU", {"INFERENCE_NUM_THREADS": threads})


def run(pipe: genai.ContinuousBatchingPipeline, prompts: list[dict], streams: int) -> dict:
    """Keep `streams` requests going (0: all) until all are done."""
    waiting, running, outcomes = list(enumerate(prompts)), {}, []
    started = time.monotonic()
    while waiting or running:
        while waiting and (not streams or len(running) < streams):
            number, prompt = waiting.pop(0)
            config = genai.GenerationConfig()
            config.max_new_tokens = prompt["max_tokens"]
            config.ignore_eos = True
            config.do_sample = False
            outcome = {"started_at": time.monotonic(), "arrivals": [], "prompt_tokens": 0, "output_tokens": 0}
            ids = pipe.get_tokenizer().encode(prompt["text"]).input_ids
            outcome["prompt_tokens"] = ids.shape[1]
            running[number] = (pipe.add_request(number, ids, config), outcome, prompt["max_tokens"])
        pipe.step()
        now = time.monotonic()
        for number, (handle, outcome, max_tokens) in list(running.items()):
            while handle.can_read():
                for output in handle.read().values():
                    outcome["arrivals"].append(now)
                    outcome["output_tokens"] += len(output.generated_ids)
            if outcome["output_tokens"] >= max_tokens:
                outcome["ended_at"] = now
                outcomes.append(outcome)
                del running[number]
    return {"seconds": time.monotonic() - started, "outcomes": outcomes}


def main() -> None:
    folder, threads = sys.argv[1], int(sys.argv[2])
    work = json.load(sys.stdin)
    results, pipes = {}, {}
    for case, job in work.items():
        cached = job["prefix_cache"]
        if cached not in pipes:
            pipes.clear()  # one cache at a time
            pipes[cached] = pipeline(folder, threads, cached)
        run(pipes[cached], job["warm_up"], job["streams"])
        results[case] = run(pipes[cached], job["prompts"], job["streams"])
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
