"""Medusa: one small residual head per extra depth on the state of the trunk.

Cai et al. 2024, arXiv 2401.10774, section 2.1.1: head k is `h_k = h + SiLU(W_k h +
b_k)`, followed by an output matrix of its own, which begins as a copy of the trunk's;
W_k and b_k are 0 at the start, so that every head begins as the next-token head. With
`mtp.unembed` "shared" the heads read the trunk's matrix instead. Trained on a frozen
trunk this is Medusa-1, together with its trunk Medusa-2. With `mtp.markov_rank` the
heads share a table of the token before, see `markov`.

Legend: B batch, T sequence, D embed, V vocab, M = 1 + depth.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import MtpConfig, TrunkConfig
from mtp_jax.kernels.dense import dense
from mtp_jax.model.layers import partitioned
from mtp_jax.model.moe import Routing
from mtp_jax.predictors import markov
from mtp_jax.predictors.interface import Given, Kind
from mtp_jax.predictors.linear import heads_on_one_state, square_flops
from mtp_jax.predictors.weights import layers


def medusa_head(
  hidden_BTD: jax.Array, map_DD: jax.Array, bias_D: jax.Array
) -> jax.Array:
  """Returns the state of one head, `h + SiLU(W h + b)`, for any leading axes."""
  return hidden_BTD + jax.nn.silu(dense(hidden_BTD, map_DD) + bias_D)


class MedusaHeads(nn.Module):
  """One residual layer per extra depth on the trunk's normed state.

  Where heads have output matrices of their own, the loss reads them from the parameter
  `unembed` [depth, embed, vocab]; see `lm.unembeddings`.
  """

  trunk: TrunkConfig
  mtp: MtpConfig

  @nn.compact
  def __call__(self, given: Given) -> tuple[jax.Array, Routing | None]:
    depth, dim = self.mtp.depth, self.trunk.embed_dim
    hidden_BTD = given.final_norm(given.residual_BTD)
    if depth == 0:
      return hidden_BTD[None], None

    def zeros(name: str, *axes: str) -> jax.Array:
      init = partitioned(nn.initializers.zeros, "depths", *axes)
      shape = (depth, *(dim for _ in axes))
      return self.param(name, init, shape).astype(hidden_BTD.dtype)

    kernels, biases = zeros("kernels", "embed", "embed_out"), zeros("biases", "norm")
    if self.mtp.unembed == "own":
      self.param(
        "unembed",
        partitioned(given.copied_unembed, "depths", "embed", "vocab"),
        (depth, *given.unembed_DV.shape),
      )
    heads = [medusa_head(hidden_BTD, kernels[k], biases[k]) for k in range(depth)]
    hidden_MBTD = jnp.stack([hidden_BTD, *heads])
    rank = self.mtp.markov_rank
    return markov.with_previous(self, rank, given, hidden_MBTD), None


def _medusa_head(params: dict[str, jax.Array], hidden_BD: jax.Array) -> jax.Array:
  return medusa_head(hidden_BD, params["kernels"], params["biases"])


def _on_trunk(
  mtp: MtpConfig, unembed_DV: jax.Array, tokens_C: np.ndarray | None
) -> dict[str, jax.Array]:
  del tokens_C
  if mtp.unembed != "own":
    return {}
  return {"unembed": jnp.broadcast_to(unembed_DV, (mtp.depth, *unembed_DV.shape))}


def _unstack(params: dict[str, jax.Array], mtp: MtpConfig) -> list[Any]:
  heads = {name: params[name] for name in ("kernels", "biases")}
  table = {k: x for k, x in params.items() if k == "markov_previous"}
  return [head | table for head in layers(heads, mtp.depth)]


MEDUSA = Kind(
  module=MedusaHeads,
  reads=("unembed", "markov_rank"),
  stacks_unembed=True,
  flops=lambda config: square_flops(config) + markov.flops(config),
  on_trunk=_on_trunk,
  unstack=_unstack,
  reads_ahead=markov.reads_ahead,
  drafter=lambda trunk, mtp, num_drafts: heads_on_one_state(
    trunk, num_drafts, _medusa_head, mtp.markov_rank > 0
  ),
  contract=lambda mtp, tapped: markov.contract(mtp),
)
