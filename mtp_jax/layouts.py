"""How the layers run on a GPU: the fastest way that memory holds.

`trunk.scan_layers=auto` and `trunk.remat=auto` leave it open. XLA's own analysis of the
compiled step decides, from the fastest way on; `TrunkConfig.layouts` has their order.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from mtp_jax.batch import Batch
from mtp_jax.environment import device_memory
from mtp_jax.executables import compiled
from mtp_jax.lm import zeros_batch
from mtp_jax.program import ProgramConfig
from mtp_jax.sharding import batch_shardings, max_over_processes, replicated
from mtp_jax.train_state import Hyperparameters, TrainState
from mtp_jax.train_step import programs

# Of a device's memory: evaluation and saving need some as well.
LARGEST_SHARE = 0.8
_MEGABYTE = 1 << 20


def layouts(config: ProgramConfig) -> Iterator[ProgramConfig]:
  """Yields the config with each way to run its layers that it leaves open."""
  for trunk in config.trunk.layouts:
    yield dataclasses.replace(config, trunk=trunk)


@functools.lru_cache(maxsize=32)
def fastest_that_fits(
  config: ProgramConfig, mesh: jax.sharding.Mesh
) -> ProgramConfig:
  """Returns the config whose step is the fastest that the devices' memory holds.

  Steps are compiled until one fits; the last is not asked. It is kept for the run. On
  other platforms than GPUs the config stays as it is.
  """
  trunk = config.trunk
  is_gpu = mesh.devices.flat[0].platform == "gpu"
  if not is_gpu or "auto" not in (trunk.scan_layers, trunk.remat):
    return config
  # All processes must compile the same programs: the smallest memory counts.
  memory = -int(max_over_processes(-(device_memory() // _MEGABYTE))) * _MEGABYTE
  *others, last = layouts(config)
  inputs = abstract_inputs(config, mesh)
  for way in others:
    with jax.set_mesh(mesh):
      step = compiled(programs(way, mesh).step, *inputs)
    if peak_bytes(step) <= LARGEST_SHARE * memory:
      return way
  return last


def peak_bytes(executable: jax.stages.Compiled) -> int:
  """Returns what a program needs of a device's memory.

  That is arguments, results that do not reuse them, temporaries and code.
  """
  memory = executable.memory_analysis()
  new = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return (
    memory.argument_size_in_bytes + new + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
  )


def abstract_state(config: ProgramConfig, mesh: jax.sharding.Mesh) -> TrainState:
  """Returns the state of a run as shapes with shardings."""
  with jax.set_mesh(mesh):  # The platform decides on dtypes and kernels.
    train = programs(config, mesh)
    state = jax.eval_shape(train.init, np.int32(0))
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    state,
    train.shardings,
  )


def abstract_inputs(
  config: ProgramConfig, mesh: jax.sharding.Mesh, has_unscored: bool = False
) -> tuple[Any, ...]:
  """Returns the arguments of `programs(config, mesh).step` as shapes with shardings.

  `has_unscored`: see `zeros_batch`.
  """
  steps = config.train.accumulation_steps
  rows = config.data.batch_size // steps

  def scalar(dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), dtype, sharding=replicated(mesh))

  return (
    abstract_state(config, mesh),
    abstract_batch(config, mesh, rows, has_unscored, {"microbatch": steps}),
    Hyperparameters(*[scalar(np.float32)] * 3),
    scalar(np.bool_),
  )


def abstract_batch(
  config: ProgramConfig,
  mesh: jax.sharding.Mesh,
  rows: int,
  has_unscored: bool = False,
  leading: Mapping[str, int] = {},
) -> Batch:
  """Returns a batch as shapes with shardings; `leading`: axes before the batch axis."""
  batch = jax.eval_shape(lambda: zeros_batch(config, rows, has_unscored))
  shardings = batch_shardings(mesh, batch._fields, tuple(leading))
  sizes = tuple(leading.values())
  return type(batch)(**{
    name: jax.ShapeDtypeStruct((*sizes, *x.shape), x.dtype, sharding=shardings[name])
    for name, x in batch.arrays().items()
  })
