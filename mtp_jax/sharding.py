"""Device mesh, and the table from logical axes of arrays to axes of the mesh.

Modules name the dimensions of their arrays (`"embed"`, `"seq"`). Only this file maps
names to mesh axes and has a `PartitionSpec`. An unknown name raises an error; Flax on
its own would silently replicate the dimension.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mtp_jax.config import ConfigError, MeshConfig

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")
_OPTIONS = {
  # XLA for CPU may start the collectives of a program in another order on each device
  # of a process. With few cores these devices then wait for each other without end.
  "cpu": {"xla_cpu_enable_concurrency_optimized_scheduler": False},
  # Collectives run beside kernels, in larger pieces; MaxText sets the same.
  "gpu": {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_enable_while_loop_double_buffering": True,
    "xla_gpu_all_gather_combine_threshold_bytes": 128 << 20,
    "xla_gpu_all_reduce_combine_threshold_bytes": 128 << 20,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 64 << 20,
  },
}
TRIAL_AXIS = "trial"  # The only axis of the mesh of a pack.

_BLOCK_BYTES = 1 << 30  # Of the logits of a block, on accelerators.

# Logical axis -> mesh axis or axes. From `microbatch` on: activations only.
AXIS_RULES: dict[str, str | tuple[str, ...] | None] = {
  "embed": "fsdp",
  "embed_out": None,  # Second embed-sized dim of a square matrix.
  "concat": None,  # Input of a projection: state and embedding, concatenated.
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "rank": None,  # Compressed vectors of latent attention as outputs of a matrix,
  "rank_in": "fsdp",  # and as inputs of the next matrix.
  "mlp": "tensor",
  "experts": "expert",
  "router": None,  # Experts, as outputs of the router: few, and needed by all devices.
  "vocab": "tensor",
  "position": None,
  "norm": None,
  "layers": None,
  "depths": None,
  "microbatch": None,
  "batch": ("data", "fsdp", "expert"),
  "seq": "context",
  "kv_seq": None,  # Keys and values are gathered over the sequence for attention.
  "act_embed": None,
}


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
  """Returns the PartitionSpec of logical `axes`.

  Raises:
    KeyError: a name that `AXIS_RULES` lacks.
    ValueError: two dimensions of one array on the same mesh axis.
  """
  spec = []
  for axis in axes:
    if axis is not None and axis not in AXIS_RULES:
      raise KeyError(f"logical axis {axis!r} is not in AXIS_RULES (axes {axes}).")
    spec.append(None if axis is None else AXIS_RULES[axis])
  used = [name for entry in spec if entry for name in np.atleast_1d(entry)]
  if len(used) != len(set(used)):
    raise ValueError(f"logical axes {axes} use one mesh axis twice: {spec}.")
  return PartitionSpec(*spec)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
  """Returns a mesh with axes `MESH_AXES` over all (or the given) devices.

  Raises:
    ConfigError: the mesh does not fit the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  fixed = config.fsdp * config.expert * config.tensor * config.context
  data = len(devices) // fixed if config.data == -1 else config.data
  if data * fixed != len(devices):
    raise ConfigError(
      f"mesh must fill the {len(devices)} device(s): data={config.data}, "
      f"fsdp={config.fsdp}, expert={config.expert}, tensor={config.tensor}, "
      f"context={config.context}."
    )
  # Lets a mesh axis be part of an axis of a TPU slice: 8 x 8 of 4 x 4 x 4 chips.
  grid = mesh_utils.create_device_mesh(
    (data, config.fsdp, config.expert, config.tensor, config.context),
    devices,
    allow_split_physical_axes=True,
  )
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def make_trial_mesh(devices: Sequence[jax.Device]) -> Mesh:
  """Returns the mesh of a pack: each trial is on one device."""
  return Mesh(np.array(devices), (TRIAL_AXIS,), axis_types=(AxisType.Auto,))


