"""What can go wrong in a worker that is not a bug."""

from __future__ import annotations


class ModelError(Exception):
    """A model cannot be loaded or held. The message says which file or setting, and what to change."""


class SettingError(Exception):
    """A setting cannot be used. The message says which one, and what to change."""


class DeviceError(Exception):
    """A device is missing, or cannot be used as asked. The message says what to change."""


class PlanError(Exception):
    """A StepPlan, or what it says of one slot, breaks the contract. The message names the field."""


class RankError(Exception):
    """A rank of this process's tensor-parallel group is gone, hangs or does not fit; the group must start anew."""
