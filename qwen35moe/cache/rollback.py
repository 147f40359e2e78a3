"""Taking back the last tokens of a Gated DeltaNet layer, exactly.

A memory matrix cannot be cut off like a row of keys: every token has changed all of it. So the layer keeps a state from
before its last tokens and what those tokens brought, and rolls back by running the kept ones again. Per token that is the
convolution's input and the rule's key, value and gates (28 KiB at 35B shapes); a memory after every token would be 2 MiB.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from qwen35moe import ops

_SLACK = 64  # tokens kept beyond the ones asked for, so that the base moves in chunks and not at every token


@dataclass
class Segment:
    """What some tokens brought to a layer: qkv [B, T, C] before the convolution, key [B, T, G, K], value [B, T, H, V],
    decay and beta [B, T, H], valid [B, T] (False where there is no token)."""

    qkv: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor
    beta: Tensor
    valid: Tensor

    def columns(self, start: int, end: int | None = None) -> Segment:
        return Segment(*(getattr(self, f.name)[:, start:end] for f in fields(self)))

    def rows(self, index: Tensor) -> Segment:
        return Segment(*(getattr(self, f.name).index_select(0, index) for f in fields(self)))

    def then(self, other: Segment) -> Segment:
        return Segment(*(torch.cat([getattr(self, f.name), getattr(other, f.name)], dim=1) for f in fields(self)))


@dataclass
class RollbackLog:
    """A state (inputs [B, C, W-1], memory [B, H, K, V]) and the tokens since."""

    conv_state: Tensor
    recurrent_state: Tensor
    since: Segment

    def available(self) -> Tensor:
        """[B]: how many tokens of each row can be taken back."""
        return self.since.valid.sum(1)

    def extended(self, segment: Segment, record: int) -> RollbackLog:
        """With the tokens of `segment` behind, and the base moved up to where `record` of them stay recorded."""
        longer = RollbackLog(self.conv_state, self.recurrent_state, self.since.then(segment))
        if longer.since.valid.shape[1] <= 2 * record + _SLACK:
            return longer
        after = longer.since.valid.flip(1).cumsum(1).amin(0)  # tokens that every row has in its last 1, 2, ... columns
        enough = int((after < record).sum()) + 1
        cut = longer.since.valid.shape[1] - enough
        if cut <= 0:
            return longer
        before = RollbackLog(self.conv_state, self.recurrent_state, longer.since.columns(0, cut))
        conv_state, recurrent_state = before.state()
        return RollbackLog(conv_state, recurrent_state, longer.since.columns(cut))

    def state(self, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The layer's state after the first `keep` [B] of the recorded tokens; after all of them when None."""
        since, valid = self.since, self.since.valid
        if keep is not None:
            valid = valid & (valid.cumsum(1) <= keep[:, None])
        written = valid[..., None]
        _, recurrent_state = ops.gated_delta_rule(
            since.key, since.key, since.value, decay=torch.where(written, since.decay, 0),
            beta=torch.where(written, since.beta, 0), state=self.recurrent_state,
        )
        past = self.conv_state.shape[-1]
        conv_state = torch.cat([self.conv_state.mT.to(since.qkv.dtype), since.qkv], dim=1)
        seen = torch.cat([valid.new_ones(valid.shape[0], past), valid], dim=1)
        last = seen.to(torch.int8).argsort(dim=1, stable=True)[:, seen.shape[1] - past :]
        return conv_state.gather(1, last[..., None].expand(-1, -1, conv_state.shape[-1])).mT, recurrent_state

    def kept(self, keep: Tensor) -> RollbackLog:
        """The recording itself after a rollback to the first `keep` [B] tokens."""
        since = self.since
        valid = since.valid & (since.valid.cumsum(1) <= keep[:, None])
        return RollbackLog(self.conv_state, self.recurrent_state, replace(since, valid=valid))

    def reordered(self, index: Tensor) -> RollbackLog:
        conv_state, recurrent_state = (x.index_select(0, index) for x in (self.conv_state, self.recurrent_state))
        return RollbackLog(conv_state, recurrent_state, self.since.rows(index))
