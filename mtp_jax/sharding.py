"""Device mesh, the table from logical to mesh axes, and the checked look-up.

Modules name what a dimension *is* (`"embed"`, `"seq"`); this file alone knows which
mesh axis that lies on, and is the only one with a `PartitionSpec`. An unknown name
raises: Flax on its own would quietly replicate it.
"""

import functools
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
TRIAL_AXIS = "trial"  # Of a pack, whose mesh has no other.

# Logical axis -> mesh axis or axes. Parameters use the first block, activations both.
AXIS_RULES: dict[str, str | tuple[str, ...] | None] = {
  "embed": "fsdp",
  "embed_out": None,  # Second embed-sized dim of a square matrix.
  "concat": None,  # Inputs of a projection that are states and embeddings joined.
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "rank": None,  # The compressed query, key and value of latent attention, as outputs
  "rank_in": "fsdp",  # of a matrix, and as the inputs of the one that follows.
  "mlp": "tensor",
  "experts": "expert",
  "router": None,  # The experts as outputs of the router: few, and needed by all.
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
  # A mesh axis may be a part of an axis of a TPU slice: 8 x 8 chips of 4 x 4 x 4.
  grid = mesh_utils.create_device_mesh(
    (data, config.fsdp, config.expert, config.tensor, config.context),
    devices,
    allow_split_physical_axes=True,
  )
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def make_trial_mesh(devices: Sequence[jax.Device]) -> Mesh:
  """Returns the mesh of a pack: trials are spread over it, each on one device."""
  return Mesh(np.array(devices), (TRIAL_AXIS,), axis_types=(AxisType.Auto,))


def split_by_trial(mesh: Mesh) -> NamedSharding:
  """Returns how arrays lie whose first axis is that of the trials of a pack."""
  return NamedSharding(mesh, PartitionSpec(TRIAL_AXIS))


def map_over_trial_devices(
  function: Callable[..., Any], mesh: Mesh, are_split: tuple[bool, ...]
) -> Callable[..., Any]:
  """Runs `function` on every device's own trials of a pack.

  `are_split` says of each argument whether its first axis is that of the trials, as
  that of all results is; the others are whole on every device.
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


def abstract_mesh(config: MeshConfig) -> jax.sharding.AbstractMesh:
  """Returns the mesh of no devices, to trace with; `data = -1` counts as 1."""
  return jax.sharding.AbstractMesh(
    tuple(abs(getattr(config, axis)) for axis in MESH_AXES),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
  )


def num_row_shards(mesh: Mesh | jax.sharding.AbstractMesh) -> int:
  """Returns over how many devices the rows of a batch are spread."""
  return mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]


def _current_mesh() -> jax.sharding.AbstractMesh | None:
  """The mesh set by `jax.set_mesh`, or None where there is nothing to distribute.

  That of a pack distributes trials, not what is computed in one of them.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 or TRIAL_AXIS in mesh.shape else mesh


def platform() -> str:
  """Returns the platform that programs are made for: `cpu`, `gpu`, `tpu`, ...

  That of JAX's default backend, but for a mesh in use of TPUs: programs for those can
  be compiled on machines without any.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  is_tpu = device is not None and device.device_kind.startswith("TPU")
  return "tpu" if is_tpu else jax.default_backend()


def tokens_per_block(block_tokens: int, for_platform: str | None = None) -> int:
  """Returns `loss.block_tokens`, or what suits a platform if that is 0.

  By default it is that of `platform`.

  On a CPU a block of logits is to fit into its caches; elsewhere larger blocks add to
  the gradient of the output matrix less often.
  """
  return block_tokens or (1024 if (for_platform or platform()) == "cpu" else 4096)


def fewest_rows() -> int:
  """Returns how many rows a batch must have at least for the mesh in use."""
  mesh = _current_mesh()
  return 1 if mesh is None else num_row_shards(mesh)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pins the layout of an activation; does nothing on a single device."""
  if len(axes) != x.ndim:
    raise ValueError(f"logical axes {axes} do not fit shape {x.shape}.")
  spec = partition_spec(axes)
  return x if _current_mesh() is None else jax.lax.with_sharding_constraint(x, spec)


def _token_axes() -> tuple[str, ...]:
  """The axes of the mesh in use that hold different tokens on their devices."""
  mesh = _current_mesh()
  carriers = ("data", "fsdp", "expert", "context")
  return () if mesh is None else tuple(a for a in carriers if mesh.shape[a] > 1)


def map_over_tokens(
  function: Callable[..., Any], in_axes: tuple[Any, ...], out_axes: Any
) -> Callable[..., Any]:
  """Runs `function` on every device's own tokens; it may `psum_tokens` its results.

  `in_axes` and `out_axes` are (pytrees of) tuples of logical axes. Only the axes that
  carry tokens (batch, seq) are split; vocabulary shards stay with the compiler.
  """
  is_token_axis = lambda name: name in ("batch", "seq")  # noqa: E731
  keep = lambda axes: tuple(a if is_token_axis(a) else None for a in axes)  # noqa: E731
  return _map_over_devices(function, in_axes, out_axes, _token_axes(), keep)


def map_over_shards(
  function: Callable[..., Any], in_axes: tuple[Any, ...], out_axes: Any
) -> Callable[..., Any]:
  """Runs `function` on every device's own part of every array, as the table splits it.

  The function joins parts itself, with `gather_shards` and the sums below it. What
  `out_axes` does not split must be equal on the devices.
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
  """Maps over `mesh_axes`, with the arrays split along the logical axes that remain."""
  if not mesh_axes:
    return function

  def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    # Mapped axes of size 1 are left out: XLA's partitioner fails on them.
    entries = partition_spec(keep(axes))
    kept = (tuple(a for a in np.atleast_1d(e) if a in mesh_axes) for e in entries)
    return PartitionSpec(*(names or None for names in kept))

  is_axes = lambda node: isinstance(node, tuple) and not any(  # noqa: E731
    isinstance(child, tuple) for child in node
  )
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
  """As `sum_shards`, but every device keeps only its own part of `dim`."""
  names = _split_axes(axis)
  if not names:
    return x
  return jax.lax.psum_scatter(x, names, scatter_dimension=dim, tiled=True)


def shard_index(axis: str) -> jax.Array | int:
  """Returns which part of a logical axis this device has, in `map_over_shards`."""
  names = _split_axes(axis)
  return jax.lax.axis_index(names) if names else 0


def _split_axes(axis: str) -> tuple[str, ...]:
  """The axes of the mesh in use that a logical axis is really split over."""
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
  """Returns the sharding that puts a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_shardings(
  mesh: Mesh, names: tuple[str, ...], leading: tuple[str, ...] = ()
) -> dict[str, NamedSharding]:
  """Returns how the fields of a `Batch` lie; `leading` names axes before the batch.

  Rows lie on `batch`; the row axis of `tokens` and what goes with them on `seq`.
  """
  last = lambda name: None if name.startswith("next_") else "seq"  # noqa: E731
  return {
    name: NamedSharding(mesh, partition_spec((*leading, "batch", last(name))))
    for name in names
  }


def put_batch(
  mesh: Mesh, batch: Any, leading: tuple[str, ...] = (), is_whole: bool = False
) -> Any:
  """Returns the global device arrays of this process's rows of a `Batch`.

  `leading` names axes before the batch axis (`("microbatch",)` under accumulation).
  `is_whole`: every process has all rows, the same ones.
  """

  def shape(x: np.ndarray) -> tuple[int, ...]:
    axis, count = len(leading), 1 if is_whole else row_share(mesh)[1]
    return (*x.shape[:axis], x.shape[axis] * count, *x.shape[axis + 1 :])

  arrays = batch.arrays()
  shapes = {name: shape(value) for name, value in arrays.items()}
  # All in one call: each one takes as long as all together.
  arrays = jax.make_array_from_process_local_data(
    batch_shardings(mesh, tuple(arrays), leading), arrays, shapes
  )
  return type(batch)(**arrays)


@functools.cache
def row_share(mesh: Mesh) -> tuple[int, int]:
  """Returns `(index, count)`: a batch has `count` parts, and this process needs one.

  Processes whose devices work on the same rows need the same part: those of one row of
  the mesh that is split by `tensor` or `context`.

  Raises:
    ConfigError: some processes share a part of their rows, but not all.
  """
  num_rows = num_row_shards(mesh)
  sharding = NamedSharding(mesh, partition_spec(("batch",)))
  rows: dict[int, set[int]] = {}
  for device, (index,) in sharding.devices_indices_map((num_rows,)).items():
    rows.setdefault(device.process_index, set()).add(index.start or 0)
  parts = sorted({tuple(sorted(x)) for x in rows.values()})
  if len(parts) * len(parts[0]) != num_rows or len({len(x) for x in parts}) > 1:
    raise ConfigError(
      "mesh must be such that two processes work on the same rows of a batch or on "
      f"none in common, and all on as many; got {dict(mesh.shape)} over "
      f"{len(rows)} processes."
    )
  return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def max_over_processes(value: int) -> jax.Array:
  """Returns, on every process, the largest of the processes' values.

  Every process must call it at the same place between its other programs. It does not
  wait for the answer; whoever reads it does.
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
