"""Named intermediate values: record them, or replace them.

Module code passes each named value through one call, which returns it unchanged unless a tap is active:

    decay = tap(self, "decay", -self.A_log.exp() * F.softplus(a + self.dt_bias))

Users name a value by the path of its module relative to the text model and the value's own name, as in
"layers.3.linear_attn.decay" (`catalogue()` lists all names). A name may be a glob pattern, in which * also matches dots:

    with taps.record(model, "layers.*.linear_attn.decay") as values:
        model(ids)
    values["layers.0.linear_attn.decay"]                  # [B, T, H], on the autograd graph if the forward was

    with taps.patch(model, {"layers.3.mlp.routed": torch.zeros_like}):
        model(ids)

A tap that no forward of its block has reached is reported in a warning when the block ends.

A tap belongs to the modules of one model, which are looked up when it is made. Patches apply in the order in which they
were opened; recordings read the patched value. `checkpoint_contexts` keeps activation checkpointing exact.
"""

from __future__ import annotations

from .active import note_rows, patched, tap, tapped
from .catalogue import Entry, catalogue
from .checkpointing import checkpoint_contexts
from .patching import Patch, patch
from .recording import Positions, Recording, record

__all__ = [
    "Entry", "Patch", "Positions", "Recording", "catalogue", "checkpoint_contexts", "note_rows", "patch", "patched", "record",
    "tap", "tapped",
]
