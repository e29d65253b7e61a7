"""AdamW and Muon, learning-rate schedules, and scaling of the rate with the width.

Parameterisation: a config's learning rate is the peak for `base_width`. Matrices that
map width to width, and an untied output matrix, use that rate times `base_width /
embed_dim`; embeddings, norms and biases use the rate unscaled. With initial variance
1 / fan_in for hidden and 1 / fan_in^2 for output matrices this is muP for Adam (Yang et
al. 2022, arXiv 2203.03466, table 3) at a fixed head size.

Muon (Jordan et al. 2024) orthogonalises the updates of the hidden matrices and scales
them to an RMS of 0.2 (Liu et al. 2025, arXiv 2502.16982), so that AdamW's learning
rates can be reused. Such an update has a spectral norm of 0.2 sqrt(width); therefore
the factor of these matrices is the square root, `sqrt(base_width / embed_dim)`, the
spectral condition of Yang et al. 2023 (arXiv 2310.17813). All other parameters get
AdamW, with Nesterov momentum, because optax has one switch for both.

The learning rate is traced: the optax chain returns the update per unit of learning
rate, and `apply` multiplies it by the rate.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtp_jax.config import Config, OptimizerConfig

_STACKED = ("layers", "depths", "experts")
_INPUTS = ("embed", "concat", "rank_in")


def schedule_at(config: OptimizerConfig, progress: jax.Array) -> jax.Array:
  """Returns the learning rate relative to its peak at `progress` in [0, 1].

  Linear warm-up, then `cosine` to `final_fraction`, or `wsd`: constant until the last
  `decay_fraction`, then linear to `final_fraction` (Hu et al. 2024, arXiv 2404.06395).
  """
  warmup = config.warmup_fraction
  rise = progress / warmup if warmup > 0 else jnp.inf
  if config.schedule == "cosine":
    after = jnp.clip((progress - warmup) / max(1.0 - warmup, 1e-9), 0.0, 1.0)
    fall = 0.5 * (1.0 + jnp.cos(jnp.pi * after))
  else:
    decay = max(config.decay_fraction, 1e-9)
    fall = jnp.clip((1.0 - progress) / decay, 0.0, 1.0)
  floor = config.final_fraction
  return jnp.minimum(rise, floor + (1.0 - floor) * fall)


def make_optimizer(
  config: OptimizerConfig, axes: Any, clips_apart: bool = False
) -> optax.GradientTransformation:
  """Returns the chain: clip, then AdamW or Muon, per unit of learning rate.

  `axes` is the tree of logical axes of the parameters. With either optimizer, weight
  decay acts on matrices (embeddings included), not on norms and biases. `clips_apart`:
  the extra predictors have a norm of their own, so that they do not slow the trunk.
  """
  clip = optax.clip_by_global_norm(config.clip_norm)
  if clips_apart:
    groups = {name: name if name == "mtp" else "trunk" for name in axes}
    clip = optax.partition({"mtp": clip, "trunk": clip}, groups)
  if config.kind == "adamw":
    direction = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
  else:
    numbers = jax.tree_util.tree_map_with_path(
      lambda path, names: _muon_axes(names) if _is_hidden(path, names) else None,
      axes,
      is_leaf=_is_axes,
    )
    direction = optax.contrib.muon(
      -1.0,  # Undoes optax' negation: `scale(-1.0)` below negates once, decay included.
      beta=0.95,
      eps=config.eps,
      adam_b1=config.beta1,
      adam_b2=config.beta2,
      consistent_rms=0.2,
      muon_weight_dimension_numbers=numbers,
    )
  return optax.chain(
    clip,
    direction,
    optax.add_decayed_weights(
      config.weight_decay, jax.tree.map(_is_matrix, axes, is_leaf=_is_axes)
    ),
    optax.scale(-1.0),
  )


def trainable(config: Config, tree: Any) -> Any:
  """Returns the trained part of a parameter tree, or of a tree with its structure."""
  return {"mtp": tree["mtp"]} if config.train.freeze_trunk else tree


def learning_rate_scales(config: Config, axes: Any) -> Any:
  """Returns each parameter's factor on the learning rate (see the module docstring)."""
  ratio = config.optimizer.base_width / config.trunk.embed_dim
  hidden = ratio**0.5 if config.optimizer.kind == "muon" else ratio

  def factor(path: Any, names: tuple[str, ...]) -> float:
    if _is_hidden(path, names):
      return hidden
    return ratio if _is_unembed(path) else 1.0

  return jax.tree_util.tree_map_with_path(factor, axes, is_leaf=_is_axes)


def apply(params: Any, updates: Any, learning_rate: jax.Array, scales: Any) -> Any:
  """Returns `params + learning_rate * scale * update` for every parameter."""
  return jax.tree.map(
    lambda p, u, s: p + (learning_rate * s * u).astype(p.dtype), params, updates, scales
  )


def _is_axes(node: Any) -> bool:
  return isinstance(node, tuple)


def _own_axes(names: tuple[str, ...]) -> list[int]:
  """Returns the dimensions that do not stack layers, depths or experts."""
  return [i for i, name in enumerate(names) if name not in _STACKED]


def _is_matrix(names: tuple[str, ...]) -> bool:
  return any(name in names for name in _INPUTS)


def _is_hidden(path: Any, names: tuple[str, ...]) -> bool:
  """Returns whether the parameter maps the width to (a multiple of) the width."""
  in_layers = path[0].key in ("trunk", "mtp") and not _is_unembed(path)
  return in_layers and _is_matrix(names)


def _is_unembed(path: Any) -> bool:
  """Returns whether the parameter is an output matrix, of the trunk or of a head."""
  return path[0].key == "unembed" or path[-1].key == "unembed"


def _muon_axes(names: tuple[str, ...]) -> optax.contrib.MuonDimensionNumbers:
  """Returns the input and output axes of a matrix, such as [D, N, H] or [N, H, D]."""
  own = _own_axes(names)
  split = 1 if names[own[0]] in _INPUTS else len(own) - 1
  return optax.contrib.MuonDimensionNumbers(tuple(own[:split]), tuple(own[split:]))
