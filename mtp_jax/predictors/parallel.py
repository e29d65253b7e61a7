"""Parallel heads (Gloeckle et al. 2024): one transformer layer a token.

With `mtp.markov_rank` the extra heads share a table of the token before, see `markov`.

Legend: B batch, T sequence, D embed, M = 1 + depth, W rows of the window, K drafts.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.config import MtpConfig, TrunkConfig
from mtp_jax.model.block import Block, rematted
from mtp_jax.model.moe import Routing
from mtp_jax.predictors import markov
from mtp_jax.predictors.drafting import Choose, Drafter, Window, take_rows
from mtp_jax.predictors.interface import Given, Kind
from mtp_jax.predictors.weights import (
  Weights,
  empty_caches,
  final_norm,
  layers,
  run_block,
)


class ParallelHeads(nn.Module):
  """n = D + 1 heads, each one transformer layer on the same trunk state.

  Gloeckle et al. 2024, section 2. The next-token head is the first of the n and has its
  own layer. All share the final norm and the unembedding, so that with D = 0 trunk and
  head together are the plain model with one more trunk layer.
  """

  trunk: TrunkConfig
  mtp: MtpConfig

  @nn.compact
  def __call__(self, given: Given) -> tuple[jax.Array, Routing | None]:
    def head(block: nn.Module, x_BTD: jax.Array, _: None):
      head_BTD, _, routing = block(x_BTD, given.positions_BT, given.segment_ids_BT)
      return x_BTD, (head_BTD, routing)

    num_heads = 1 + self.mtp.depth
    _, (heads_MBTD, routing) = nn.scan(
      head,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=num_heads,
      unroll=1 if self.trunk.loops else num_heads,
      metadata_params={nn.PARTITION_NAME: "depths"},
    )(rematted(Block, self.trunk)(self.trunk, name="heads"), given.residual_BTD, None)
    # One head at a time: a leading axis of 1 would sum in another order at D = 0.
    hidden_MBTD = jnp.stack([given.final_norm(head_BTD) for head_BTD in heads_MBTD])
    rank = self.mtp.markov_rank
    return markov.with_previous(self, rank, given, hidden_MBTD), routing


@functools.cache
def _drafter(trunk: TrunkConfig, num_drafts: int, is_markov: bool) -> Drafter:
  """One layer per draft on the trunk's features; its cache never holds a draft."""

  def init(rows: int, slots: int):
    return empty_caches(trunk, num_drafts, rows, slots)

  def catch_up(weights: Weights, caches, window: Window):
    written, last = [], []
    for (head, _), cache in zip(weights.predictors, caches, strict=False):
      x_BWD, cache = run_block(
        trunk, head, window.feature_BWD, window.position_BW, cache
      )
      written.append(cache)
      last.append(take_rows(x_BWD, window.last_B))
    return tuple(written), last

  def propose(weights: Weights, caches, last, window: Window, choose: Choose):
    tables = [table for _, table in weights.predictors[:num_drafts]]
    states = [final_norm(trunk, weights, x_BD) for x_BD in last]
    return caches, markov.draft(
      weights, zip(states, tables, strict=True), window, choose
    )

  return Drafter(num_drafts, True, init, catch_up, propose, feeds_choices=is_markov)


def _unstack(params: dict[str, Any], mtp: MtpConfig) -> list[Any]:
  """Returns the first head, and of each further one its layer and the table's rows."""
  first, *heads = layers(params["heads"], 1 + mtp.depth)
  return [first, *((head, params.get("markov_previous")) for head in heads)]


def _contract(mtp: MtpConfig, tapped: tuple[int, ...]) -> dict[str, Any]:
  del tapped
  return {
    "hidden_source": "trunk residual stream before the final norm",
    "next_token_head": "first parallel head",
  } | markov.contract(mtp)


PARALLEL = Kind(
  module=ParallelHeads,
  reads=("markov_rank",),
  deployed_blocks=1,
  blocks=lambda mtp: 1 + mtp.depth,
  added_layers=lambda mtp: mtp.depth,
  flops=markov.flops,
  unstack=_unstack,
  reads_ahead=markov.reads_ahead,
  drafter=lambda trunk, mtp, num_drafts: _drafter(
    trunk, num_drafts, mtp.markov_rank > 0
  ),
  contract=_contract,
)
