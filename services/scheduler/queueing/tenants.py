"""Quotas and weights of tenants that may change while a scheduler runs: a file that is followed.

    default: {max_requests: 64, tokens_per_s: 20000}
    tenants:
      acme: {weight: 2, max_requests: 8}

What the file does not say is as the scheduler's own settings have it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import yaml

from octavo.services.scheduler.config import Quota, SchedulerConfig

MAX_TENANTS = 10_000
MAX_WEIGHT = 1e6
MAX_RATE = 1e12


@dataclass(frozen=True)
class Tenants:
    """What tenants may use: those without a quota of their own `default`, those without a weight 1."""

    default: Quota
    quotas: dict[str, Quota] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, config: SchedulerConfig) -> Tenants:
        """Return what the settings say."""
        return cls(config.default_quota(), config.quotas(), config.weights())

    def with_tenant(self, tenant: str, quota: Quota, weight: float) -> Tenants:
        """Return the same with other limits of one tenant."""
        return replace(
            self, quotas={**self.quotas, tenant: quota}, weights={**self.weights, tenant: checked_weight(weight)}
        )


def parse_tenants(data: bytes, base: Tenants) -> Tenants:
    """Return what a file says, on top of `base`. Raises ValueError, with one line that says what is wrong."""
    try:
        content = yaml.safe_load(data) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {' '.join(str(error).split())}") from None
    known = _mapping(content, "the file", ("default", "tenants"))
    default = _quota(_mapping(known.get("default") or {}, "default", ("max_requests", "tokens_per_s")), base.default)
    named = known.get("tenants") or {}
    if not isinstance(named, dict) or len(named) > MAX_TENANTS:
        raise ValueError(f"tenants must be a mapping of at most {MAX_TENANTS} names")
    quotas, weights = dict(base.quotas), dict(base.weights)
    for name, limits in named.items():
        given = _mapping(limits or {}, f"tenants: {name}", ("max_requests", "tokens_per_s", "weight"))
        if "max_requests" in given or "tokens_per_s" in given:
            quotas[str(name)] = _quota(given, quotas.get(str(name), default))
        if "weight" in given:
            weights[str(name)] = checked_weight(_number(given, "weight", 1.0))
    return Tenants(default, quotas, weights)


def checked_weight(weight: float) -> float:
    """Return a weight. Raises ValueError if it is none."""
    if not 0 < weight < MAX_WEIGHT:
        raise ValueError(f"a weight must lie between 0 and {MAX_WEIGHT:,.0f}, not {weight:g}")
    return weight


def checked_quota(max_requests: float, tokens_per_s: float) -> Quota:
    """Return a quota. Raises ValueError if it is none."""
    if not 0 <= max_requests <= MAX_RATE or max_requests != int(max_requests):
        raise ValueError(f"max_requests must be a whole number that is not negative, not {max_requests:g}")
    if not 0 <= tokens_per_s < MAX_RATE:
        raise ValueError(f"tokens_per_s must not be negative, not {tokens_per_s:g}; 0 means no limit")
    return Quota(int(max_requests), tokens_per_s)


def _quota(given: dict[str, object], otherwise: Quota) -> Quota:
    return checked_quota(
        _number(given, "max_requests", otherwise.max_requests), _number(given, "tokens_per_s", otherwise.tokens_per_s)
    )


def _number(given: dict[str, object], key: str, otherwise: float) -> float:
    value = given.get(key, otherwise)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{key} must be a number, not {value!r}")
    return value


def _mapping(value: object, what: str, known: tuple[str, ...]) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a mapping, not {value!r}")
    if others := [str(key) for key in value if key not in known]:
        raise ValueError(f"{what} has {others[0]!r}: it may have {', '.join(known)}")
    return value
