"""Generate calls, whichever listener they came in by: counted, admitted by the scheduler, ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial

from google.protobuf.message import Message

from octavo.inference.v1 import generation_pb2
from octavo.services.common.errors import Reason, ServingError, invalid_field
from octavo.services.gateway.mesh import MeshHeaders
from octavo.services.gateway.offload.shares import Shares
from octavo.services.gateway.requests.accounting import Accounting, Call, CallRecord
from octavo.services.gateway.requests.generation import GenerationRun, Prepared
from octavo.services.gateway.requests.model import Models
from octavo.services.gateway.requests.prepare import check_headers, prepare
from octavo.services.gateway.schedulers.pool import SchedulerPool
from octavo.services.gateway.schedulers.prefix_index import prompt_block_hashes
from octavo.services.gateway.schedulers.request_stream import RequestStream
from octavo.services.gateway.schedulers.resume_token import ResumeToken, ResumeTokens
from octavo.services.gateway.tokenization.tokenizer import INLINE_CHARS, INLINE_TOKENS
from octavo.services.gateway.validation import RequestValidator, is_longer


class GenerateCalls:
    """All generate calls of this gateway."""

    def __init__(
        self,
        models: Models,
        schedulers: SchedulerPool,
        tokens: ResumeTokens,
        validator: RequestValidator,
        accounting: Accounting,
        mesh: MeshHeaders,
        max_requests: int,
    ) -> None:
        self._models = models
        self.long_work = models.long_work
        """The threads for long requests."""
        self.mesh = mesh
        """Of the headers that a mesh sets."""
        self.validator = validator
        """Of the rules of fields."""
        self._accounting = accounting
        self._tokens = tokens
        self._schedulers = schedulers
        self._shares = Shares(max_requests)
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        """New calls are refused."""

    @property
    def max_requests(self) -> int:
        """Most calls at once."""
        return self._shares.num_places

    @property
    def num_requests(self) -> int:
        """Calls that run now."""
        return self._shares.num_taken

    def num_requests_left(self, tenant: str) -> int:
        """Return how many more calls of a tenant would be taken now."""
        return self._shares.left(tenant)

    async def wait_idle(self) -> None:
        """Return when no call runs."""
        await self._idle.wait()

    async def check(self, request: Message, tenant: str) -> None:
        """Check a request against the rules of its fields. Raises INVALID_FIELD."""
        with self.refusals_counted():
            is_long = is_longer(request, INLINE_CHARS)
            await self.long_work.run(tenant, lambda: self.validator.check(request), is_long)

    @contextmanager
    def refusals_counted(self) -> Iterator[None]:
        """Count the ServingError that ends the body: a call that never gets as far as `admitted`."""
        try:
            yield
        except ServingError as error:
            self._accounting.refused(error)
            raise

    @asynccontextmanager
    async def admitted(
        self, generation: generation_pb2.Generation, call: Call, can_resume: bool = False
    ) -> AsyncIterator[GenerationRun]:
        """Submit a request that obeys the rules of its fields, and wait for its admission. Raises ServingError.

        can_resume: the caller streams, and passes on the resume token. Then a request with a resume window goes
            on after the body has failed. Otherwise, however the body ends, the scheduler is told.
        """
        with self.recorded(call, generation.model) as record:
            async with self.attempt(record, generation, can_resume) as run:
                yield run

    @contextmanager
    def recorded(self, call: Call, model: str) -> Iterator[CallRecord]:
        """Count and record a call, in which the body makes one attempt or more; see `admitted`."""
        tenant, model = self.mesh.tenant(call.tenant, call.headers), self.mesh.model(model, call.headers)
        with self._accounting.call(call, tenant, model) as record:
            yield record

    @asynccontextmanager
    async def attempt(
        self, record: CallRecord, generation: generation_pb2.Generation, can_resume: bool = False
    ) -> AsyncIterator[GenerationRun]:
        """Submit the request of a recorded call, and wait for its admission; see `admitted`. Raises ServingError."""
        deadline = record.deadline
        record.run = None
        with self._counted(record.tenant):
            check_headers(generation, record.headers)
            generation = self.mesh.apply(generation, record.headers)
            self._models.of(generation.model)
            self._schedulers.check_in_time(record.tenant, generation.scheduling.priority, deadline)
            workers_limit = self._schedulers.workers_limit
            prepared = await prepare(generation, self._models, workers_limit, record.request_id, record.tenant)
            prepared.submit.traceparent = record.traceparent
            if not can_resume:
                prepared.submit.ClearField("resume_window_ms")
                prepared.submit.ClearField("gateway_state")
            remaining_s = None if deadline is None else deadline - asyncio.get_running_loop().time()
            session_id = generation.scheduling.session_id
            sizes = self._schedulers.block_sizes
            is_long = len(prepared.submit.prompt_token_ids) > INLINE_TOKENS
            name_blocks = partial(prompt_block_hashes, prepared.submit)
            hashes = await self.long_work.run(
                record.tenant, lambda: {size: name_blocks(size) for size in sizes}, is_long and bool(sizes)
            )
            num_output = generation.stop.max_new_tokens
            stream = self._schedulers.submit(prepared.submit, remaining_s, session_id, hashes, num_output)
            async with _closing(stream):
                while stream.admitted is None and stream.error is None:
                    await stream.wait()
                if stream.admitted is None:
                    assert stream.error is not None, "a stream is admitted or fails"
                    raise stream.error
                async with _interruptible(GenerationRun(prepared, stream, self._token(stream))) as record.run:
                    yield record.run

    @asynccontextmanager
    async def resumed(self, request: generation_pb2.ResumeStreamRequest, call: Call) -> AsyncIterator[GenerationRun]:
        """Take over a request whose stream broke, and go on at the request's cursors. Raises ServingError."""
        tenant = self.mesh.tenant(call.tenant, call.headers)
        with self._accounting.call(call, tenant, "") as record, self._counted(tenant):
            record.is_resumed = True
            token = self._tokens.read(request.resume_token, tenant)
            record.request_id = token.request_id
            stream = await self._schedulers.reattach(token)
            async with _closing(stream):
                prepared = await self._prepare_again(stream, tenant)
                record.model = prepared.model.name
                offsets = _offsets(request, token)
                run = GenerationRun(prepared, stream, request.resume_token, offsets)
                async with _interruptible(run) as record.run:
                    yield record.run

    async def _prepare_again(self, stream: RequestStream, tenant: str) -> Prepared:
        """Rebuild what the gateway before had, from what it gave the scheduler to keep."""
        reattached = stream.reattached
        assert reattached is not None, "not reattached"
        generation = generation_pb2.Generation.FromString(reattached.gateway_state)
        workers_limit = self._schedulers.workers_limit
        prepared = await prepare(generation, self._models, workers_limit, stream.submit.request_id, tenant)
        stream.can_move = len(prepared.submit.prompt_token_ids) == reattached.prompt_tokens
        stream.submit = prepared.submit
        prepared.started.prompt_tokens = reattached.prompt_tokens
        return prepared

    def _token(self, stream: RequestStream) -> str:
        """Return what the client can resume with; empty if it asked for no window."""
        submit = stream.submit
        if not submit.resume_window_ms:
            return ""
        return self._tokens.sign(
            ResumeToken(
                request_id=submit.request_id,
                scheduler_id=stream.scheduler_id,
                tenant=submit.tenant,
                candidate_count=submit.candidate_count,
                first_offset=len(submit.continue_token_ids),
                chosen_logprob=submit.chosen_logprob,
                logprobs=submit.logprobs,
            )
        )

    @contextmanager
    def for_vectors(self, call: Call, model: str) -> Iterator[CallRecord]:
        """Count and record a call for vectors, which the body answers. Raises DRAINING, QUEUE_FULL."""
        with self.recorded(call, model) as record, self._counted(record.tenant):
            yield record

    @contextmanager
    def _counted(self, tenant: str) -> Iterator[None]:
        """Be one of the calls that run. Raises DRAINING, QUEUE_FULL."""
        if self.draining:
            raise ServingError(Reason.DRAINING, "the gateway is stopping; try again", retry_after_ms=500)
        if not self._shares.take(tenant):
            own = self._shares.taken(tenant)
            message = f"{self.num_requests} calls are running, {own} of them yours, and this gateway takes"
            message += f" {self.max_requests}, shared among those that call; try again later"
            raise ServingError(Reason.QUEUE_FULL, message, retry_after_ms=1000)
        self._idle.clear()
        try:
            yield
        finally:
            self._shares.give_back(tenant)
            if not self.num_requests:
                self._idle.set()


