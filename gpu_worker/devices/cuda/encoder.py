"""An encoder on a GPU: its weights and buffers; it sends steps and launches forward passes. There is no cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from octavo.gpu_worker.devices.cuda.accelerator import Accelerator
from octavo.gpu_worker.devices.cuda.encoder_ops import CudaEncoderOps, EncoderTensors
from octavo.gpu_worker.devices.cuda.model import Limits
from octavo.gpu_worker.devices.cuda.products import padded_rows
from octavo.gpu_worker.devices.cuda.step import Hidden, Staging, aligned
from octavo.gpu_worker.devices.cuda.weights import Buffers, Weights
from octavo.gpu_worker.ops import EncoderModel, Int32Array
from octavo.gpu_worker.steps.batch import Step
from octavo.kernels.configs import attention_config
from octavo.kernels.encoder_attention import encoder_work

Column = npt.NDArray[Any]


class DeviceEncoder:
    """Owner of what a forward pass needs. All of it is allocated when it is made."""

    def __init__(self, model: EncoderModel, limits: Limits, accelerator: Accelerator) -> None:
        """Move the weights and run a step of one token."""
        self._model = model
        is_float32 = model.dtype == torch.float32
        self._attention = attention_config(accelerator.target, "mixed", model.heads.head_dim, is_float32=is_float32)
        with torch.no_grad(), accelerator.computing():
            self.weights = Weights(accelerator.device, model.dtype)
            self._buffers = Buffers(padded_rows(limits.max_batch_tokens), accelerator.device)
            tiles = limits.max_batch_tokens // self._attention.block_m + limits.max_running
            num_words = 3 * limits.max_batch_tokens + 3 * limits.max_running + 2 * tiles
            self._staging = Staging(accelerator, num_words + 32)  # 32: parts begin at multiples of four words
            self._launch_dry()

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, beside the weights."""
        return self._buffers.num_bytes + self._staging.words.nbytes

    def kv_block_bytes(self) -> int:
        """Tell that there is no cache."""
        return 0

    def allocate_kv(self, num_blocks: int) -> Hidden:
        """There is none to allocate."""
        assert num_blocks <= 1, num_blocks
        return self._launch_dry()

    def run(self, step: Step, second_starts: Int32Array) -> Hidden | None:
        """Send a step and launch it; None if it has no rows."""
        if not len(step.rows.slots):
            return None
        lengths = step.rows.query_lengths
        query_start_loc = np.concatenate([[0], step.rows.query_ends]).astype(np.int32)
        positions = np.arange(len(step.token_ids)) - np.repeat(query_start_loc[:-1], lengths)
        segments = positions >= np.repeat(second_starts, lengths)
        return self._launch(step.token_ids, positions, segments, query_start_loc, step.rows.slots, lengths)

    def _launch(
        self,
        token_ids: Column,
        positions: Column,
        segments: Column,
        query_start_loc: Column,
        slots: Column,
        lengths: Column,
    ) -> Hidden:
        work = encoder_work(query_start_loc, self._attention)
        sent = self._send([token_ids, positions, segments, query_start_loc, slots, lengths, work.reshape(-1)])
        tokens, places, kinds, starts, rows, seq_lens, tiles = sent
        tensors = EncoderTensors(tokens, places, kinds, starts, tiles.view(-1, 2))
        ops = CudaEncoderOps(tensors, self.weights, self._buffers, self._attention, self._model.dtype)
        return Hidden(self._model.forward(ops), rows, starts, seq_lens)

    def _send(self, columns: list[Column]) -> list[torch.Tensor]:
        """Copy columns to the device, at once; return them there, int32."""
        words, start, places = self._staging.begin(), 0, []
        for column in columns:
            words[start : start + len(column)] = column
            places.append(slice(start, start + len(column)))
            start += aligned(len(column))
        self._staging.send(start)
        return [self._staging.words[place] for place in places]

    def _launch_dry(self) -> Hidden:
        """Run a step of one padding token: it moves every weight, makes every buffer and compiles every kernel."""
        zero, one = np.zeros(1, np.int32), np.ones(1, np.int32)
        return self._launch(zero, zero, zero.astype(np.bool_), np.array([0, 1], np.int32), -one, one)
