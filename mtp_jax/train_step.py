"""One optimizer step as a pure function, compiled once per `program.ProgramConfig`.

Legend: A microbatches, B batch, T sequence, M = 1 + depth.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtp_jax import accounting, optimizer
from mtp_jax.balancing import update_biases
from mtp_jax.batch import Batch
from mtp_jax.config import Config, learns_from_trunk
from mtp_jax.depth_weights import depth_weights
from mtp_jax.lm import (
  MtpLm,
  columns,
  draft_tokens,
  unembed_matrix,
  unembeddings,
)
from mtp_jax.losses import (
  LossSums,
  Teacher,
  feature_sums,
  loss_coefficients,
  loss_sums,
  trunk_states,
)
from mtp_jax.predictors import kind_of
from mtp_jax.program import ProgramConfig
from mtp_jax.sharding import compiler_options, logical_axes
from mtp_jax.targets import future_targets
from mtp_jax.train_state import (
  Hyperparameters,
  Interval,
  TrainState,
  empty_interval,
  init_state,
  state_shardings,
)


class Programs(NamedTuple):
  """The compiled functions of one program config on one mesh; see `programs`."""

  init: Any
  step: Any
  diagnostics: Any
  shardings: TrainState


class Targets(NamedTuple):
  """What every depth learns at every position, and where the target counts.

  upcoming: what an extra depth learns in place of its target, see `Kind.upcoming`.
  """

  columns_MBT: jax.Array
  mask_MBT: jax.Array
  upcoming: Any = None


class BatchSums(NamedTuple):
  """What one (micro)batch contributes.

  total:   the scalar that is differentiated, the sum of weighted_M and balance.
  weighted_M, nll_M, correct_M: see `losses.LossSums`.
  balance: the balance loss of the experts, with its weight; 0 without experts.
  dropped: choices of experts that were not computed; 0.
  load:    by part, tokens per layer and expert; see `predictors.routed_layers`.
  """

  total: jax.Array
  weighted_M: jax.Array
  nll_M: jax.Array
  correct_M: jax.Array
  balance: jax.Array
  dropped: jax.Array
  load: dict[str, jax.Array]


def batch_loss(
  config: Config,
  params: Any,
  batch: Batch,
  targets: Targets,
  coefficients_M: jax.Array,
  balance_coefficient: jax.Array,
) -> BatchSums:
  """Returns the weighted loss of a (micro)batch: the model, then the losses."""
  hidden_MBTD, routing = MtpLm(config).apply(
    {"params": params}, batch, method="with_routing"
  )
  sums = depth_losses(config, params, hidden_MBTD, targets, coefficients_M)
  zero = jnp.zeros((), jnp.float32)
  parts = routing.values()
  balance = balance_coefficient * sum((jnp.sum(r.balance) for r in parts), start=zero)
  return BatchSums(
    total=sums.total + balance if routing else sums.total,
    weighted_M=sums.weighted_M,
    nll_M=sums.nll_M,
    correct_M=sums.correct_M,
    balance=balance,
    dropped=sum((jnp.sum(r.dropped) for r in parts), start=zero),
    load={part: r.load_E for part, r in routing.items()},
  )


def depth_losses(
  config: Config,
  params: Any,
  hidden_MBTD: jax.Array,
  targets: Targets,
  coefficients_M: jax.Array,
) -> LossSums:
  """Returns the losses of all depths, each with its output matrix and objective.

  Depths are taken together where they share both. The main loss is taken alone on a
  frozen trunk, where nothing is differentiated in it, and with `mtp.detach`, where it
  alone trains the output matrix.
  """
  mtp, is_frozen = config.mtp, config.train.freeze_trunk
  matrices = unembeddings(params, config)
  is_apart = learns_from_trunk(mtp) or is_frozen or mtp.detach
  if mtp.depth and len(matrices) == 1 and is_apart:
    ((_, shared_DV),) = matrices
    matrices = [(slice(0, 1), shared_DV), (slice(1, None), shared_DV)]
  taken = hidden_MBTD, targets.columns_MBT, targets.mask_MBT, coefficients_M
  trunk_DV, tokens_C = unembed_matrix(params, config), draft_tokens(params, config)
  states_MBTD = hidden_MBTD[..., : len(trunk_DV)]
  teacher_MBTD = trunk_states(states_MBTD) if learns_from_trunk(mtp) else None
  teacher_DV = trunk_DV if tokens_C is None else trunk_DV[:, tokens_C]
  parts = []
  for depths, matrix_DV in matrices:
    hidden, columns, mask, coefficients = (x[depths] for x in taken)
    hidden = hidden[..., : len(matrix_DV)]
    is_main, objective = depths == slice(0, 1), "cross_entropy"
    teacher = None if is_main else targets.upcoming
    if is_main and is_frozen:
      hidden, matrix_DV = jax.lax.stop_gradient((hidden, matrix_DV))
    if not is_main and mtp.detach and mtp.unembed == "shared":
      matrix_DV = jax.lax.stop_gradient(matrix_DV)
    if not is_main and mtp.objective != "cross_entropy":
      objective, teacher = mtp.objective, Teacher(teacher_MBTD[depths], teacher_DV)
    part = loss_sums(
      hidden, matrix_DV, columns, mask, coefficients, config.loss.block_tokens,
      objective, teacher,
    )
    if not is_main and mtp.feature_weight:
      weight_M = mtp.feature_weight * coefficients
      weighted_M = weight_M * feature_sums(
        states_MBTD[depths], teacher_MBTD[depths], mask
      )
      part = part._replace(
        total=part.total + jnp.sum(weighted_M),
        weighted_M=part.weighted_M + weighted_M,
      )
    parts.append(part)
  total = sum((part.total for part in parts[1:]), start=parts[0].total)
  joined = (jnp.concatenate(x) for x in zip(*(part[1:] for part in parts), strict=True))
  return LossSums(total, *joined)


def learnt_targets(config: Config, params: Any, batch: Batch) -> Targets:
  """Returns the targets of training, as `lm.columns`.

  Where depths learn from the trunk's own prediction of a token, those at the end of a
  row are left out whose prediction would be made after it.
  """
  mtp = config.mtp
  targets_MBT, mask_MBT = future_targets(batch, mtp.depth, mtp.score_from)
  if learns_from_trunk(mtp):
    M, _, T = mask_MBT.shape
    mask_MBT &= (jnp.arange(M)[:, None] + jnp.arange(T) < T)[:, None]
  learns = kind_of(mtp).upcoming if mtp.depth else None
  return Targets(
    *columns(params, config, targets_MBT, mask_MBT),
    None if learns is None else learns(mtp, batch),
  )


def loss_and_grads(
  config: Config, params: Any, batch: Batch, weights_M: jax.Array
) -> tuple[BatchSums, jax.Array, Any]:
  """Returns `(sums, counts_M, grads)` of microbatches stacked as [A, B, ...].

  Masks depend on the data alone, so every depth's global count is known beforehand and
  each microbatch's gradient already carries the one division: the sum over microbatches
  is the gradient of the whole batch, however its valid tokens are spread. `grads` is
  the gradient of `optimizer.trainable(config, params)`.
  """
  # Once per step: [A, M, B, T], of which every microbatch takes its part.
  targets = jax.vmap(lambda rows: learnt_targets(config, params, rows))(batch)
  # The axes of microbatches and rows stay apart: joining them would move rows between
  # devices.
  mask_MABT = targets.mask_MBT.swapaxes(0, 1)
  counts_M = jnp.sum(mask_MABT, axis=(1, 2, 3), dtype=jnp.float32)
  coefficients_M = loss_coefficients(weights_M, mask_MABT)
  # The balance loss is a mean over the rows that have tokens.
  num_rows = jnp.sum(jnp.any(batch.segment_ids != 0, axis=-1), dtype=jnp.float32)
  balance_coefficient = config.trunk.moe.balance_weight / jnp.maximum(num_rows, 1.0)

  def value_and_grad(part: tuple[Batch, Targets]):
    def loss(trained: Any):
      sums = batch_loss(
        config, params | trained, *part, coefficients_M, balance_coefficient
      )
      return sums.total, sums

    trained = optimizer.trainable(config, params)
    (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(trained)
    return sums, grads

  parts = batch, targets
  first = jax.tree.map(lambda x: x[0], parts)
  if batch.tokens.shape[0] == 1:  # A loop of one step would only keep XLA from fusing.
    sums, grads = value_and_grad(first)
    return sums, counts_M, grads

  def accumulate(carry: Any, part: tuple[Batch, Targets]):
    return jax.tree.map(jnp.add, carry, value_and_grad(part)), None

  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(value_and_grad, first)
  )
  (sums, grads), _ = jax.lax.scan(accumulate, zeros, parts)
  return sums, counts_M, grads


def train_step(
  config: Config,
  state: TrainState,
  batch: Batch,
  hyper: Hyperparameters,
  starts_interval: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Returns `(state, report)` after one optimizer step.

  A step whose loss or gradient is not finite changes neither parameters nor optimizer
  state and is counted. `batch` is [A, B, ...]; `report` holds the interval so far and
  the current learning rate and lambda.
  """
  progress = state.step / hyper.num_steps
  weights_M, mtp_lambda = depth_weights(config.mtp, hyper.mtp_weight, progress)
  sums, counts_M, grads = loss_and_grads(config, state.params, batch, weights_M)
  # One infinite loss or gradient would spoil parameters and moments for good.
  grad_norm = optax.tree.norm(grads)
  finite = jnp.isfinite(sums.total) & jnp.isfinite(grad_norm)

  # The schedule is read at the end of the step, so that the first one moves.
  rate = optimizer.schedule_at(
    config.optimizer, (state.step + 1) / hyper.num_steps
  )
  learning_rate = hyper.learning_rate * rate
  axes = optimizer.trainable(
    config, logical_axes(accounting.abstract_params(config))
  )
  # The axes show which leaves are matrices, and how wide: Muon and the scales of the
  # learning rate depend on both.
  chain = optimizer.make_optimizer(config.optimizer, axes, config.mtp.detach)
  trained = optimizer.trainable(config, state.params)
  updates, opt_state = chain.update(grads, state.opt_state, trained)
  trained = optimizer.apply(
    trained, updates, learning_rate, optimizer.learning_rate_scales(config, axes)
  )
  # No gradient reaches the biases of the router; they follow the load of this step.
  trained = update_biases(config.trunk.moe, trained, sums.load, progress)
  params = state.params | trained
  keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
  nonfinite_run = jnp.where(finite, 0, state.nonfinite_run + 1)

  # The log averages over steps, so the interval adds up means, not sums over tokens.
  loss_M = sums.nll_M / jnp.maximum(counts_M, 1.0)
  this_step = Interval(
    steps=jnp.ones((), jnp.int32),
    loss_total=sums.total,
    loss_M=loss_M,
    weighted_loss_M=sums.weighted_M,
    weight_M=weights_M,
    correct_M=sums.correct_M,
    count_M=counts_M,
    grad_norm=grad_norm,
    longest_nonfinite_run=jnp.zeros((), jnp.int32),
    balance_loss=sums.balance,
    dropped=sums.dropped,
    load=sums.load,
  )
  # A traced flag begins the interval, so one program serves every step.
  before = jax.tree.map(
    lambda zero, value: jnp.where(starts_interval, zero, value),
    empty_interval(config),
    state.interval,
  )
  interval = jax.tree.map(
    lambda old, new: old + jnp.where(finite, new, jnp.zeros_like(new)),
    before,
    this_step,
  )._replace(
    longest_nonfinite_run=jnp.maximum(before.longest_nonfinite_run, nonfinite_run)
  )
  state = TrainState(
    step=state.step + 1,
    params=jax.tree.map(keep, params, state.params),
    opt_state=jax.tree.map(keep, opt_state, state.opt_state),
    interval=interval,
    nonfinite_run=nonfinite_run,
    nonfinite_total=state.nonfinite_total + (~finite).astype(jnp.int32),
  )
  report = interval._asdict() | {
    "nonfinite_total": state.nonfinite_total,
    "learning_rate": learning_rate,
    "lambda": mtp_lambda,
  }
  return state, report


