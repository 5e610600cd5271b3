"""How the rows of a step choose among the experts of a mixture. Needs neither torch nor Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Routing:
    """What is said of a choice besides its logits; what nothing is said of is as in Mixtral.

    scores             of a row's logits: their softmax, or the sigmoid of each
    num_groups         of neighbouring experts, as many in each; above 1 only experts of the best groups are chosen
    num_chosen_groups  groups that a row may choose from
    num_best           how many of a group's highest scores make, summed, the group's own
    scale              what the weights of chosen experts are multiplied by
    has_shared_gate    whether shared experts are weighed by the sigmoid of a row's last logit, else by 1

    With groups, or with a bias that is added to scores for the choice alone, experts are chosen by their scores.
    """

    scores: Literal["softmax", "sigmoid"] = "softmax"
    num_groups: int = 1
    num_chosen_groups: int = 1
    num_best: int = 2
    scale: float = 1.0
    has_shared_gate: bool = True


PLAIN_ROUTING = Routing()