@asynccontextmanager
async def _closing(stream: RequestStream) -> AsyncIterator[None]:
    """Close a stream; a request with a resume window goes on if the body failed: its client may come back."""
    try:
        yield
    except BaseException:
        stream.close(keep=stream.admitted is not None)
        raise
    stream.close()


@asynccontextmanager
async def _interruptible(run: GenerationRun) -> AsyncIterator[GenerationRun]:
    """Let the pool end the body while it waits for its client. Raises what the stream failed with then."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(None) as limit:
            run.stream.interrupt = lambda: limit.reschedule(loop.time())
            yield run
    except TimeoutError:
        if not limit.expired() or run.stream.error is None:
            raise
        raise run.with_position(run.stream.error) from None
    finally:
        run.stream.interrupt = lambda: None


def _offsets(request: generation_pb2.ResumeStreamRequest, token: ResumeToken) -> dict[int, int]:
    """Return the client's cursors by candidate. Raises INVALID_FIELD."""
    offsets: dict[int, int] = {}
    for number, cursor in enumerate(request.cursors):
        if cursor.candidate_index >= token.candidate_count or cursor.candidate_index in offsets:
            advice = f"the request has {token.candidate_count} candidates; send one cursor for each"
            raise invalid_field(f"cursors[{number}].candidate_index", advice)
        if cursor.next_token_offset < token.first_offset:
            advice = f"offsets of this request start at {token.first_offset}, the length of continue_output"
            raise invalid_field(f"cursors[{number}].next_token_offset", advice)
        offsets[cursor.candidate_index] = cursor.next_token_offset
    return offsets
