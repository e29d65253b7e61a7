"""Trials of one shape side by side: one program for all of them.

A small model leaves most of an accelerator idle, and most of its step is the time that
it takes to start kernels. Trials that differ in traced values alone (learning rate,
lambda, seed, number of steps) can take their steps together, every kernel serving all
of them: `Stacked`. They never meet in a sum, so each is trained as it would be alone,
but for the order in which its products are summed.

XLA for CPU is slower at many small products at once than at one after the other. There
the program of the lone trial is called for each, bit for bit as alone: `Separate`. A
step alone does not keep all cores busy, so several are under way at once.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.batch import Batch
from mtp_jax.config import Config
from mtp_jax.environment import cpu_cores
from mtp_jax.model.lm import zeros_batch
from mtp_jax.sharding import (
  make_mesh,
  make_trial_mesh,
  map_over_trial_devices,
  platform,
  put_batch,
  replicated,
  split_by_trial,
)
from mtp_jax.train_state import Hyperparameters, TrainState, hyperparameters
from mtp_jax.train_step import compiled, programs, shape_of, train_step

_LARGEST_SHARE = 0.8


class Pack(Protocol):
  """The states of some trials, and how they take their steps."""

  def put(self, batches: Sequence[Batch]) -> Any:
    """Returns the batch of a step, of one [A, B / A, ...] for all or one for each."""

  def compile(self, batch: Any) -> Any:
    """Compiles the step for such batches, and returns the executable."""

  def step(self, batch: Any, active: dict[int, bool]) -> Any:
    """Starts a step of the active trials; returns what to wait for.

    `active` says by index whether an interval of the log starts. The others stay as
    they are.
    """

  def report(self, index: int) -> dict[str, Any]:
    """Returns the report of an active trial on the last step; waits for it."""

  def state(self, index: int) -> TrainState:
    """Returns the state of one trial, on the device that it is trained on."""


def make_pack(
  shape: Config,
  states: Sequence[TrainState],
  hypers: Sequence[Hyperparameters],
  size: int,
  devices: Sequence[jax.Device],
) -> Pack:
  """Returns the pack of some trials.

  Args:
    shape: of all of them, from `train_step.shape_of`.
    states: one for each, on the host.
    hypers: one for each.
    size: trials that the program is made for, at least as many as there are. Places
      without a trial are never active.
    devices: at most as many as `size` are used.
  """
  if size < len(states):
    raise ValueError(f"size must be at least {len(states)}, got {size}.")
  if _are_separate(devices):
    return Separate(shape, states, hypers, devices[0])
  return Stacked(shape, states, hypers, size, devices)


def _are_separate(devices: Sequence[jax.Device]) -> bool:
  return platform() == "cpu" and len(devices) == 1


class Separate(Pack):
  """Trials that take their steps apart, one for each core at once; see `make_pack`."""

  def __init__(
    self,
    shape: Config,
    states: Sequence[TrainState],
    hypers: Sequence[Hyperparameters],
    device: jax.Device,
  ):
    self._mesh = make_mesh(shape.mesh, [device])
    self._programs = programs(shape, self._mesh)
    self._states = [jax.device_put(x, self._programs.shardings) for x in states]
    self._hypers = [jax.device_put(x, replicated(self._mesh)) for x in hypers]
    self._reports: dict[int, dict[str, jax.Array]] = {}
    self._program: Any = None
    # JAX runs what one thread starts on a CPU device one after the other, and what
    # several threads start at once.
    num_threads = min(len(cpu_cores()), len(states))
    self._threads = [ThreadPoolExecutor(1) for _ in range(num_threads)]

  def put(self, batches: Sequence[Batch]) -> list[Batch]:
    placed = [put_batch(self._mesh, x, ("microbatch",)) for x in batches]
    return placed * len(self._states) if len(placed) == 1 else placed

  def compile(self, batch: list[Batch]) -> Any:
    with jax.set_mesh(self._mesh):
      self._program = compiled(
        self._programs.step, self._states[0], batch[0], self._hypers[0], np.bool_(True)
      )
    return self._program

  def step(self, batch: list[Batch], active: dict[int, bool]) -> list[jax.Array]:
    def start(trials: list[int]) -> None:
      for i in trials:
        self._states[i], self._reports[i] = self._program(
          self._states[i], batch[i], self._hypers[i], np.bool_(active[i])
        )

    started = [
      thread.submit(start, list(active)[i :: len(self._threads)])
      for i, thread in enumerate(self._threads)
    ]
    for share in started:
      share.result()
    return [self._reports[i]["loss_total"] for i in active]

  def report(self, index: int) -> dict[str, Any]:
    return jax.device_get(self._reports[index])

  def state(self, index: int) -> TrainState:
    return self._states[index]


class Stacked(Pack):
  """Trials that take their steps in one program, spread over devices; see `make_pack`.

  Their number is rounded up to a multiple of the devices.
  """

  def __init__(
    self,
    shape: Config,
    states: Sequence[TrainState],
    hypers: Sequence[Hyperparameters],
    size: int,
    devices: Sequence[jax.Device],
  ):
    self._shape, self._mesh = shape, make_trial_mesh(devices[:size])
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
    if len(batches) == 1:
      return jax.device_put(batches[0], replicated(self._mesh))
    return self._stack(batches)

  def compile(self, batch: Batch) -> Any:
    with jax.set_mesh(self._mesh):
      program = stacked_step(self._shape, self._mesh, batch.tokens.ndim == 3)
      self._program = compiled(program, *self._arguments(batch, {}))
    return self._program

  def step(self, batch: Batch, active: dict[int, bool]) -> jax.Array:
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
    if self._fetched is None:  # Those of all trials in one go.
      self._fetched = jax.device_get(self._report)
    return jax.tree.map(lambda x: x[index], self._fetched)

  def state(self, index: int) -> TrainState:
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
def stacked_step(shape: Config, mesh: jax.sharding.Mesh, shares_batch: bool) -> Any:
  """Returns the jitted step of stacked trials, of any number.

  It takes what `train_step` takes, stacked, but for a batch that they share; and which
  trials are active. The others stay as they are, and their reports hold nothing.
  """
  if shape.trunk.attention in ("auto", "cudnn", "tokamax"):
    # cuDNN's attention cannot be vmapped with a mask, and tokamax's only on one device.
    trunk = dataclasses.replace(shape.trunk, attention="xla")
    shape = dataclasses.replace(shape, trunk=trunk)

  def step(
    state: TrainState,
    batch: Batch,
    hyper: Hyperparameters,
    starts_interval: jax.Array,
    is_active: jax.Array,
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    new, report = train_step(shape, state, batch, hyper, starts_interval)
    keep = lambda new, old: jnp.where(is_active, new, old)  # noqa: E731
    return jax.tree.map(keep, new, state), report

  steps = jax.vmap(step, (0, None if shares_batch else 0, 0, 0, 0))
  are_split = (True, not shares_batch, True, True, True)
  return jax.jit(
    map_over_trial_devices(steps, mesh, are_split),
    donate_argnums=0,
    out_shardings=split_by_trial(mesh),
  )


def fitting_size(config: Config, most: int, devices: Sequence[jax.Device]) -> int:
  """Returns how many trials of a config's shape fit the devices' memory at once.

  By XLA's own analysis of the compiled step: of a stacked one for `most` trials, then
  for fewer until they fit. It may take 80 % of a device, for evaluation and saving need
  memory too. On one CPU a trial gains from others only where it leaves cores idle, so
  there are no more of them than cores.

  Args:
    config: resolved; the trials share their batches.
    most: the answer is not larger.
    devices: as in `make_pack`.
  """
  shape = shape_of(config)
  mesh = make_mesh(shape.mesh, devices[:1])
  rows = zeros_batch(shape, shape.data.batch_size)
  microbatches = shape.train.accumulation_steps
  batch = jax.tree.map(lambda x: x.reshape(microbatches, -1, x.shape[-1]), rows)
  one = programs(shape, mesh)
  state = jax.eval_shape(one.init, np.int32(0))
  hyper, flag = hyperparameters(config), np.bool_(True)
  room = _LARGEST_SHARE * _memory(devices[0])
  if _are_separate(devices):
    arguments = _abstract((state, batch, hyper), replicated(mesh))
    with jax.set_mesh(mesh):
      memory = compiled(one.step, *arguments, flag).memory_analysis()
    fitting = int(room / (memory.argument_size_in_bytes + memory.temp_size_in_bytes))
    return max(1, min(most, fitting, len(cpu_cores())))
  size = most
  while size > 1:
    mesh = make_trial_mesh(devices[:size])
    states, *others = _abstract(
      (state, hyper, flag, flag), split_by_trial(mesh), (_num_places(size, mesh),)
    )
    shared = _abstract(batch, replicated(mesh))
    with jax.set_mesh(mesh):
      program = stacked_step(shape, mesh, True)
      memory = compiled(program, states, shared, *others).memory_analysis()
    needed = (
      memory.argument_size_in_bytes + memory.temp_size_in_bytes
      + memory.output_size_in_bytes - memory.alias_size_in_bytes
    )
    if needed <= room:
      return size
    size = max(1, min(size - 1, int(size * room / needed)))
  return 1


def _abstract(
  tree: Any, sharding: jax.sharding.Sharding, leading: tuple[int, ...] = ()
) -> Any:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype, sharding=sharding),
    tree,
  )


def _memory(device: jax.Device) -> float:
  """Returns the bytes of a device; on CPU, this process's share of what is free."""
  if device.platform != "cpu":
    return device.memory_stats()["bytes_limit"]
  free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  with contextlib.suppress(OSError):  # What the page cache has counts there.
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = dict(line.split(":") for line in lines)
    free = int(sizes["MemAvailable"].split()[0]) * 1024
  return free * len(cpu_cores()) / (os.cpu_count() or 1)
