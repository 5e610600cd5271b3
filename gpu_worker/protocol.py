"""The revision of the protocol between scheduler and worker that this worker speaks."""

from __future__ import annotations

from typing import Final

PROTOCOL_REVISION: Final = 2

# Tokens in a KV block: a fact that scheduler, worker and kernels share, not a setting.
BLOCK_SIZE: Final = 16

# Stand for a token in a StepResult where there is none. See StepResult.token_ids.
NOT_FINITE_TOKEN: Final = 0xFFFFFFFF
NOT_READY_TOKEN: Final = 0xFFFFFFFE
NOTHING_ALLOWED_TOKEN: Final = 0xFFFFFFFD
TOO_COMPLEX_TOKEN: Final = 0xFFFFFFFC
# They are this or above; token ids are below.
FIRST_NO_TOKEN: Final = TOO_COMPLEX_TOKEN

SCHEDULER_STOPS = "the scheduler stops"
"""Reason of a Fenced frame that ends every membership in good order: nothing is wrong with the worker."""
