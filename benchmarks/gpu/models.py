"""Models with random weights of the shapes that matter, made in place on the device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from lab import Lab

from octavo.gpu_worker.loading.loading import LoadedModel, load_model
from octavo.gpu_worker.models.config import ModelConfig, RopeConfig
from octavo.gpu_worker.models.decoder import Decoder, tensor_shapes
from octavo.gpu_worker.ops import Heads


@dataclass(frozen=True)
class Shape:
    """The sizes of a model."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    heads: Heads
    tied: bool

    def weights(self) -> int:
        """Number of weights that a step reads: all but the embedding, of which it reads rows."""
        heads = self.heads
        per_layer = self.hidden_size * (
            (2 * heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim + 3 * self.intermediate_size
        )
        return self.num_layers * per_layer + self.hidden_size * self.vocab_size

    def kv_bytes_per_token(self, element_size: int = 2) -> int:
        """Bytes of cache of a token."""
        return 2 * self.num_layers * self.heads.num_kv_heads * self.heads.head_dim * element_size

    def floor_us(self, batch: int, context: int, ceilings: dict[str, float], *, quantized: bool = False) -> float:
        """Return the least time of a decode step: the larger of bytes / bandwidth and operations / rate.

        quantized  the weights have eight bits, but for those that make the logits
        """
        in_layers = self.weights() - self.hidden_size * self.vocab_size
        num_bytes = 2 * self.weights() - (in_layers if quantized else 0) + batch * context * self.kv_bytes_per_token()
        attention = 4 * self.num_layers * self.heads.num_heads * self.heads.head_dim * context
        flops = batch * (2 * self.weights() + attention)
        return max(num_bytes / ceilings["copy"] / 1e3, flops / ceilings["bf16"] / 1e6)


SMOLLM2 = Shape("SmolLM2-135M", 49152, 576, 1536, 30, Heads(9, 3, 64), tied=True)
LLAMA_8B = Shape("Llama-3-8B", 128256, 4096, 14336, 32, Heads(32, 8, 128), tied=False)
TINY = Shape("tiny", 320, 64, 96, 2, Heads(4, 2, 16), tied=True)


def random_model(lab: Lab, shape: Shape, context: int, dtype: torch.dtype | None = None) -> LoadedModel:
    """Return a model of `shape` whose weights never were in the host's memory."""
    torch.manual_seed(0)
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_layers=shape.num_layers,
        heads=shape.heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        activation="silu",
        rope=RopeConfig("default", 1e5, shape.heads.head_dim),
        windows=(0,) * shape.num_layers,
        tie_word_embeddings=shape.tied,
    )
    tensors = {}
    for name, size in tensor_shapes(config):
        tensor = torch.empty(size, device=lab.device, dtype=dtype or lab.dtype)
        tensors[name] = tensor.fill_(1.0) if name.endswith("norm.weight") else tensor.normal_(std=size[-1] ** -0.5)
    return LoadedModel(Decoder(config, tensors, context), "LlamaForCausalLM", context, shape.name)


def loaded_model(path: Path) -> LoadedModel:
    """Load a model as a worker does."""
    return load_model(path, "auto", 0, lambda *_: None)
