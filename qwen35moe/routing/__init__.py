"""The experts that the routers choose, as data: recorded by one forward, forced on another, counted and drawn.

    out = model(ids, output_routing=True)             out.routing: a Routing
    model(ids, routing=out.routing)                   these indices and weights
    model(ids, routing=out.routing.indices_only())    these indices, weights from the live logits, gradient to the router
    model(ids, routing=lambda layer, logits: ...)     (indices, weights) or indices returned by a function
    model(ids, routing=ablate([5]))                   ... by a ready-made one

value.py          `Routing` and how sequences are combined
file.py           saving and loading
forced.py         `ForcedRouting`: the argument `routing=` of a forward call
interventions.py  ready-made functions for `routing=`
statistics.py     load, entropy, co-activation, margins, agreement
plots.py          figures of them (needs matplotlib)
"""

from __future__ import annotations

from .forced import ForcedRouting, Intervention
from .interventions import ReadyMade, ablate, balance, bias, force, sample
from .statistics import agreement, coactivation, dead_experts, entropy, expert_load, flips, imbalance, margins
from .value import UNFORCED, RouterOutput, Routing

__all__ = [
    "UNFORCED",
    "ForcedRouting",
    "Intervention",
    "ReadyMade",
    "RouterOutput",
    "Routing",
    "ablate",
    "agreement",
    "balance",
    "bias",
    "coactivation",
    "dead_experts",
    "entropy",
    "expert_load",
    "flips",
    "force",
    "imbalance",
    "margins",
    "sample",
]