def split_by_trial(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays whose first axis is the trials of a pack."""
  return NamedSharding(mesh, PartitionSpec(TRIAL_AXIS))


def map_over_trial_devices(
  function: Callable[..., Any], mesh: Mesh, are_split: tuple[bool, ...]
) -> Callable[..., Any]:
  """Returns `function` mapped over devices, each with its own trials of a pack.

  `are_split`: for each argument, whether its first axis is the trials; other arguments
  are whole on every device. The first axis of all results is the trials.
  """
  if mesh.size == 1:
    return function
  return jax.shard_map(
    function,
    mesh=mesh,
    in_specs=tuple(PartitionSpec(TRIAL_AXIS if split else None) for split in are_split),
    out_specs=PartitionSpec(TRIAL_AXIS),
    check_vma=False,
  )


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
  """Returns the options with which programs on a mesh of several devices are compiled.

  A flag that XLA_FLAGS names keeps its value.
  """
  platform = mesh.devices.flat[0].platform
  is_one = (mesh.local_mesh if platform == "cpu" else mesh).size == 1
  options = {} if is_one else _OPTIONS.get(platform, {})
  given = os.environ.get("XLA_FLAGS", "")
  return {k: v for k, v in options.items() if f"--{k}=" not in given} or None


def num_row_shards(mesh: Mesh | jax.sharding.AbstractMesh) -> int:
  """Returns the number of parts into which the rows of a batch are split."""
  return mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]


def _current_mesh() -> jax.sharding.AbstractMesh | None:
  """Returns the mesh of `jax.set_mesh`; None if one device computes everything.

  In a pack, too, one device computes everything of its trials.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 or TRIAL_AXIS in mesh.shape else mesh


def platform() -> str:
  """Returns the platform that programs are compiled for: `cpu`, `gpu`, `tpu`, ...

  It is the platform of the mesh in use, whose devices this machine need not have; JAX's
  default backend where no mesh is in use.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
  """Returns what the maker calls the devices of `platform`, as `NVIDIA H200`."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return (jax.devices()[0] if device is None else device).device_kind


def tokens_per_block(block_tokens: int, vocab: int, trials: int = 1) -> int:
  """Returns `loss.block_tokens`; if that is 0, a default of the platform.

  On a CPU a block of logits should fit into the caches. Elsewhere larger blocks mean
  fewer kernels and fewer additions to the gradient of the output matrix: a block has
  1 GiB of float32 logits, of all `trials` that take a step side by side.
  """
  if block_tokens or platform() == "cpu":
    return block_tokens or 1024
  return max(1, _BLOCK_BYTES // (4 * vocab * trials))


def fewest_rows() -> int:
  """Returns the smallest number of rows of a batch on the mesh in use."""
  mesh = _current_mesh()
  return 1 if mesh is None else num_row_shards(mesh)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pins the layout of an activation; does nothing on a single device."""
  if len(axes) != x.ndim:
    raise ValueError(f"logical axes {axes} do not fit shape {x.shape}.")
  spec = partition_spec(axes)
  return x if _current_mesh() is None else jax.lax.with_sharding_constraint(x, spec)


def _token_axes() -> tuple[str, ...]:
  """Returns the axes of the mesh in use along which devices hold different tokens."""
  mesh = _current_mesh()
  carriers = ("data", "fsdp", "expert", "context")
  return () if mesh is None else tuple(a for a in carriers if mesh.shape[a] > 1)


def map_over_tokens(
  function: Callable[..., Any], in_axes: tuple[Any, ...], out_axes: Any
) -> Callable[..., Any]:
  """Returns `function` mapped over devices, each with its own tokens.

  `in_axes` and `out_axes` are (pytrees of) tuples of logical axes. Only the axes of
  tokens (batch, seq) are split; the compiler handles other axes, such as the
  vocabulary. `function` may call `psum_tokens`.
  """

  def keep(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    return tuple(a if a in ("batch", "seq") else None for a in axes)

  return _map_over_devices(function, in_axes, out_axes, _token_axes(), keep)


def map_over_shards(
  function: Callable[..., Any], in_axes: tuple[Any, ...], out_axes: Any
) -> Callable[..., Any]:
  """Returns `function` mapped over devices, each with its own part of every array.

  Arrays are split as in `AXIS_RULES`. `function` joins parts itself, with
  `gather_shards`, `sum_shards` and `scatter_sum_shards`. Results must be equal along
  axes that `out_axes` does not split.
  """
  mesh = _current_mesh()
  split = () if mesh is None else tuple(a for a in MESH_AXES if mesh.shape[a] > 1)
  return _map_over_devices(function, in_axes, out_axes, split, lambda axes: axes)


def _map_over_devices(
  function: Callable[..., Any],
  in_axes: tuple[Any, ...],
  out_axes: Any,
  mesh_axes: tuple[str, ...],
  keep: Callable[[tuple[str | None, ...]], tuple[str | None, ...]],
) -> Callable[..., Any]:
  """Returns `function` mapped over `mesh_axes`; `keep` names the axes to split."""
  if not mesh_axes:
    return function

  def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    # Skips mesh axes of size 1: XLA's partitioner fails on them.
    entries = partition_spec(keep(axes))
    kept = (tuple(a for a in np.atleast_1d(e) if a in mesh_axes) for e in entries)
    return PartitionSpec(*(names or None for names in kept))

  def is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and not any(isinstance(x, tuple) for x in node)

  return jax.shard_map(
    function,
    in_specs=jax.tree.map(spec, in_axes, is_leaf=is_axes),
    out_specs=jax.tree.map(spec, out_axes, is_leaf=is_axes),
    axis_names=frozenset(mesh_axes),
    check_vma=False,
  )


def psum_tokens(x: Any) -> Any:
  """Sums over the devices that hold different tokens, inside `map_over_tokens`."""
  token_axes = _token_axes()
  return jax.lax.psum(x, token_axes) if token_axes else x


def gather_shards(x: jax.Array, axis: str, dim: int) -> jax.Array:
  """Joins along `dim` the parts that a logical axis splits, in `map_over_shards`."""
  names = _split_axes(axis)
  return jax.lax.all_gather(x, names, axis=dim, tiled=True) if names else x


def sum_shards(x: jax.Array, axis: str) -> jax.Array:
  """Sums over the devices that a logical axis is split over, in `map_over_shards`."""
  names = _split_axes(axis)
  return jax.lax.psum(x, names) if names else x


def scatter_sum_shards(x: jax.Array, axis: str, dim: int) -> jax.Array:
  """Sums as `sum_shards`, but each device keeps only its own part of `dim`."""
  names = _split_axes(axis)
  if not names:
    return x
  return jax.lax.psum_scatter(x, names, scatter_dimension=dim, tiled=True)


def shard_index(axis: str) -> jax.Array | int:
  """Returns the index of this device's part of a logical axis, in `map_over_shards`."""
  names = _split_axes(axis)
  return jax.lax.axis_index(names) if names else 0


def _split_axes(axis: str) -> tuple[str, ...]:
  """Returns the mesh axes, of size above 1, over which a logical axis is split."""
  mesh, (entry,) = _current_mesh(), partition_spec((axis,))
  if mesh is None or entry is None:
    return ()
  return tuple(str(a) for a in np.atleast_1d(entry) if mesh.shape[a] > 1)


def logical_axes(boxed: Any) -> Any:
  """Returns the tree of logical axes of a tree of `nn.Partitioned` parameters."""
  return jax.tree.map(lambda box: box.names, boxed, is_leaf=_is_box)


def unbox(boxed: Any) -> Any:
  """Returns the plain arrays of a tree of `nn.Partitioned` parameters."""
  return jax.tree.map(lambda box: box.value, boxed, is_leaf=_is_box)


def tree_shardings(mesh: Mesh, axes: Any) -> Any:
  """Returns the tree of NamedShardings for a tree of logical-axis tuples."""
  return jax.tree.map(
    lambda names: NamedSharding(mesh, partition_spec(names)),
    axes,
    is_leaf=lambda node: isinstance(node, tuple),
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding with a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_shardings(
  mesh: Mesh, names: tuple[str, ...], leading: tuple[str, ...] = ()
) -> dict[str, NamedSharding]:
  """Returns the shardings of the fields of a `Batch`.

  Axes are `leading`, then `batch`; then `seq` for fields of the row, and no split for
  fields of the tokens after the row.
  """

  def last(name: str) -> str | None:
    return None if name.startswith("next_") else "seq"

  return {
    name: NamedSharding(mesh, partition_spec((*leading, "batch", last(name))))
    for name in names
  }


def put_batch(
  mesh: Mesh, batch: Any, leading: tuple[str, ...] = (), is_whole: bool = False
) -> Any:
  """Returns a `Batch` of global device arrays, given this process's rows.

  `leading` names axes before the batch axis (`("microbatch",)` under accumulation).
  `is_whole`: every process passes all rows.
  """

  def shape(x: np.ndarray) -> tuple[int, ...]:
    axis, count = len(leading), 1 if is_whole else row_share(mesh)[1]
    return (*x.shape[:axis], x.shape[axis] * count, *x.shape[axis + 1 :])

  arrays = batch.arrays()
  shapes = {name: shape(value) for name, value in arrays.items()}
  # One call for all fields takes as long as one call per field.
  arrays = jax.make_array_from_process_local_data(
    batch_shardings(mesh, tuple(arrays), leading), arrays, shapes
  )
  return type(batch)(**arrays)


@functools.cache
def row_share(mesh: Mesh) -> tuple[int, int]:
  """Returns `(index, count)`: this process reads part `index` of `count` of a batch.

  Processes that differ only along `tensor` or `context` read the same part.

  Raises:
    ConfigError: two processes share some of their rows, but not all.
  """
  num_rows = num_row_shards(mesh)
  sharding = NamedSharding(mesh, partition_spec(("batch",)))
  rows: dict[int, set[int]] = {}
  for device, (index,) in sharding.devices_indices_map((num_rows,)).items():
    rows.setdefault(device.process_index, set()).add(index.start or 0)
  parts = sorted({tuple(sorted(x)) for x in rows.values()})
  if len(parts) * len(parts[0]) != num_rows or len({len(x) for x in parts}) > 1:
    raise ConfigError(
      "mesh must split a batch evenly over processes, so that two processes hold "
      "either the same rows or none in common; got "
      f"{dict(mesh.shape)} over {len(rows)} processes."
    )
  return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def max_over_processes(value: int) -> jax.Array:
  """Returns, on every process, the largest of the processes' values.

  Every process must call it at the same place between its other programs. The call does
  not wait; reading the result does.
  """
  mesh, program = _max_over_devices()
  values = np.full(jax.local_device_count(), value, np.int32)
  sharding = NamedSharding(mesh, PartitionSpec("device"))
  with jax.set_mesh(mesh):
    return program(jax.make_array_from_process_local_data(sharding, values))


@functools.cache
def _max_over_devices() -> tuple[Mesh, Any]:
  mesh = Mesh(np.array(jax.devices()), ("device",))
  return mesh, jax.jit(jnp.max, out_shardings=replicated(mesh))


def _is_box(node: Any) -> bool:
  return isinstance(node, nn.Partitioned)
