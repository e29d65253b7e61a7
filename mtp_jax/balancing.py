"""Auxiliary-loss-free load balancing: updates the biases of the experts' router.

An expert's bias is added to its affinity when experts are chosen, not to its gate
(DeepSeek-V3, equation 16; Wang et al. 2024, arXiv 2408.15664). No gradient reaches the
bias: after every step it rises by gamma for experts below the mean load and falls by
gamma for experts above. Biases are stored in the parameter tree beside the router, so
that they are saved, loaded and exported with the model.

Legend: L layers, E experts.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import MoeConfig

BIAS = ("moe", "bias")  # Last two keys of the path of a bias.


def update_biases(
  moe: MoeConfig, params: Any, load: dict[str, jax.Array], progress: jax.Array
) -> Any:
  """Returns the parameters with every bias moved by gamma * sign(mean load - load).

  Args:
    moe: `bias_rate` is gamma, until `bias_until` of the training.
    params: a tree; parts of `load` that it lacks are skipped.
    load: by top-level part of the parameters, load_LE: tokens per layer and expert,
      over the whole optimizer step.
    progress: step / num_steps.
  """
  if moe.bias_rate == 0:
    return params
  rate = jnp.where(progress < moe.bias_until, moe.bias_rate, 0.0)

  def move(path: Any, leaf: jax.Array, load_LE: jax.Array) -> jax.Array:
    if tuple(key.key for key in path[-2:]) != BIAS:
      return leaf
    # A shared module has one bias, but a load for each application: add the loads.
    load_of_bias = jnp.sum(load_LE.reshape(-1, *leaf.shape), axis=0)
    error = jnp.mean(load_of_bias, axis=-1, keepdims=True) - load_of_bias
    return leaf + (rate * jnp.sign(error)).astype(leaf.dtype)

  return params | {
    part: jax.tree_util.tree_map_with_path(
      lambda path, leaf, load_LE=load_LE: move(path, leaf, load_LE), params[part]
    )
    for part, load_LE in load.items()
    if part in params
  }


def violation(load_LE: np.ndarray) -> np.ndarray:
  """Returns max load / mean load - 1 per layer (MaxVio of Wang et al. 2024).

  NaN where a layer had no tokens.
  """
  mean_L = np.mean(load_LE, axis=-1)
  with np.errstate(invalid="ignore", divide="ignore"):
    return np.where(mean_L > 0, np.max(load_LE, axis=-1) / mean_L - 1.0, np.nan)
