"""The schedulers of this gateway: which there are, and which one gets a request."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Collection, Iterator, Sequence
from functools import partial

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.adapter_names import AdapterNames
from octavo.services.common.tls_files import TlsFiles
from octavo.services.gateway.offload.watched_tasks import WatchedTasks
from octavo.services.gateway.schedulers.addresses import AddressBook
from octavo.services.gateway.schedulers.link import WATCH_S, LinkState
from octavo.services.gateway.schedulers.peer import PeerOwner, SchedulerPeer
from octavo.services.gateway.schedulers.prefix_index import prompt_block_hashes
from octavo.services.gateway.schedulers.request_stream import CandidateInbox, RequestStream
from octavo.services.gateway.schedulers.router import Route, Router
from octavo.services.gateway.schedulers.routing import RouteRequest
from octavo.services.gateway.tokenization.model_identity import ModelIdentity

_LOOKUP_S = 5.0
_READ_S = 0.5  # where addresses are in files
_MAX_REMAINING_MS = 2**32 - 1


class SchedulerPeers:
    """Follows the configured names, and keeps a peer for each address. Iterates over all, connected or not."""

    def __init__(
        self, addresses: Sequence[str], gateway_id: str, tls: TlsFiles | None, identity: ModelIdentity | None = None
    ) -> None:
        self._addresses = AddressBook(addresses)
        # Handles start at 1 here: in a process that is started again under its old id they would repeat.
        self._gateway_id = f"{gateway_id}-{secrets.token_hex(8)}"
        self._identity = identity
        self.adapter_names = AdapterNames()
        """What the names of adapters mean, to all gateways of these schedulers."""
        self._tls = tls
        self._router = Router()
        self._by_address: dict[str, SchedulerPeer] = {}
        self._next_handle = 1
        self._connected: list[SchedulerPeer] = []  # as of `_connected_at`, a count of the router's changes
        self._connected_at = -1

    def __iter__(self) -> Iterator[SchedulerPeer]:
        return iter(self._by_address.values())

    def start(self, owner: PeerOwner, tasks: WatchedTasks) -> None:
        """Connect, and stay connected until `close`."""
        self._take_addresses(owner, tasks)
        tasks.start(self._watch())
        if self._addresses.can_change:
            tasks.start(self._look_up(owner, tasks))

    async def close(self) -> None:
        """Disconnect, for good. Nothing happens the second time."""
        while self._by_address:
            _, peer = self._by_address.popitem()
            await peer.close()

    @property
    def connected(self) -> list[SchedulerPeer]:
        """Those that are connected: the same list until one comes or goes, or says something else of its model."""
        if self._connected_at != self._router.num_changes:
            self._connected = [peer for peer in self if peer.connected]
            self._connected_at = self._router.num_changes
        return self._connected

    def count(self, state: LinkState) -> int:
        """Return of how many this is known."""
        return sum(peer.state is state for peer in self)

    @property
    def draining(self) -> bool:
        """Whether every scheduler that is there asked for no new requests."""
        return bool(self.connected) and all(peer.draining for peer in self.connected)

    @property
    def block_sizes(self) -> list[int]:
        """For which block sizes the hashes of a prompt's blocks matter to `choose` now."""
        return self._router.block_sizes

    def choose(
        self, stream: RequestStream, submit: scheduler_pb2.Submit, refused_by: Collection[str] = ()
    ) -> SchedulerPeer | None:
        """Return who gets a request; None if nobody takes it.

        Those that are too small for it do not get it, unless it is to go on and no other can; nor is one asked first.
        A sick scheduler gets it only if all others are.
        """

        def accepts(num_tokens: int, route: Route) -> bool:
            peer = self._by_address.get(route.address)
            if peer is None or peer.route is not route:
                return False  # it is being closed
            versions = ("", stream.model_version) if stream.model_version else (peer.load.model_version,)
            is_free = peer.usable and peer.address not in refused_by and peer.can_hold(num_tokens)
            return is_free and peer.load.model_version in versions

        def is_well(num_tokens: int, route: Route) -> bool:
            return accepts(num_tokens, route) and self._by_address[route.address].healthy

        # The inputs of a request for vectors move one by one, each with a prompt of its own.
        hashes: dict[int, Sequence[int]] = {} if submit.HasField("pooling") else stream.block_hashes

        def block_hashes(size: int) -> Sequence[int]:
            if size not in hashes:
                hashes[size] = prompt_block_hashes(submit, size)
            return hashes[size]

        request = RouteRequest(
            request_id=submit.request_id,
            num_tokens=len(submit.prompt_token_ids) + len(submit.continue_token_ids),
            session_id=stream.session_id,
            remaining_ms=_remaining_ms(stream),
        )
        now = asyncio.get_running_loop().time()
        lengths = [stream.num_wanted]
        if stream.admitted is not None:
            lengths.append(stream.num_longest)  # better cut short than lost
        elif not refused_by:
            lengths.append(0)  # whoever gets it says why not
        for num_tokens in lengths:
            for is_fit in (is_well, accepts):
                route = self._router.choose(request, block_hashes, partial(is_fit, num_tokens), now)
                if route is not None:
                    return self._by_address[route.address]
        return None

    def send(
        self,
        peer: SchedulerPeer,
        stream: RequestStream,
        candidates: Sequence[CandidateInbox],
        submit: scheduler_pb2.Submit,
    ) -> None:
        """Submit candidates of a request to one of these, under a new handle."""
        submit.handle = self.next_handle()
        submit.remaining_ms = _remaining_ms(stream)
        peer.submit(stream, candidates, submit)

    def next_handle(self) -> int:
        """Return a handle that was never used."""
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        return handle

    async def _watch(self) -> None:
        """Look for schedulers that hang: one clock for all."""
        while True:
            await asyncio.sleep(WATCH_S)
            for peer in self:
                peer.watch()

    async def _look_up(self, owner: PeerOwner, tasks: WatchedTasks) -> None:
        """Follow the addresses that names and files stand for."""
        while True:
            await self._addresses.refresh()
            self._take_addresses(owner, tasks)
            await asyncio.sleep(_READ_S if self._addresses.has_files else _LOOKUP_S)

    def _take_addresses(self, owner: PeerOwner, tasks: WatchedTasks) -> None:
        """Connect to new addresses; leave those that are gone once nothing is there."""
        addresses = self._addresses.current
        for address in addresses:
            if address not in self._by_address:
                name = self._addresses.name_of(address)
                peer = self._by_address[address] = SchedulerPeer(
                    address, self._gateway_id, owner, self._router, self._tls, name, self._identity, self.adapter_names
                )
                for task in peer.start():
                    tasks.watch(task)
        for address in [address for address in self._by_address if address not in addresses]:
            if not self._by_address[address].connected:
                tasks.finish(self._by_address.pop(address).close())


def _remaining_ms(stream: RequestStream) -> int:
    if stream.deadline is None:
        return 0
    remaining_s = stream.deadline - asyncio.get_running_loop().time()
    return min(max(1, int(remaining_s * 1000)), _MAX_REMAINING_MS)
