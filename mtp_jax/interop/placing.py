"""Stored tensors as parameters on a mesh: each device reads its own part alone."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import numpy as np

from mtp_jax import accounting
from mtp_jax.config import Config
from mtp_jax.interop.tensor_files import StoredTensor
from mtp_jax.interop.tensor_table import Entry, Piece, Shapes
from mtp_jax.sharding import logical_axes, tree_shardings, unbox


class _Source(NamedTuple):
  """A piece of a parameter, a function that opens it, and its tensor for messages."""

  piece: Piece
  open: Callable[[], np.ndarray]
  name: str


def assemble(
  boxed: Any,
  entries: Iterable[Entry],
  tensors: dict[str, StoredTensor],
  mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
  """Returns the parameters of the entries, float32, laid out on `mesh`."""
  shapes = shapes_of(boxed)
  sources: dict[str, list[_Source]] = {}
  for entry in entries:
    for i, piece in enumerate(entry.pieces):
      part = _part(tensors[entry.name], entry, i)
      source = _Source(piece, part, f"{tensors[entry.name].file}: {entry.name}")
      sources.setdefault(piece.path, []).append(source)
  layout = flat(tree_shardings(mesh, logical_axes(boxed)))
  params = {
    path: _place(shapes[path], layout[path], sources[path])
    for path in shapes
    if path in sources
  }
  return flax.traverse_util.unflatten_dict(params, sep="/")


def parameter_shapes(config: Config) -> Shapes:
  """Returns the shape of every parameter of `config`, by path."""
  return shapes_of(accounting.abstract_params(config))


def shapes_of(boxed: Any) -> Shapes:
  return {path: leaf.shape for path, leaf in flat(unbox(boxed)).items()}


def flat(tree: Any) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(tree, sep="/")


def _part(tensor: StoredTensor, entry: Entry, i: int) -> Callable[[], np.ndarray]:
  """Returns a function that returns piece i of a tensor, in our form."""
  widths = [p.form.stored_shape(p.shape)[-1] for p in entry.pieces]
  start, piece = sum(widths[:i]), entry.pieces[i]

  def open_part() -> np.ndarray:
    stored = tensor.open()[..., start : start + widths[i]]
    return piece.form.to_ours(stored, piece.shape)

  return open_part


def _place(
  shape: tuple[int, ...],
  sharding: jax.sharding.Sharding,
  pieces: list[_Source],
) -> jax.Array:
  """Returns one parameter; every device reads its own part."""
  read: dict[Any, np.ndarray] = {}  # Devices may hold the same part.

  def part(index: tuple[slice, ...]) -> np.ndarray:
    bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
    if bounds not in read:
      read[bounds] = _read(bounds, pieces)
    return read[bounds]

  return jax.make_array_from_callback(shape, sharding, part, dtype=np.float32)


def _read(
  bounds: tuple[tuple[int, int], ...],
  pieces: list[_Source],
) -> np.ndarray:
  """Returns the part of a parameter between `bounds`, read from its pieces."""
  part = np.empty([end - start for start, end in bounds], np.float32)
  for piece, open_part, name in pieces:
    depth = len(piece.index)
    if all(a <= i < b for i, (a, b) in zip(piece.index, bounds, strict=False)):
      at = tuple(i - a for i, (a, _) in zip(piece.index, bounds, strict=False))
      inner = tuple(slice(*bound) for bound in bounds[depth:])
      part[at] = open_part()[inner]
      if not np.all(np.isfinite(part[at])):
        warnings.warn(f"{name} has values that are not finite.", stacklevel=2)
  return part
