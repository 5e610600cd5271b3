"""The native encoder kernels as Python sees them: `encoder_abi.h`, mirrored with ctypes. Needs no torch."""

from __future__ import annotations

import ctypes as c
import weakref

import numpy as np
import numpy.typing as npt

from octavo.kernels.cpu.library import Buffer, Norm, declare
from octavo.kernels.cpu.runtime import Arena, Runtime

EMBED_SUM, LAYER_NORM, LINEAR, LINEAR_RESIDUAL, SELF_ATTENTION, HIDDEN, RMS_NORM, ROTATE, GATE, ADD = range(10)
ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}
ALL_TOKENS = 2**31 - 1  # before or behind a token
ROW_MULTIPLE = 32  # rows of buffers, and outputs of linear layers, are padded to this


class Table(c.Structure):
    """OctavoTable."""

    _fields_ = (("data", c.c_void_p), ("num_rows", c.c_int32), ("stride", c.c_int32))


class EncoderOp(c.Structure):
    """OctavoEncoderOp."""

    _fields_ = (
        ("kind", c.c_int32),
        ("input", c.c_int32),
        ("output", c.c_int32),
        ("columns", c.c_int32),
        ("words", Table),
        ("positions", Table),
        ("segments", Table),
        ("norm_weight", c.c_void_p),
        ("norm_bias", c.c_void_p),
        ("norm_eps", c.c_float),
        ("in_features", c.c_int32),
        ("weight", c.c_void_p),
        ("bias", c.c_void_p),
        ("activation", c.c_int32),
        ("num_heads", c.c_int32),
        ("num_kv_heads", c.c_int32),
        ("head_dim", c.c_int32),
        ("scale", c.c_float),
        ("before", c.c_int32),
        ("after", c.c_int32),
        ("cos", c.c_void_p),
        ("sin", c.c_void_p),
        ("rotary_dim", c.c_int32),
        ("max_positions", c.c_int32),
        ("q_norm", Norm),
        ("k_norm", Norm),
    )


class _Info(c.Structure):
    _fields_ = (
        ("ops", c.POINTER(EncoderOp)),
        ("buffers", c.POINTER(Buffer)),
        ("num_ops", c.c_int32),
        ("num_buffers", c.c_int32),
        ("max_batch_tokens", c.c_int32),
    )


class EncoderStep(c.Structure):
    """OctavoEncoderStep."""

    _fields_ = (
        ("token_ids", c.c_void_p),
        ("positions", c.c_void_p),
        ("segments", c.c_void_p),
        ("query_start_loc", c.c_void_p),
        ("logits_rows", c.c_void_p),
        ("num_tokens", c.c_int32),
        ("num_sequences", c.c_int32),
        ("num_rows", c.c_int32),
    )


class EncoderProgram:
    """A recorded encoder over buffers of its own, for steps of at most `max_batch_tokens`."""

    def __init__(self, runtime: Runtime, ops: list[EncoderOp], columns: list[int], max_batch_tokens: int) -> None:
        """Take the ops; their numbers of buffers are indexes into `columns`, the widths of the buffers.

        What the ops point to must stay where it is.
        """
        self._runtime = runtime
        self._memory = Arena(runtime)
        self._library = runtime.library
        declare(self._library, "octavo_encoder_create", c.c_void_p, c.c_void_p, c.POINTER(_Info))
        declare(self._library, "octavo_encoder_destroy", None, c.c_void_p)
        step_arguments = (c.c_void_p, c.POINTER(EncoderStep), c.c_void_p, c.c_char_p, c.c_size_t)
        declare(self._library, "octavo_encoder_run", c.c_int32, *step_arguments)
        strides = [-(-width // ROW_MULTIPLE) * ROW_MULTIPLE for width in columns]
        buffers = (Buffer * len(columns))(
            *(Buffer(self._memory.allocate(4 * stride * max_batch_tokens), stride) for stride in strides)
        )
        info = _Info((EncoderOp * len(ops))(*ops), buffers, len(ops), len(buffers), max_batch_tokens)
        self._handle = self._library.octavo_encoder_create(runtime.pool, info)
        self._release = weakref.finalize(self, self._library.octavo_encoder_destroy, self._handle)
        self._release.atexit = False  # see Runtime

    def run(self, step: EncoderStep, hidden: npt.NDArray[np.float32]) -> None:
        """Run a step into `hidden` [R, columns]. Raises ValueError, before anything is written, on a bad index."""
        error = c.create_string_buffer(256)
        if self._library.octavo_encoder_run(self._handle, step, hidden.ctypes.data, error, len(error)) != 0:
            raise ValueError(error.value.decode())
