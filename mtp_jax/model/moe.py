"""DeepSeekMoE: shared experts, and routed ones of which every token chooses a few.

DeepSeek-V3 report (arXiv 2412.19437), equations 12 to 20. An expert's affinity is the
sigmoid of a product with the router's vector; the choice is by affinity plus a bias,
which `balancing` moves after every step; the gates are the chosen affinities alone.
No choice is ever dropped.

Legend: B batch, T sequence, D embed, F expert width, E experts, k choices per token, N
tokens, R rows (see grouped_matmul).
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
  """What the router of one layer did with a batch.

  load_E: tokens per expert, float32; padding is not counted.
  balance: the sequence-wise balance loss without alpha, summed over rows.
  dropped: choices of tokens that no expert computed; 0.
  """

  load_E: jax.Array
  balance: jax.Array
  dropped: jax.Array


class Moe(nn.Module):
  """x_BTD -> (out_BTD, Routing): the shared experts' output plus the routed ones'.

  Padding (segment 0) is computed like any token, since decoding knows no segments, but
  counts neither as load nor in the balance loss.
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
    # Mapped, because XLA's partitioner gathers what it takes the best of.
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
    is_token_BT = segment_ids_BT != 0
    routing = Routing(
      load_E=jnp.sum(_counts(choices_BTk, is_token_BT, E), axis=0),
      balance=balance_loss(affinity_BTE, unbiased_BTk, is_token_BT),
      dropped=(choices_BTk.size - computed).astype(jnp.float32),
    )
    return out_BTD, routing


class Experts(nn.Module):
  """The routed experts, each a SwiGLU, behind (x_BTD, choices_BTk, gates_BTk).

  Returns the gated sum of the chosen ones' outputs, and how many choices were computed,
  over all devices.
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

  The choices follow from small differences, hence no bfloat16 and no TF32 here.
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
  """Returns choices_Xk: the best by affinity + bias within the best groups, eq. 16.

  A group's score is the sum of its two best; see section 2.1.2, node-limited routing.
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
    affinity_BTE: what P is made of, and the gradient goes through.
    unbiased_BTk: choices by affinity alone, which f counts.
    is_token_BT: False where padding is; a row without tokens adds 0.
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
  """Returns the choices, and those that the balance loss counts (equation 18)."""
  unbiased_BTk = jax.lax.top_k(affinity_BTE, moe.experts_per_token)[1]
  return choose(affinity_BTE, bias_E, moe), unbiased_BTk


def _counts(
  choices_BTk: jax.Array, is_token_BT: jax.Array, num_experts: int
) -> jax.Array:
  """Returns count_BE of the choices of tokens, float32."""
  is_chosen_BTkE = choices_BTk[..., None] == jnp.arange(num_experts)
  is_counted_BTkE = is_chosen_BTkE & is_token_BT[..., None, None]
  return jnp.sum(is_counted_BTkE, axis=(1, 2), dtype=jnp.float32)


def _experts_share(
  x_BTD, choices_BTk, gates_BTk, gate_EDF, up_EDF, down_EFD, *, moe: MoeConfig
):
  """What one device adds: its experts' outputs for all tokens of its expert group.

  The tokens of the group are gathered, with their choices and gates, and the outputs
  are summed and scattered back. All shapes are static then, whatever the load: there is
  no capacity, and nothing to drop. An all-to-all would have to reserve, between every
  two devices, room for all tokens to prefer the same expert, or drop. It moves less
  only where k is much smaller than the group of devices (a token goes to k of them at
  most, here to all); within a group of 8 and with k = 8 there is nothing to save. The
  price is the size of the buffer of rows, which must do for the case that all choices
  of the group fall on this device; time is spent on those that do.
  """
  B, T, D = x_BTD.shape
  join = lambda a_BTX: gather_shards(  # noqa: E731
    a_BTX.reshape(B * T, -1), "experts", 0
  )
  x_ND, choices_Nk, gates_Nk = join(x_BTD), join(choices_BTk), join(gates_BTk)
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

  x_RD = to_rows(x_ND, rows)
  multiply = lambda x_RX, w: grouped_matmul(x_RX, w, rows.expert_G, plan)  # noqa: E731
  hidden_RF = swiglu(
    checkpoint_name(multiply(x_RD, gate_EDF), "mlp_gate"),
    checkpoint_name(multiply(x_RD, up_EDF), "mlp_up"),
  )
  # The gate is applied before the last product, which is linear: so its derivative does
  # not need the output, which would be computed again for the backward pass.
  gate_R = gates_Nk.ravel().at[rows.choice_R].get(mode="fill", fill_value=0)
  hidden_RF = (hidden_RF * gate_R[:, None]).astype(x_RD.dtype)
  out_ND = from_rows(multiply(hidden_RF, down_EFD), rows)
  # Every device along `mlp` has a part of each expert's width.
  out_BTD = sum_shards(scatter_sum_shards(out_ND, "experts", 0), "mlp")
  return out_BTD.reshape(B, T, D), psum_tokens(num_computed(rows))
