"""Per-depth cross-entropy from hidden states, with one block of logits alive.

The losses receive hidden states and the unembedding matrix, never logits: they walk
over depths and blocks of positions. Because the scalar that is differentiated is linear
in every token's loss, the gradient of a block can be formed while its logits are alive:
three matrix products per block (logits, d hidden, d unembedding), none repeated, and
peak memory that does not grow with the number of depths. Results are sums and counts;
the caller's coefficients hold the one division by global counts.

Legend: B batch, T sequence, D embed, V vocab, M = 1 + depth, N = tokens of a block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.sharding import map_over_tokens, psum_tokens


class LossSums(NamedTuple):
  """`total` = sum_m coefficients[m] * nll[m]; the rest are sums over tokens, [M]."""

  total: jax.Array
  nll_M: jax.Array
  correct_M: jax.Array


class TokenStats(NamedTuple):
  """Per-token results of the evaluation: nats, and the most likely token."""

  nll_MBT: jax.Array
  argmax_MBT: jax.Array


def loss_coefficients(weights_M: jax.Array, mask_MBT: jax.Array) -> jax.Array:
  """Returns `weights_M / counts_M`: each depth is averaged over its own valid tokens.

  `mask_MBT` covers the whole optimizer step (all microbatches may be stacked in B), so
  that this is the only division. A depth without any valid token contributes 0.
  """
  counts_M = jnp.sum(mask_MBT, axis=(1, 2), dtype=weights_M.dtype)
  return weights_M / jnp.maximum(counts_M, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def loss_sums(
  hidden_MBTD: jax.Array,
  unembed_DV: jax.Array,
  targets_MBT: jax.Array,
  mask_MBT: jax.Array,
  coefficients_M: jax.Array,
  block_tokens: int,
) -> LossSums:
  """Returns the weighted total loss and the per-depth sums.

  Differentiable in `hidden_MBTD` and `unembed_DV` through `total` only; the per-depth
  sums are reports. Logits, softmax and sums are float32 (float64 for float64 input).

  Args:
    hidden_MBTD: normed hidden states of every depth.
    unembed_DV: the shared output matrix, in the compute dtype.
    targets_MBT: token ids.
    mask_MBT: true where the target counts.
    coefficients_M: see `loss_coefficients`.
    block_tokens: positions per block of logits, on each device.
  """
  return _over_devices(
    functools.partial(_local_sums, block_tokens=block_tokens, with_grads=False)
  )(hidden_MBTD, unembed_DV, targets_MBT, mask_MBT, coefficients_M)[0]


def _loss_sums_fwd(hidden, unembed, targets, mask, coefficients, block_tokens):
  sums, d_hidden, d_unembed = _over_devices(
    functools.partial(_local_sums, block_tokens=block_tokens, with_grads=True),
    with_grads=True,
  )(hidden, unembed, targets, mask, coefficients)
  return sums, (d_hidden, d_unembed.astype(unembed.dtype))


def _loss_sums_bwd(block_tokens, residuals, cotangents):
  del block_tokens
  d_hidden, d_unembed = residuals
  scale = cotangents.total
  return (
    d_hidden * scale.astype(d_hidden.dtype),
    d_unembed * scale.astype(d_unembed.dtype),
    None,
    None,
    None,
  )


loss_sums.defvjp(_loss_sums_fwd, _loss_sums_bwd)


def token_stats(
  hidden_MBTD: jax.Array,
  unembed_DV: jax.Array,
  targets_MBT: jax.Array,
  block_tokens: int,
) -> TokenStats:
  """Returns every token's loss in nats and arg max, for evaluation (no gradient)."""

  def block(h_ND, t_N):
    logits_NV = _logits(h_ND, unembed_DV)
    nll_N = jax.nn.logsumexp(logits_NV, axis=-1) - _pick(logits_NV, t_N)
    return nll_N, jnp.argmax(logits_NV, axis=-1)

  shape = targets_MBT.shape
  blocks, num_tokens = _split(
    block_tokens,
    hidden_MBTD.reshape(-1, hidden_MBTD.shape[-1]),
    targets_MBT.reshape(-1),
  )
  results = jax.lax.map(lambda args: block(*args), blocks)
  nll, argmax = (x.reshape(-1)[:num_tokens].reshape(shape) for x in results)
  return TokenStats(nll, argmax)


def _over_devices(function, with_grads=False):
  tokens = (None, "batch", "seq")
  scalar, per_depth, matrix = (), (None,), ("act_embed", None)
  sums = LossSums(scalar, per_depth, per_depth)
  hidden = (*tokens, "act_embed")
  return map_over_tokens(
    function,
    in_axes=(hidden, matrix, tokens, tokens, per_depth),
    out_axes=(sums, hidden, matrix) if with_grads else (sums,),
  )


