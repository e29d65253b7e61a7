"""Weights of the depths' losses, and lambda, as functions of training progress.

Legend: M = 1 + depth.
"""

import jax
import jax.numpy as jnp

from mtp_jax.config import MtpConfig


def lambda_at(mtp: MtpConfig, weight: jax.Array, progress: jax.Array) -> jax.Array:
  """Returns lambda, a scalar, at `progress` = step / num_steps in [0, 1).

  `weight` is the traced value of `mtp.weight`. `piecewise` is the schedule of
  DeepSeek-V3 (section 4.2 of its report): one value, then a smaller one.
  """
  if mtp.schedule == "constant":
    return weight
  if mtp.schedule == "piecewise":
    return jnp.where(progress < mtp.schedule_fraction, weight, mtp.final_weight)
  if mtp.schedule == "linear":
    return weight + (mtp.final_weight - weight) * progress
  fraction = max(mtp.schedule_fraction, 1e-9)  # anneal; 0 means lambda = 0 throughout.
  return weight * jnp.maximum(0.0, 1.0 - progress / fraction)


def num_active_depths(mtp: MtpConfig, progress: jax.Array) -> jax.Array:
  """Returns how many of the D extra depths count at `progress`.

  Training is divided into D + 1 equal phases. `forward` starts with next-token
  prediction and adds one depth per phase; `reverse` starts with all and removes one
  per phase (the two curricula of Aynetdinov and Akbik 2025, arXiv 2505.22757).
  """
  phase = jnp.minimum(jnp.floor(progress * (mtp.depth + 1)), mtp.depth)
  if mtp.curriculum == "forward":
    return phase
  if mtp.curriculum == "reverse":
    return mtp.depth - phase
  return jnp.full_like(phase, mtp.depth)


def depth_weights(
  mtp: MtpConfig, weight: jax.Array, progress: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns `(weights_M, lambda)`; entry 0, the main loss, is always 1.

  Depth k of D gets `lambda / D * r_k` under `mean` (DeepSeek-V3, equation 25) and
  `lambda * r_k` under `sum` (Gloeckle et al. 2024 with lambda = 1), where r_k is
  `mtp.depth_weights[k - 1]` or 1.
  """
  progress = jnp.asarray(progress, jnp.float32)
  scale = lambda_at(mtp, jnp.asarray(weight, jnp.float32), progress)
  if mtp.depth == 0:
    return jnp.ones((1,), jnp.float32), scale
  relative = jnp.asarray(mtp.depth_weights or (1.0,) * mtp.depth, jnp.float32)
  active = jnp.arange(mtp.depth) < num_active_depths(mtp, progress)
  per_depth = scale / mtp.depth if mtp.weighting == "mean" else scale
  extra = jnp.where(active, per_depth * relative, 0.0)
  return jnp.concatenate([jnp.ones((1,), jnp.float32), extra]), scale
