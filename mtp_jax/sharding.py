"""Device mesh, the table from logical to mesh axes, and the checked look-up.

Modules name what a dimension *is* (`"embed"`, `"seq"`); this file alone knows which
mesh axis that lies on, and is the only one with a `PartitionSpec`. An unknown name
raises: Flax on its own would quietly replicate it.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mtp_jax.config import ConfigError, MeshConfig

MESH_AXES = ("data", "fsdp", "tensor", "context")

# Logical axis -> mesh axis or axes. Parameters use the first block, activations both.
AXIS_RULES: dict[str, str | tuple[str, ...] | None] = {
  "embed": "fsdp",
  "embed_out": None,  # Second embed-sized dim of a square matrix.
  "concat": None,  # The 2d inputs of a sequential module's projection.
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "mlp": "tensor",
  "vocab": "tensor",
  "position": None,
  "norm": None,
  "layers": None,
  "depths": None,
  "microbatch": None,
  "batch": ("data", "fsdp"),
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
  fixed = config.fsdp * config.tensor * config.context
  data = len(devices) // fixed if config.data == -1 else config.data
  if data * fixed != len(devices):
    raise ConfigError(
      f"mesh must fill the {len(devices)} device(s): data={config.data}, "
      f"fsdp={config.fsdp}, tensor={config.tensor}, context={config.context}."
    )
  return jax.make_mesh(
    (data, config.fsdp, config.tensor, config.context),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
    devices=devices,
  )


def _current_mesh() -> jax.sharding.AbstractMesh | None:
  """The mesh set by `jax.set_mesh`, or None where there is nothing to distribute."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 else mesh


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pins the layout of an activation; does nothing on a single device."""
  if len(axes) != x.ndim:
    raise ValueError(f"logical axes {axes} do not fit shape {x.shape}.")
  spec = partition_spec(axes)
  return x if _current_mesh() is None else jax.lax.with_sharding_constraint(x, spec)


def _token_axes() -> tuple[str, ...]:
  """The axes of the mesh in use that hold different tokens on their devices."""
  mesh = _current_mesh()
  carriers = ("data", "fsdp", "context")
  return () if mesh is None else tuple(a for a in carriers if mesh.shape[a] > 1)


def map_over_tokens(
  function: Callable[..., Any], in_axes: tuple[Any, ...], out_axes: Any
) -> Callable[..., Any]:
  """Runs `function` on every device's own tokens; it may `psum_tokens` its results.

  `in_axes` and `out_axes` are (pytrees of) tuples of logical axes. Only the axes that
  carry tokens (batch, seq) are split; vocabulary shards stay with the compiler.
  """
  token_axes = _token_axes()
  if not token_axes:
    return function

  def token_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    # Mapped axes of size 1 are left out: XLA's partitioner fails on them.
    spec = partition_spec(tuple(a if a in ("batch", "seq") else None for a in axes))
    kept = (tuple(a for a in np.atleast_1d(e) if a in token_axes) for e in spec)
    return PartitionSpec(*(names or None for names in kept))

  is_axes = lambda node: isinstance(node, tuple) and not any(  # noqa: E731
    isinstance(child, tuple) for child in node
  )
  return jax.shard_map(
    function,
    in_specs=jax.tree.map(token_spec, in_axes, is_leaf=is_axes),
    out_specs=jax.tree.map(token_spec, out_axes, is_leaf=is_axes),
    axis_names=frozenset(token_axes),
    check_vma=False,
  )


def psum_tokens(x: Any) -> Any:
  """Sums over the devices that hold different tokens, inside `map_over_tokens`."""
  token_axes = _token_axes()
  return jax.lax.psum(x, token_axes) if token_axes else x


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


def put_batch(
  mesh: Mesh, batch: Any, leading: tuple[str, ...] = (), is_whole: bool = False
) -> Any:
  """Returns the global device arrays of this process's rows of a `Batch`.

  Rows lie on `batch`; the row axis of `tokens`, `segment_ids` and `positions` on `seq`.
  `leading` names axes before the batch axis (`("microbatch",)` under accumulation).
  `is_whole`: every process has all rows, the same ones.
  """

  def sharding(name: str) -> NamedSharding:
    last = None if name.startswith("next_") else "seq"
    return NamedSharding(mesh, partition_spec((*leading, "batch", last)))

  arrays = batch._asdict()
  shapes = {name: value.shape if is_whole else None for name, value in arrays.items()}
  # All in one call: each one takes as long as all together.
  arrays = jax.make_array_from_process_local_data(
    {name: sharding(name) for name in arrays}, arrays, shapes
  )
  return type(batch)(**arrays)


def _is_box(node: Any) -> bool:
  return isinstance(node, nn.Partitioned)
