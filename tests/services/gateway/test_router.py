"""Which few of many schedulers are looked at, and what is remembered of them."""

from __future__ import annotations

import itertools
import random

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.gateway.schedulers.prefix_index import PrefixHolders, PrefixIndex
from octavo.services.gateway.schedulers.router import COMPARE_ALL, PER_PREFIX, Route, Router
from octavo.services.gateway.schedulers.routing import RouteRequest

MANY = 8 * COMPARE_ALL
PROMPT = list(range(1000, 1020))


def event(event_id: int, **fields: object) -> scheduler_pb2.WatchCacheResponse:
    return scheduler_pb2.WatchCacheResponse(event_id=event_id, **fields)  # type: ignore[arg-type]


def many() -> tuple[Router, list[Route]]:
    router = Router()
    routes = [router.add(str(number)) for number in range(MANY)]
    for route in routes:
        route.open(f"s{route.address}", 16)
        route.take_load(load())
        route.prefixes.apply(event(1, cleared=True))
    return router, routes


def load(**fields: int) -> scheduler_pb2.Load:
    return scheduler_pb2.Load(**{"kv_blocks_free": 1000, "workers_ready": 1, **fields})  # type: ignore[arg-type]


def chosen(router: Router, name: str = "r", asked: list[Route] | None = None) -> Route:
    def accepts(route: Route) -> bool:
        if asked is not None:
            asked.append(route)
        return True

    route = router.choose(RouteRequest(name, 16 * len(PROMPT)), lambda _: PROMPT, accepts, 0.0)
    assert route is not None
    return route


def test_one_of_many_that_has_the_prefix_is_found() -> None:
    router, routes = many()
    routes[100].prefixes.apply(event(2, stored_block_hashes=PROMPT[:5]))
    routes[200].prefixes.apply(event(2, stored_block_hashes=PROMPT[:9]))
    asked: list[Route] = []
    assert chosen(router, asked=asked) is routes[200]
    assert len(asked) <= 3 * PER_PREFIX
    routes[200].prefixes.apply(event(3, removed_block_hashes=PROMPT[:9]))
    assert chosen(router) is routes[100]
    router.remove(routes[100])
    assert chosen(router) is not routes[100]


def test_the_only_idle_one_of_many_is_found() -> None:
    router, routes = many()
    for number, route in enumerate(routes):
        route.take_load(load(waiting_uncached_tokens=0 if number == 77 else 10_000))
    assert {chosen(router, f"r{number}") for number in range(20)} == {routes[77]}


def test_where_nobody_who_is_looked_at_may_take_it_all_are_asked() -> None:
    router, routes = many()
    for route in routes[1:]:
        route.refused_until = 10.0
    assert {chosen(router, f"r{number}") for number in range(20)} == {routes[0]}


def settle(holders: PrefixHolders) -> None:
    while holders.settle_some():
        pass


def test_too_many_names_are_thinned_out_and_the_rest_still_finds_prefixes() -> None:
    rng = random.Random(0)
    holders = PrefixHolders(max_names=4000)
    indexes = [PrefixIndex(holders) for _ in range(10)]
    prompts = [[rng.getrandbits(64) for _ in range(1500)] for _ in indexes]
    for index, names in zip(indexes, prompts, strict=True):
        index.apply(event(1, cleared=True, stored_block_hashes=names))
        settle(holders)
        assert holders.num_names <= 4000
    assert holders.num_names > 1000
    for (at, index), (whose, names) in itertools.product(enumerate(indexes), enumerate(prompts)):
        found = index.count_cached(names)
        assert 1400 < found <= 1500 if at == whose else found == 0
    for index in indexes:
        holders.leave(index)
    settle(holders)
    assert holders.num_names == 0


def test_a_session_keeps_its_home_among_many() -> None:
    """Whatever else is looked at for a request, and at whichever gateway."""
    for session in ("a", "b", "c"):
        homes = set()
        for _ in range(2):
            router, routes = many()
            for number in range(40):
                request = RouteRequest(f"{session}{number}", 16 * len(PROMPT), session)
                route = router.choose(request, lambda _: [], lambda _: True, 0.0)
                assert route is not None
                homes.add(routes.index(route))
        assert len(homes) == 1


def test_a_choice_of_one_does_not_hash_the_prompt() -> None:
    router = Router()
    route = router.add("only")
    route.open("only", 16)
    route.prefixes.apply(event(1, cleared=True, stored_block_hashes=PROMPT))

    def hashes(size: int) -> list[int]:
        raise AssertionError(size)

    assert router.choose(RouteRequest("r", 320), hashes, lambda _: True, 0.0) is route
    assert router.choose(RouteRequest("r", 320), hashes, lambda _: False, 0.0) is None


def test_what_was_sent_is_counted_until_the_scheduler_counts_it_itself() -> None:
    router = Router()
    busy, idle = router.add("busy"), router.add("idle")
    for route in (busy, idle):
        route.open(route.address, 16)
        route.take_load(load())
    busy.sent(num_tokens=5000, num_requests=9)
    assert chosen(router) is idle

    busy.take_load(load())  # it has done all that since
    idle.take_load(load(running=1, waiting_uncached_tokens=100))

    assert chosen(router) is busy


def test_a_scheduler_that_comes_back_is_not_avoided_for_what_it_refused_before() -> None:
    router = Router()
    back, busy = router.add("back"), router.add("busy")
    for route in (back, busy):
        route.open(route.address, 16)
    back.take_load(load())
    busy.take_load(load(running=20, waiting_uncached_tokens=10_000))
    back.refused_until = 60.0
    assert chosen(router) is busy

    back.close()
    back.open("back", 16)

    assert chosen(router) is back