def gradient_diagnostics(
  config: Config, params: Any, batch: Batch, hyper: Hyperparameters, step: jax.Array
) -> dict[str, jax.Array]:
  """Returns how the MTP gradient compares with the NTP gradient on the trunk's blocks.

  `mtp_grad_share` = |g_mtp| / (|g_ntp| + |g_mtp|) with lambda applied, and
  `mtp_grad_cosine` = cos(g_ntp, g_mtp). Both are exact, from two backward passes.
  """
  weights_M, _ = depth_weights(config.mtp, hyper.mtp_weight, step / hyper.num_steps)
  main_M = jnp.zeros_like(weights_M).at[0].set(1.0)
  # Of the whole model, and without the balance loss, which is neither of the two.
  moe = dataclasses.replace(config.trunk.moe, balance_weight=0.0)
  config = dataclasses.replace(
    config,
    trunk=dataclasses.replace(config.trunk, moe=moe),
    train=dataclasses.replace(config.train, freeze_trunk=False),
  )
  # One after the other, by one function: traced once.
  both = jax.lax.map(
    lambda weights_M: loss_and_grads(config, params, batch, weights_M)[2]["trunk"],
    jnp.stack([main_M, weights_M - main_M]),
  )
  ntp, mtp = jax.tree.map(lambda x: x[0], both), jax.tree.map(lambda x: x[1], both)
  ntp_norm, mtp_norm = optax.tree.norm(ntp), optax.tree.norm(mtp)
  tiny = jnp.finfo(jnp.float32).tiny
  dot = optax.tree.vdot(ntp, mtp)
  return {
    "mtp_grad_share": mtp_norm / jnp.maximum(ntp_norm + mtp_norm, tiny),
    "mtp_grad_cosine": dot / jnp.maximum(ntp_norm * mtp_norm, tiny),
  }


@functools.lru_cache(maxsize=32)
def programs(config: ProgramConfig, mesh: jax.sharding.Mesh) -> Programs:
  """Returns the jitted functions of trials with this `program.program_config`."""
  axes = logical_axes(accounting.abstract_params(config))
  chain = optimizer.make_optimizer(
    config.optimizer, optimizer.trainable(config, axes), config.mtp.detach
  )
  shardings = state_shardings(config, chain, mesh)
  # Initialisation runs once, so what counts is the time to compile it: without LLVM's
  # optimisations that is a third.
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  options = compiler_options(mesh)
  quick = (options or {}) | {"xla_backend_optimization_level": 0}
  return Programs(
    init=jax.jit(
      functools.partial(init_state, config, chain),
      out_shardings=shardings,
      compiler_options=quick if on_cpu else None,
    ),
    step=jax.jit(
      functools.partial(train_step, config),
      donate_argnums=0,
      out_shardings=(shardings, None),
      compiler_options=options,
    ),
    diagnostics=jax.jit(
      functools.partial(gradient_diagnostics, config), compiler_options=options
    ),
    shardings=shardings,
  )