def _local_sums(
  hidden_MBTD, unembed_DV, targets_MBT, mask_MBT, coefficients_M, *,
  block_tokens, with_grads,
):
  """One device's share: scans over (depth, block) and sums over devices at the end."""
  M, B, T, D = hidden_MBTD.shape
  accumulate = jnp.promote_types(hidden_MBTD.dtype, jnp.float32)

  def block(d_unembed, xs):
    h_ND, t_N, mask_N, coefficient = xs
    logits_NV = _logits(h_ND, unembed_DV)
    top_N1 = jnp.max(logits_NV, axis=-1, keepdims=True)
    exp_NV = jnp.exp(logits_NV - top_N1)
    sum_N1 = jnp.sum(exp_NV, axis=-1, keepdims=True)
    picked_N = _pick(logits_NV, t_N)
    nll_N = jnp.log(sum_N1[:, 0]) + top_N1[:, 0] - picked_N
    nll = jnp.sum(jnp.where(mask_N, nll_N, 0.0))
    correct = jnp.sum((picked_N >= top_N1[:, 0]) & mask_N, dtype=accumulate)
    if not with_grads:
      return d_unembed, (nll, correct)
    scale_N1 = jnp.where(mask_N, coefficient, 0.0)[:, None].astype(accumulate)
    hot_NV = jax.lax.broadcasted_iota(t_N.dtype, logits_NV.shape, 1) == t_N[:, None]
    d_logits_NV = exp_NV * (scale_N1 / sum_N1) - jnp.where(hot_NV, scale_N1, 0.0)
    d_logits_NV = d_logits_NV.astype(h_ND.dtype)
    d_h_ND = jnp.einsum("NV,DV->ND", d_logits_NV, unembed_DV)
    d_unembed = d_unembed + jnp.einsum(
      "ND,NV->DV", h_ND, d_logits_NV, preferred_element_type=accumulate
    )
    return d_unembed, (nll, correct, d_h_ND)

  # Blocks never cross a depth: tokens of one depth are padded to whole blocks.
  per_depth = [
    _split(block_tokens, h.reshape(-1, D), t.reshape(-1), m.reshape(-1))[0]
    for h, t, m in zip(hidden_MBTD, targets_MBT, mask_MBT, strict=True)
  ]
  num_blocks = per_depth[0][0].shape[0]
  xs = (
    *(jnp.concatenate(parts) for parts in zip(*per_depth, strict=True)),
    jnp.repeat(coefficients_M, num_blocks),
  )
  d_unembed = jnp.zeros(unembed_DV.shape, accumulate) if with_grads else ()
  if M * num_blocks == 1:
    d_unembed, ys = block(d_unembed, jax.tree.map(lambda x: x[0], xs))
    ys = jax.tree.map(lambda y: y[None], ys)
  else:
    d_unembed, ys = jax.lax.scan(block, d_unembed, xs)
  nll_M, correct_M = (
    psum_tokens(jnp.sum(y.reshape(M, num_blocks), axis=1)) for y in ys[:2]
  )
  sums = LossSums(jnp.sum(coefficients_M * nll_M), nll_M, correct_M)
  if not with_grads:
    return (sums,)
  d_hidden = ys[2].reshape(M, -1, D)[:, : B * T].reshape(M, B, T, D)
  return sums, d_hidden, psum_tokens(d_unembed)


def _logits(h_ND: jax.Array, unembed_DV: jax.Array) -> jax.Array:
  accumulate = jnp.promote_types(h_ND.dtype, jnp.float32)
  return jnp.einsum("ND,DV->NV", h_ND, unembed_DV, preferred_element_type=accumulate)


def _pick(logits_NV: jax.Array, targets_N: jax.Array) -> jax.Array:
  return jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]


def _split(block_tokens: int, *arrays: jax.Array) -> tuple[tuple[jax.Array, ...], int]:
  """Cuts leading axes of equal length into equal blocks; pads the last with zeros."""
  num_tokens = arrays[0].shape[0]
  num_blocks = -(-num_tokens // block_tokens)
  size = -(-num_tokens // num_blocks)
  padding = num_blocks * size - num_tokens
  blocks = tuple(
    jnp.pad(a, ((0, padding), *((0, 0),) * (a.ndim - 1))).reshape(
      num_blocks, size, *a.shape[1:]
    )
    for a in arrays
  )
  return blocks, num_tokens
