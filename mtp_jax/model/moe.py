"""DeepSeekMoE: shared experts for every token, and routed experts that tokens choose.

DeepSeek-V3 report (arXiv 2412.19437), equations 12 to 20. An expert's affinity is the
sigmoid of a product with the router's vector; the choice is by affinity plus a bias,
which `balancing` moves after every step; the gates are the chosen affinities alone.
No choice is ever dropped.

Legend: B batch, T sequence, D embed, F expert width, E experts, k choices per token, N
tokens, Q rows (see grouped_matmul).
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import MoeConfig, TrunkConfig
from mtp_jax.kernels.dense import swiglu
from mtp_jax.kernels.grouped_matmul import (
  choose_implementation,
  from_rows,
  grouped_matmul,
  make_plan,
  num_computed,
  sort_by_expert,
  to_rows,
)
from mtp_jax.model.layers import compute_dtype, fan_in_normal, partitioned
from mtp_jax.model.mlp import Mlp
from mtp_jax.sharding import (
  constrain,
  gather_shards,
  map_over_shards,
  map_over_tokens,
  platform,
  psum_tokens,
  scatter_sum_shards,
  shard_index,
  sum_shards,
)


class Routing(NamedTuple):
  """Statistics of one layer's router over a batch.

  load_E:  tokens per expert, float32; padding is not counted.
  balance: the sequence-wise balance loss without alpha, summed over rows.
  dropped: choices that no expert computed; always 0.
  """

  load_E: jax.Array
  balance: jax.Array
  dropped: jax.Array


class Moe(nn.Module):
  """Maps x_BTD to (out_BTD, Routing): shared experts' output plus routed experts'.

  Padding (segment 0) is computed like any token, because decoding has no segments, but
  it counts neither as load nor in the balance loss.
  """

  trunk: TrunkConfig

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, segment_ids_BT: jax.Array
  ) -> tuple[jax.Array, Routing]:
    c, moe = self.trunk, self.trunk.moe
    D, E = c.embed_dim, moe.num_experts
    router_DE = self.param(
      "router", partitioned(fan_in_normal(D), "embed", "router"), (D, E)
    )
    bias_E = self.param("bias", partitioned(nn.initializers.zeros, "router"), (E,))
    affinity_BTE = constrain(affinities(x_BTD, router_DE), "batch", "seq", "router")
    # Mapped over devices, because XLA's partitioner would gather the input of top_k.
    tokens = ("batch", "seq", None)
    choices_BTk, unbiased_BTk = map_over_tokens(
      functools.partial(_choose_both, moe=moe),
      in_axes=(tokens, (None,)),
      out_axes=(tokens, tokens),
    )(jax.lax.stop_gradient(affinity_BTE), jax.lax.stop_gradient(bias_E))
    out_BTD, computed = Experts(c, name="experts")(
      x_BTD, choices_BTk, gates(affinity_BTE, choices_BTk, moe.route_scale)
    )
    if moe.num_shared:
      shared = dataclasses.replace(c, mlp_dim=moe.num_shared * moe.expert_dim)
      out_BTD += Mlp(shared, name="shared")(x_BTD)
    # Padding would be routed like a real token and distort the load.
    is_token_BT = segment_ids_BT != 0
    routing = Routing(
      load_E=jnp.sum(_counts(choices_BTk, is_token_BT, E), axis=0),
      balance=balance_loss(affinity_BTE, unbiased_BTk, is_token_BT),
      dropped=(choices_BTk.size - computed).astype(jnp.float32),
    )
    return out_BTD, routing


class Experts(nn.Module):
  """The routed experts, each a SwiGLU.

  Returns `(out_BTD, computed)`: the gated sum of the chosen experts' outputs, and the
  number of choices computed, over all devices.
  """

  trunk: TrunkConfig

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, choices_BTk: jax.Array, gates_BTk: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    c, dtype = self.trunk, compute_dtype(self.trunk)
    D, E, F = c.embed_dim, c.moe.num_experts, c.moe.expert_dim
    inwards, outwards = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")

    def matrices(name: str, axes: tuple[str, ...], gain: float = 1.0) -> jax.Array:
      shape = (E, D, F) if axes == inwards else (E, F, D)
      init = partitioned(fan_in_normal(shape[1], gain), *axes)
      return self.param(name, init, shape).astype(dtype)

    tokens = ("batch", "seq", None)
    return map_over_shards(
      functools.partial(_experts_share, moe=c.moe),
      in_axes=(tokens, tokens, tokens, inwards, inwards, outwards),
      out_axes=(tokens, ()),
    )(
      x_BTD,
      choices_BTk,
      gates_BTk,
      matrices("gate", inwards),
      matrices("up", inwards),
      matrices("down", outwards, (2 * c.num_layers) ** -0.5),
    )


def affinities(x_BTD: jax.Array, router_DE: jax.Array) -> jax.Array:
  """Returns affinity_BTE, equation 15, in float32 (float64 for float64 input).

  Small differences decide the choices, hence no bfloat16 and no TF32.
  """
  wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
  return jax.nn.sigmoid(
    jnp.einsum(
      "BTD,DE->BTE",
      x_BTD.astype(wide),
      router_DE.astype(wide),
      precision=jax.lax.Precision.HIGHEST,
    )
  )


def choose(affinity_XE: jax.Array, bias_E: jax.Array, moe: MoeConfig) -> jax.Array:
  """Returns choices_Xk: the k experts with the highest affinity + bias (equation 16).

  Only experts of the best groups are eligible. A group's score is the sum of its two
  best experts' scores (section 2.1.2, node-limited routing).
  """
  score_XE = affinity_XE + bias_E.astype(affinity_XE.dtype)
  if moe.num_groups > 1:
    group_size = moe.num_experts // moe.num_groups
    score_XGS = score_XE.reshape(*score_XE.shape[:-1], moe.num_groups, group_size)
    score_XG = jnp.sum(jax.lax.top_k(score_XGS, 2)[0], axis=-1)
    kept_Xg = jax.lax.top_k(score_XG, moe.groups_per_token)[1]
    is_kept_XG = jnp.any(kept_Xg[..., None] == jnp.arange(moe.num_groups), axis=-2)
    is_kept_XE = jnp.repeat(is_kept_XG, group_size, axis=-1)
    score_XE = jnp.where(is_kept_XE, score_XE, -jnp.inf)
  return jax.lax.top_k(score_XE, moe.experts_per_token)[1]


def gates(
  affinity_XE: jax.Array, choices_Xk: jax.Array, route_scale: float
) -> jax.Array:
  """Returns gates_Xk: chosen affinities that sum to `route_scale`, equations 13, 14."""
  chosen_Xk = jnp.take_along_axis(affinity_XE, choices_Xk, axis=-1)
  return route_scale * chosen_Xk / (jnp.sum(chosen_Xk, -1, keepdims=True) + 1e-20)


def balance_loss(
  affinity_BTE: jax.Array, unbiased_BTk: jax.Array, is_token_BT: jax.Array
) -> jax.Array:
  """Returns the sum over rows of sum_i f_i P_i, equations 17 to 20 without alpha.

  Args:
    affinity_BTE: determines P; the gradient passes through it.
    unbiased_BTk: choices by affinity alone, which f counts.
    is_token_BT: False for padding; a row without tokens adds 0.
  """
  E, k = affinity_BTE.shape[-1], unbiased_BTk.shape[-1]
  share_BTE = affinity_BTE / (jnp.sum(affinity_BTE, -1, keepdims=True) + 1e-20)
  length_B1 = jnp.maximum(jnp.sum(is_token_BT, axis=1, keepdims=True), 1)
  count_BE = _counts(unbiased_BTk, is_token_BT, E).astype(affinity_BTE.dtype)
  f_BE = count_BE * E / (k * length_B1)
  P_BE = jnp.sum(jnp.where(is_token_BT[..., None], share_BTE, 0), axis=1) / length_B1
  return jnp.sum(f_BE * P_BE)


def _choose_both(
  affinity_BTE: jax.Array, bias_E: jax.Array, *, moe: MoeConfig
) -> tuple[jax.Array, jax.Array]:
  """Returns the choices with the bias, and without it for the balance loss (eq. 18)."""
  unbiased_BTk = jax.lax.top_k(affinity_BTE, moe.experts_per_token)[1]
  return choose(affinity_BTE, bias_E, moe), unbiased_BTk


def _counts(
  choices_BTk: jax.Array, is_token_BT: jax.Array, num_experts: int
) -> jax.Array:
  """Returns count_BE, float32: how many tokens of each row chose each expert."""
  is_chosen_BTkE = choices_BTk[..., None] == jnp.arange(num_experts)
  is_counted_BTkE = is_chosen_BTkE & is_token_BT[..., None, None]
  return jnp.sum(is_counted_BTkE, axis=(1, 2), dtype=jnp.float32)


def _experts_share(
  x_BTD, choices_BTk, gates_BTk, gate_EDF, up_EDF, down_EFD, *, moe: MoeConfig
):
  """Returns one device's tokens after its whole expert group has computed them.

  Each device of the group gathers the group's tokens, choices and gates, computes its
  own experts, and sums and scatters the outputs. All shapes are static for any load:
  there is no capacity, and nothing is dropped. An all-to-all would have to reserve,
  between every two devices, room for the case that all tokens choose one expert, or
  drop tokens. It moves less data only if k is much smaller than the group (a token then
  goes to at most k devices, here to all); with a group of 8 and k = 8 it saves nothing.
  The price of gathering is memory: the buffer of rows must hold all choices of the
  group. Time is spent only on the choices that fall on this device.
  """
  B, T, D = x_BTD.shape
  x_ND, choices_Nk, gates_Nk = (
    gather_shards(a_BTX.reshape(B * T, -1), "experts", 0)
    for a_BTX in (x_BTD, choices_BTk, gates_BTk)
  )
  gate_EDF, up_EDF = (gather_shards(w, "embed", 1) for w in (gate_EDF, up_EDF))
  down_EFD = gather_shards(down_EFD, "embed", 2)

  num_local = gate_EDF.shape[0]
  plan = make_plan(
    choose_implementation(moe.grouped_matmul, platform()),
    choices_Nk.shape,
    moe.num_experts,
    num_local,
    gate_EDF[0].size,
  )
  local_Nk = choices_Nk - num_local * shard_index("experts")
  rows = jax.tree.map(
    lambda x: checkpoint_name(x, "expert_rows"),
    sort_by_expert(local_Nk, num_local, plan),
  )

  x_QD = to_rows(x_ND, rows)

  def multiply(x_QX: jax.Array, w_EXY: jax.Array) -> jax.Array:
    return grouped_matmul(x_QX, w_EXY, rows.expert_G, plan)

  hidden_QF = swiglu(
    checkpoint_name(multiply(x_QD, gate_EDF), "mlp_gate"),
    checkpoint_name(multiply(x_QD, up_EDF), "mlp_up"),
  )
  # The last product is linear, so the gate may be applied before it. The gate's
  # derivative then does not need the output, which would have to be computed again.
  gate_Q = gates_Nk.ravel().at[rows.choice_Q].get(mode="fill", fill_value=0)
  hidden_QF = (hidden_QF * gate_Q[:, None]).astype(x_QD.dtype)
  out_ND = from_rows(multiply(hidden_QF, down_EFD), rows)
  # Devices along `mlp` hold parts of each expert's width: their outputs are summed.
  out_BTD = sum_shards(scatter_sum_shards(out_ND, "experts", 0), "mlp")
  return out_BTD.reshape(B, T, D), psum_tokens(num_computed(rows))
