"""Time one choice between schedulers, as a gateway makes it: python benchmarks/routing_decision.py.

Prints the median in microseconds, once with the shortlist and once with every scheduler compared. Prompts have 60
blocks, of which a tenth of the schedulers has the first 40 cached; hashing the prompt is not in it.
"""

from __future__ import annotations

import random
import statistics
import time

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.gateway.schedulers import router as routing
from octavo.services.gateway.schedulers.routing import RouteRequest


def main() -> None:
    """Print a line for each number of schedulers."""
    shortlisted = routing.COMPARE_ALL
    for count in (32, 100, 1000):
        rng = random.Random(0)
        prefixes = [[rng.getrandbits(64) for _ in range(40)] for _ in range(200)]
        router = routing.Router()
        for number in range(count):
            route = router.add(str(number))
            route.open(f"scheduler-{number}", 16)
            load = {"running": rng.randrange(30), "waiting_uncached_tokens": rng.randrange(3000)}
            route.take_load(scheduler_pb2.Load(kv_blocks_free=9999, workers_ready=1, **load))
            cached = [name for prefix in rng.sample(prefixes, 20) for name in prefix]
            route.prefixes.apply(scheduler_pb2.WatchCacheResponse(event_id=1, cleared=True, stored_block_hashes=cached))
        medians = []
        for routing.COMPARE_ALL in (shortlisted, count):
            times = []
            for number in range(300):
                prompt = rng.choice(prefixes) + [rng.getrandbits(64) for _ in range(20)]
                request = RouteRequest(f"request-{number}", 16 * len(prompt), session_id=f"session-{number}")
                begun = time.perf_counter()
                router.choose(request, lambda _, prompt=prompt: prompt, lambda _: True, 0.0)
                times.append(1e6 * (time.perf_counter() - begun))
            medians.append(statistics.median(times))
        routing.COMPARE_ALL = shortlisted
        print(f"{count:5} schedulers: {medians[0]:6.0f} us; all compared: {medians[1]:6.0f} us")


if __name__ == "__main__":
    main()
