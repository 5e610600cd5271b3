"""The models a gateway serves, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import model_pb2
from octavo.services.common.errors import Reason, Resource, ServingError, feature_disabled, invalid_field
from octavo.services.common.protocol import API_REVISION
from octavo.services.gateway.constraints.checker import Constraints
from octavo.services.gateway.offload.long_work import LongWork
from octavo.services.gateway.output.formats import NONE
from octavo.services.gateway.requests.adapters import Adapter, Adapters, not_found
from octavo.services.gateway.tokenization.tokenizer import ModelTokenizer

_VECTOR_FEATURES: dict[int, list[str]] = {
    common_pb2.MODEL_TASK_EMBED: ["embed", "rerank", "score"],
    common_pb2.MODEL_TASK_SCORE: ["rerank", "score", "classify"],
    common_pb2.MODEL_TASK_CLASSIFY: ["classify"],
}


@dataclass(frozen=True)
class ServedModel:
    """A model and the names it has."""

    name: str
    aliases: tuple[str, ...]
    tokenizer: ModelTokenizer
    max_model_len: int
    """Most tokens of prompt and output together, before the workers' own limit."""
    tool_call_format: str = NONE
    """How the model writes tool calls: a name in TOOL_CALL_FORMATS, or "none"."""
    reasoning_format: str = NONE
    """What is around its reasoning: a name in REASONING_FORMATS, or "none"."""
    constraints: Constraints | None = None
    """What tries out what outputs must look like; None if that is off."""
    clamps_max_tokens: bool = False
    """More output than fits the context is cut to what does; else it is refused."""

    def context_limit(self, workers_limit: int) -> int:
        """Return the longest context now; `workers_limit` 0 means that it is not known."""
        return min(self.max_model_len, workers_limit) if workers_limit else self.max_model_len

    def version(self, weights_version: str) -> str:
        """Return what changes when the weights or the tokenizer do. `weights_version` comes from the workers."""
        return hashlib.sha256(f"{self.tokenizer.sha256} {weights_version}".encode()).hexdigest()[:16]

    def describe(self, weights_version: str, workers_limit: int, scores_prompts: bool = False) -> model_pb2.Model:
        """Return the model as clients see it."""
        template = self.tokenizer.chat_template
        return model_pb2.Model(
            name=self.name,
            aliases=self.aliases,
            version=self.version(weights_version),
            max_context_tokens=self.context_limit(workers_limit),
            vocab_size=self.tokenizer.vocab_size,
            end_of_sequence_ids=self.tokenizer.end_of_sequence_ids,
            features=self._features(scores_prompts),
            tokenizer_sha256=self.tokenizer.sha256,
            chat_template_sha256=template.sha256 if template else "",
            default_sampling=self.tokenizer.default_sampling,
            api_revision=API_REVISION,
        )

    def _features(self, scores_prompts: bool) -> list[str]:
        if self.tokenizer.vector_files is not None:
            return _VECTOR_FEATURES[self.tokenizer.vector_files.task]
        chat = self.tokenizer.chat_template is not None
        tools = chat and self.tool_call_format != NONE
        reasoning = chat and self.reasoning_format != NONE
        structured = self.constraints is not None
        optional = (
            ("chat", chat),
            ("tools", tools),
            ("reasoning", reasoning),
            ("structured_output", structured),
            ("prompt_logprobs", scores_prompts),
        )
        return ["generate", *(name for name, is_on in optional if is_on), "logprobs", "resume"]


class Models:
    """All models of a gateway."""

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self._by_name: dict[str, ServedModel] = {}
        self.all = tuple(sorted(models, key=lambda model: model.name))
        self.adapters: Adapters | None = None
        """Of the only model; None where it takes none."""
        for model in self.all:
            for name in (model.name, *model.aliases):
                assert name not in self._by_name, f"two models are named {name!r}"
                self._by_name[name] = model

    @property
    def long_work(self) -> LongWork:
        """The threads for long requests, whichever model they are for."""
        return self.all[0].tokenizer.long_work

    def get(self, name: str) -> ServedModel:
        """Return a model by name or alias. Raises MODEL_NOT_FOUND."""
        model = self._by_name.get(name)
        if model is None:
            if self.is_adapter(name):
                message = f"{name!r} is an adapter, and makes text only; name the model"
                raise feature_disabled("adapters", message)
            served = ", ".join(model.name for model in self.all)
            message = f"there is no model {name!r} here; this server has: {served}"
            raise ServingError(Reason.MODEL_NOT_FOUND, message, resource=Resource("model", name))
        return model

    def of(self, name: str) -> ServedModel:
        """Return a model by name or alias, or by that of an adapter of it. Raises MODEL_NOT_FOUND."""
        return self.all[0] if name not in self._by_name and self.is_adapter(name) else self.get(name)

    def is_adapter(self, name: str) -> bool:
        """Return whether a name is an adapter's and not a model's."""
        return self.adapters is not None and name not in self._by_name and self.adapters.knows(name)

    async def adapter_of(self, model: str, adapter: str) -> Adapter | None:
        """Return the adapter that a request names, as its model or apart. Raises ADAPTER_NOT_FOUND, INVALID_FIELD."""
        if self.is_adapter(model):
            if adapter.partition("@")[0] not in ("", model):
                raise invalid_field(
                    "generation.adapter", f"the model {model!r} is another adapter; leave one of them out"
                )
            adapter = adapter or model
        if not adapter:
            return None
        if self.adapters is None:
            raise not_found(adapter)
        return await self.adapters.find(adapter)
