"""What the routers chose, as data: captured by one run, replayed or decided in another, counted and drawn.

    out = model(ids, output_routing=True)             out.routing: a Routing
    model(ids, routing=out.routing)                   indices and weights as given
    model(ids, routing=out.routing.indices_only())    indices as given, weights from the live logits, gradient to the router
    model(ids, routing=lambda layer, logits: ...)     (indices, weights) or indices decided by a function
    model(ids, routing=ablate([5], top_k=8))          ... or by one that is ready-made: decisions.py

value.py holds the value and how it is put together, file.py its form on disk, replay.py what a forward call makes of
`routing=`, decisions.py ready-made functions, statistics.py what is counted, plots.py the pictures (needs matplotlib).
"""

from __future__ import annotations

from .forced import ForcedRouting, Intervention
from .interventions import ablate, balance, bias, force, sample
from .statistics import agreement, coactivation, dead_experts, entropy, expert_load, flips, imbalance, margins
from .value import FREE, RouterOutput, Routing

__all__ = [
    "FREE",
    "RouterOutput",
    "Intervention",
    "ForcedRouting",
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
