"""The program of a pack: one step of several trials, side by side.

A small model leaves most of an accelerator idle, and most of its step is the time that
it takes to start kernels. Trials that differ in traced values alone (learning rate,
lambda, seed, number of steps) can take their steps together, every kernel serving all
of them. No sum runs over trials, so each is trained as it would be alone, but for the
order in which its products are summed. `pack` trains with it.

A CPU gains nothing from a pack: XLA for CPU is slower at many small products at once
than at one after the other. There several processes train side by side instead
(`launch.sweep --parallel`).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.batch import Batch
from mtp_jax.config import Config, LossConfig, TrunkConfig
from mtp_jax.executables import compiled
from mtp_jax.kernels.grouped_matmul import choose_implementation
from mtp_jax.layouts import LARGEST_SHARE, peak_bytes
from mtp_jax.lm import zeros_batch
from mtp_jax.program import ProgramConfig, program_config
from mtp_jax.sharding import (
  make_mesh,
  make_trial_mesh,
  map_over_trial_devices,
  platform,
  replicated,
  split_by_trial,
  tokens_per_block,
)
from mtp_jax.train_state import Hyperparameters, TrainState, hyperparameters
from mtp_jax.train_step import programs, train_step


class Pack:
  """The states of some trials, which take their steps in one program.

  The trials are spread over the devices; their number is rounded up to a multiple of
  the number of devices.

  Args:
    config: of all trials, from `program.program_config`.
    states: one for each trial, on the host.
    hypers: one for each trial.
    size: trials that the program is made for, at least as many as there are. Places
      without a trial are never active.
    devices: at most `size` of them are used.
  """

  def __init__(
    self,
    config: ProgramConfig,
    states: Sequence[TrainState],
    hypers: Sequence[Hyperparameters],
    size: int,
    devices: Sequence[jax.Device],
  ):
    if size < len(states):
      raise ValueError(f"size must be at least {len(states)}, got {size}.")
    self._config, self._mesh = config, make_trial_mesh(devices[:size])
    self._size = _num_places(size, self._mesh)
    self._states, self._hyper = self._stack(states), self._stack(hypers)
    self._program = self._report = self._fetched = None

  def _stack(self, trees: Sequence[Any]) -> Any:
    """Puts the trees of all trials, and of the places without one, on the devices."""
    padded = [*trees, *trees[:1] * (self._size - len(trees))]
    return jax.device_put(
      jax.tree.map(lambda *leaves: np.stack(leaves), *padded),
      split_by_trial(self._mesh),
    )

  def put(self, batches: Sequence[Batch]) -> Batch:
    """Returns the batch of a step, of one [A, B / A, ...] for all or one for each."""
    if len(batches) == 1:
      return jax.device_put(batches[0], replicated(self._mesh))
    return self._stack(batches)

  def compile(self, batch: Batch) -> Any:
    """Compiles the step for such batches, and returns the executable."""
    with jax.set_mesh(self._mesh):
      program = stacked_step(self._config, self._mesh, batch.tokens.ndim == 3)
      self._program = compiled(program, *self._arguments(batch, {}))
    return self._program

  def step(self, batch: Batch, active: dict[int, bool]) -> jax.Array:
    """Starts a step of the active trials; returns what to wait for.

    `active`: by index, whether an interval of the log starts. The other trials stay
    as they are.
    """
    self._states, self._report = self._program(*self._arguments(batch, active))
    self._fetched = None
    return self._report["loss_total"]

  def _arguments(self, batch: Batch, active: dict[int, bool]) -> tuple[Any, ...]:
    is_active, starts = np.zeros((2, self._size), bool)
    is_active[list(active)] = True
    starts[list(active)] = list(active.values())
    flags = jax.device_put((starts, is_active), split_by_trial(self._mesh))
    return (self._states, batch, self._hyper, *flags)

  def report(self, index: int) -> dict[str, Any]:
    """Returns the report of an active trial on the last step; waits for it."""
    if self._fetched is None:  # The reports of all trials in one transfer.
      self._fetched = jax.device_get(self._report)
    return jax.tree.map(lambda x: x[index], self._fetched)

  def state(self, index: int) -> TrainState:
    """Returns the state of one trial, on the device that trains it."""
    per_device = self._size // self._mesh.size
    device = self._mesh.devices[index // per_device]

    def local(leaf: jax.Array) -> jax.Array:
      shards = leaf.addressable_shards
      return next(shard.data for shard in shards if shard.device == device)

    with jax.set_mesh(make_trial_mesh([device])):
      return _take(jax.tree.map(local, self._states), index % per_device)


@jax.jit
def _take(tree: Any, index: jax.Array) -> Any:
  return jax.tree.map(lambda x: x[index], tree)


def _num_places(size: int, mesh: jax.sharding.Mesh) -> int:
  return -(-size // mesh.size) * mesh.size


@functools.lru_cache(maxsize=32)
def stacked_step(
  config: ProgramConfig, mesh: jax.sharding.Mesh, shares_batch: bool
) -> Any:
  """Returns the jitted step of stacked trials, of any number.

  It takes what `train_step` takes, stacked, but for a batch that they share; and which
  trials are active. The others stay as they are, and their reports hold nothing.
  """

  def step(
    one: ProgramConfig,
    state: TrainState,
    batch: Batch,
    hyper: Hyperparameters,
    starts_interval: jax.Array,
    is_active: jax.Array,
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    new, report = train_step(one, state, batch, hyper, starts_interval)
    keep = lambda new, old: jnp.where(is_active, new, old)  # noqa: E731
    return jax.tree.map(keep, new, state), report

  def steps(*arguments: Any) -> Any:
    # A block of the loss has the logits of all trials of a device.
    trials = arguments[-1].size
    tokens = tokens_per_block(
      config.loss.block_tokens, config.tokenizer.vocab_size, trials
    )
    one = dataclasses.replace(
      config, trunk=_stackable(config.trunk), loss=LossConfig(block_tokens=tokens)
    )
    axes = (0, None if shares_batch else 0, 0, 0, 0)
    return jax.vmap(functools.partial(step, one), axes)(*arguments)

  are_split = (True, not shares_batch, True, True, True)
  return jax.jit(
    map_over_trial_devices(steps, mesh, are_split),
    donate_argnums=0,
    out_shardings=split_by_trial(mesh),
  )


def _stackable(trunk: TrunkConfig) -> TrunkConfig:
  """Returns the trunk with kernels that can be vmapped.

  cuDNN's attention cannot with a mask, tokamax's only on one device, and its products
  of experts not at all.
  """
  attention, moe = trunk.attention, trunk.moe
  if attention in ("auto", "cudnn", "cudnn_packed", "tokamax"):
    attention = "xla"
  if choose_implementation(moe.grouped_matmul, platform()) == "tokamax":
    moe = dataclasses.replace(moe, grouped_matmul="blocked")
  return dataclasses.replace(trunk, attention=attention, moe=moe)


def abstract_inputs(
  config: Config, size: int, mesh: jax.sharding.Mesh
) -> tuple[Any, ...]:
  """Returns the shapes of what `stacked_step` takes, for trials that share batches."""
  program = program_config(config)
  alone = make_mesh(program.mesh, mesh.devices[:1].tolist())

  def microbatches() -> Batch:
    count = program.train.accumulation_steps
    rows = zeros_batch(program, program.data.batch_size)
    return jax.tree.map(lambda x: x.reshape(count, -1, x.shape[-1]), rows)

  batch = jax.eval_shape(microbatches)
  with jax.set_mesh(alone):
    state = jax.eval_shape(programs(program, alone).init, np.int32(0))
  flag = np.bool_(True)
  states, *others = _abstract(
    (state, hyperparameters(config), flag, flag), split_by_trial(mesh),
    (_num_places(size, mesh),),
  )
  return states, _abstract(batch, replicated(mesh)), *others


def fitting_size(config: Config, most: int, devices: Sequence[jax.Device]) -> int:
  """Returns how many trials of a config's program fit the devices' memory at once.

  XLA's own analysis of the compiled step decides: of a pack of `most` trials, then of
  smaller packs until one fits. A pack may take 80 % of a device, because evaluation and
  saving need memory too. On a CPU the answer is 1: a pack gains nothing there.

  Args:
    config: resolved; the trials share their batches.
    most: the answer is not larger.
    devices: as in `Pack`.
  """
  if platform() == "cpu":
    return 1
  program = program_config(config)
  room = LARGEST_SHARE * device_memory(devices[0])
  size = most
  while size > 1:
    mesh = make_trial_mesh(devices[:size])
    with jax.set_mesh(mesh):
      step = stacked_step(program, mesh, True)
      executable = compiled(step, *abstract_inputs(config, size, mesh))
    needed = peak_bytes(executable)
    if needed <= room:
      return size
    # Memory grows about linearly with the trials.
    size = max(1, min(size - 1, int(size * room / needed)))
  return 1


def device_memory(device: jax.Device) -> int:
  """Returns the bytes of memory of an accelerator."""
  return device.memory_stats()["bytes_limit"]


def _abstract(
  tree: Any, sharding: jax.sharding.Sharding, leading: tuple[int, ...] = ()
) -> Any:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype, sharding=sharding),
    tree,
  )
