"""`TrainState`: what training carries from step to step, and its initialisation.

Legend: M = 1 + depth.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from mtp_jax import accounting
from mtp_jax import optimizer as optimizers
from mtp_jax.config import Config
from mtp_jax.lm import MtpLm, zeros_batch
from mtp_jax.predictors import routed_layers
from mtp_jax.sharding import logical_axes, replicated, tree_shardings, unbox


class Hyperparameters(NamedTuple):
  """Traced scalars: trials that differ only in these share one compiled program."""

  learning_rate: jax.Array
  mtp_weight: jax.Array
  num_steps: jax.Array


def hyperparameters(config: Config) -> Hyperparameters:
  """Returns the traced scalars of a config, as NumPy values."""
  values = (
    config.optimizer.learning_rate, config.mtp.weight, config.train.num_steps
  )
  return Hyperparameters(*(np.float32(x) for x in values))


class Interval(NamedTuple):
  """Sums over the finite steps since the last log line.

  They are part of the state, so that a run resumed between two log lines logs the same
  values as an uninterrupted run.

  load:         tokens per layer and expert, by part of the model (`routed_layers`).
  dropped:      choices of experts that were not computed.
  balance_loss: the loss times its weight alpha.
  """

  steps: jax.Array
  loss_total: jax.Array
  loss_M: jax.Array
  weighted_loss_M: jax.Array
  weight_M: jax.Array
  correct_M: jax.Array
  count_M: jax.Array
  grad_norm: jax.Array
  longest_nonfinite_run: jax.Array
  balance_loss: jax.Array
  dropped: jax.Array
  load: dict[str, jax.Array]


@struct.dataclass
class TrainState:
  step: jax.Array
  params: Any
  opt_state: Any
  interval: Interval
  nonfinite_run: jax.Array
  nonfinite_total: jax.Array


def empty_interval(config: Config) -> Interval:
  """Returns an interval of no steps: all sums are 0."""
  per_depth = {f for f in Interval._fields if f.endswith("_M")}
  integers = ("steps", "longest_nonfinite_run")
  experts = config.trunk.moe.num_experts
  values = {
    name: jnp.zeros(
      (1 + config.mtp.depth,) if name in per_depth else (),
      jnp.int32 if name in integers else jnp.float32,
    )
    for name in Interval._fields
  }
  load = {
    part: jnp.zeros((layers, experts), jnp.float32)
    for part, layers in routed_layers(config).items()
  }
  return Interval(**(values | {"load": load}))


def init_state(
  config: Config, optimizer: optax.GradientTransformation, seed: jax.Array
) -> TrainState:
  """Returns the state before the first step; pure, so that jit can shard the result.

  The trunk's parameters depend on the seed and the trunk's config alone, because Flax
  folds each parameter's path into the key.
  """
  variables = MtpLm(config).init(jax.random.key(seed), zeros_batch(config))
  params = unbox(variables["params"])
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(optimizers.trainable(config, params)),
    interval=empty_interval(config),
    nonfinite_run=jnp.zeros((), jnp.int32),
    nonfinite_total=jnp.zeros((), jnp.int32),
  )


def state_shardings(
  config: Config, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
  """Returns the shardings of a `TrainState`; moments are split as their parameters."""
  boxed = accounting.abstract_params(config)
  params = tree_shardings(mesh, logical_axes(boxed))
  whole = replicated(mesh)
  by_path = {
    _keys(path): sharding
    for path, sharding in jax.tree_util.tree_leaves_with_path(params)
  }

  def like_parameter(path: Any, _: Any) -> jax.sharding.Sharding:
    # Optax nests trees of moments in its own containers: the path of a moment ends
    # with the path of its parameter.
    keys = _keys(path)
    suffixes = (keys[i:] for i in range(len(keys)))
    return next((by_path[keys] for keys in suffixes if keys in by_path), whole)

  opt_state = jax.tree_util.tree_map_with_path(
    like_parameter,
    jax.eval_shape(optimizer.init, optimizers.trainable(config, unbox(boxed))),
  )
  return TrainState(
    step=whole,
    params=params,
    opt_state=opt_state,
    interval=jax.tree.map(
      lambda _: whole, jax.eval_shape(lambda: empty_interval(config))
    ),
    nonfinite_run=whole,
    nonfinite_total=whole,
  )


def _keys(path: Any) -> tuple[str, ...]:
  """Returns the dictionary keys of a tree path."""
  return tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
