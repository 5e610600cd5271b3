"""The revision of the protocol between scheduler and worker that this worker speaks."""

from __future__ import annotations

from typing import Final

PROTOCOL_REVISION: Final = 2

# Tokens in a KV block: a fact that scheduler, worker and kernels share, not a setting.
BLOCK_SIZE: Final = 16

# Stands for a token in a StepResult when the row's logits were not finite.
NOT_FINITE_TOKEN: Final = 0xFFFFFFFF
