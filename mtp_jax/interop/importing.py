"""Model folders of other frameworks into our parameters.

`read_model` looks at config.json and the headers only; `load_params` puts every
parameter where the mesh wants it, reading no more than each device holds.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import numpy as np

from mtp_jax import accounting
from mtp_jax.config import PUBLISHED_INPUTS, Config, MtpConfig, next_token_only, to_dict
from mtp_jax.data.special_tokens import read_files
from mtp_jax.interop.drafter_config import check_drafter_config, drafter_obstacle
from mtp_jax.interop.errors import InteropError
from mtp_jax.interop.hf_config import (
  DRAFTERS,
  TrunkDescription,
  read_config,
  unpublished_inputs,
)
from mtp_jax.interop.tensor_files import (
  DTYPES,
  StoredTensor,
  read_header,
  read_json,
  stored_tensors,
)
from mtp_jax.interop.tensor_table import (
  CONCAT_ORDER,
  Entry,
  Piece,
  Shapes,
  tensor_table,
)
from mtp_jax.predictors import num_trunk_layers
from mtp_jax.sharding import logical_axes, tree_shardings, unbox

CONTRACT = "mtp_contract.json"
# Constants that older versions saved beside the parameters.
_BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")
# Longer texts and other schedules do not change what the parameters are.
_FREE = ("trunk.rope_theta", "trunk.rope_scaling.", "trunk.attention_dim")
_ROWS_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class HfModel:
  """A folder that can be read.

  family:     gpt2 | llama | qwen2 | qwen3 | deepseek_v3 | mimo.
  overrides:  dotted config keys and values that describe the trunk, the vocabulary and,
              where the folder has MTP layers, `mtp`.
  has_mtp:    how many MTP layers the folder has.
  max_length: of a text, as config.json states it.
  tokenizer:  the folder's tokenizer.json, if there is one.
  files:      `special_tokens.MODEL_FILES` by name, JSON parsed.
  tensors:    by name, as the headers have them.
  """

  folder: Path
  family: str
  overrides: dict[str, Any]
  has_mtp: int
  max_length: int
  tokenizer: Path | None
  files: dict[str, Any]
  tensors: dict[str, StoredTensor]


def read_model(folder: Path) -> HfModel:
  """Reads config.json and the headers of the safetensors files; no data.

  Raises:
    InteropError: an architecture or variant that we do not have, a damaged or missing
      file, a dtype that is not read; names the file and the key or tensor.
  """
  folder = Path(folder)
  file = folder / "config.json"
  described = read_config(file, read_json(file))
  tensors = {
    _canonical(name, described.family): tensor
    for name, tensor in stored_tensors(folder).items()
    if not _BUFFERS.search(name)
  }
  _check_dtypes(tensors)
  _check_sizes(file, tensors, described)
  depth = _count_modules(file, tensors, described)
  overrides = dict(described.overrides)
  if depth:
    overrides |= {
      "mtp.kind": "sequential",
      "mtp.depth": depth,
      "mtp.share_modules": False,
      "mtp.dense_blocks": False,
      **{f"mtp.{key}": published for key, published in PUBLISHED_INPUTS.items()},
      "mtp.out_norm": "own",
      "mtp.arm": "added",
    }
    _check_contract(folder, described.family)
  tokenizer = folder / "tokenizer.json"
  return HfModel(
    folder, described.family, overrides, depth, described.max_length,
    tokenizer if tokenizer.is_file() else None, read_files(folder) or {}, tensors,
  )  # fmt: skip


def load_params(
  model: HfModel, config: Config, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
  """Returns the parameters that the folder has, float32, laid out on `mesh`.

  That is all of `config`, without `mtp` where the folder has no MTP layers or
  `config.mtp` is of another kind than they are. Of learned positions the first
  `data.seq_len` are taken.

  Raises:
    InteropError: the config is of another model than the folder; a tensor is missing,
      unknown, or of another shape (found before any data is read); a copy of the
      embedding or the head differs from it.
  """
  _check_config(model, config)
  model = _cropped(model, config)
  boxed = accounting.abstract_params(config)
  stored_shapes = _shapes(boxed)
  stored = dataclasses.replace(config, mtp=_stored_mtp(model, config.mtp))
  if model.has_mtp and stored.mtp != config.mtp:
    # What is not wanted is checked all the same: it has to be of this model.
    stored_shapes = parameter_shapes(stored)
  entries = tensor_table(stored, model.family, stored_shapes)
  required = {entry.name for entry in entries if not entry.copy_of}
  _check_tensors(model.folder, model.tensors, entries, required)
  _check_copies(model, entries)
  return _assemble(boxed, entries, model.tensors, mesh)


def _cropped(model: HfModel, config: Config) -> HfModel:
  """Returns the model with no more learned positions than rows have tokens.

  What is left out are the last ones, as nanoGPT's `crop_block_size` does.
  """
  name, length = "transformer.wpe.weight", config.data.seq_len
  table = model.tensors.get(name)
  if table is None or table.shape[:1] != (model.max_length,):
    return model
  shape = (min(length, model.max_length), *table.shape[1:])
  return dataclasses.replace(
    model, tensors=model.tensors | {name: table._replace(shape=shape)}
  )


def read_drafter(
  folder: Path, config: Config, trunk: dict[str, Any], mesh: jax.sharding.Mesh
) -> dict[str, Any]:
  """Returns the parameters `mtp` out of a folder that holds them alone.

  Args:
    folder: in the layout that `config.mtp.kind` names, see `drafter_config`.
    config: of the whole model.
    trunk: all its other parameters. What the folder repeats of them must be the same,
      in the precision of the file; it may be left out.
    mesh: on which the result is laid out, float32.

  Raises:
    InteropError: the kind has no such layout; a file is missing or damaged; a tensor is
      missing, unknown, of another shape or dtype, or not what the trunk has.
  """
  folder, kind = Path(folder), config.mtp.kind
  if kind not in DRAFTERS:
    raise InteropError(
      f"mtp.kind must be one of {', '.join(map(repr, DRAFTERS))} to be read from a "
      f"folder of its own, got {kind!r}."
    )
  if obstacle := drafter_obstacle(config, kind):
    raise InteropError(f"{folder} cannot be read into this model: {obstacle}.")
  file = folder / "config.json"
  check_drafter_config(file, read_json(file), config)
  tensors = read_header(folder / DRAFTERS[kind])
  _check_dtypes(tensors)
  boxed = accounting.abstract_params(config)
  entries = tensor_table(config, kind, _shapes(boxed))
  repeated = [e for e in entries if not e.pieces[0].path.startswith("mtp/")]
  own = [entry for entry in entries if entry not in repeated]
  _check_tensors(folder, tensors, entries, {entry.name for entry in own})
  leaves = _flat(trunk)
  for entry in repeated:
    if entry.name in tensors:
      _check_repeated(folder, entry, tensors[entry.name].open(), leaves)
  return _assemble(boxed, own, tensors, mesh)["mtp"]


class _Source(NamedTuple):
  """A piece of a parameter, what opens it, and the tensor that it is in."""

  piece: Piece
  open: Callable[[], np.ndarray]
  name: str


def _assemble(
  boxed: Any,
  entries: Iterable[Entry],
  tensors: dict[str, StoredTensor],
  mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
  """Returns the parameters that the entries hold, laid out on `mesh`."""
  shapes = _shapes(boxed)
  sources: dict[str, list[_Source]] = {}
  for entry in entries:
    for i, piece in enumerate(entry.pieces):
      part = _part(tensors[entry.name], entry, i)
      source = _Source(piece, part, f"{tensors[entry.name].file}: {entry.name}")
      sources.setdefault(piece.path, []).append(source)
  layout = _flat(tree_shardings(mesh, logical_axes(boxed)))
  params = {
    path: _place(shapes[path], layout[path], sources[path])
    for path in shapes
    if path in sources
  }
  return flax.traverse_util.unflatten_dict(params, sep="/")


def parameter_shapes(config: Config) -> Shapes:
  """Returns the shape of every parameter of `config` by its path."""
  return _shapes(accounting.abstract_params(config))


def _shapes(boxed: Any) -> Shapes:
  return {path: leaf.shape for path, leaf in _flat(unbox(boxed)).items()}


def _flat(tree: Any) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(tree, sep="/")


def _canonical(name: str, family: str) -> str:
  """Old GPT-2 files have the names of the model without its head."""
  if family == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
    return f"transformer.{name}"
  return name


def _check_sizes(
  file: Path, tensors: dict[str, StoredTensor], described: TrunkDescription
) -> None:
  """Refuses sizes for which the files have no room, before anything is made of them.

  The shapes of all tensors are compared later, with those of the model.
  """
  name = "transformer.wte.weight"
  keys = "vocab_size", "n_embd"
  if described.family != "gpt2":
    name, keys = "model.embed_tokens.weight", ("vocab_size", "hidden_size")
  if name not in tensors:
    raise InteropError(f"{file.parent} lacks tensors: {name}.")
  shape = tensors[name].shape
  if shape != tuple(described.sizes[key] for key in keys):
    stated = " and ".join(f"{key} {described.sizes[key]}" for key in keys)
    raise InteropError(
      f"{file}: {stated} must be the shape of {name}, which is {list(shape)}."
    )
  num_values = sum(math.prod(tensor.shape) for tensor in tensors.values())
  for key, size in described.sizes.items():
    # Every axis is one of a matrix whose other axis is the width, or a part of it.
    most, of = num_values // max(shape[1], 1), f"values for a width of {shape[1]}"
    if key in ("n_layer", "num_hidden_layers", "n_routed_experts"):
      most, of = len(tensors), "tensors"
    if size > most:
      raise InteropError(
        f"{file}: {key} must be at most {most}, for which the files have {of}, got "
        f"{size}."
      )


def _count_modules(
  file: Path, tensors: dict[str, StoredTensor], described: TrunkDescription
) -> int:
  """Returns how many MTP layers the files have: as many as config.json says, or 0."""
  if described.family == "mimo":
    prefix, first = "model.mtp_layers.", 0
  elif described.family == "deepseek_v3":
    prefix, first = "model.layers.", described.overrides["trunk.num_layers"]
  else:
    return 0
  numbers = re.compile(re.escape(prefix) + r"(\d+)\.")
  layers = {int(match[1]) for match in map(numbers.match, tensors) if match}
  found = {n for n in layers if n >= first}
  # Frameworks that cannot run them leave them out and the number as it was.
  if found and len(found) != described.depth:
    raise InteropError(
      f"{file}: num_nextn_predict_layers is {described.depth}, but the files have MTP "
      f"layers {', '.join(f'{prefix}{n}' for n in sorted(found))}."
    )
  return len(found)


def _check_contract(folder: Path, family: str) -> None:
  """A folder that states another concat order than its layout has is refused."""
  file = folder / CONTRACT
  if not file.exists():
    return
  stated = read_json(file).get("concat_order")
  if stated != list(CONCAT_ORDER[family]):
    raise InteropError(
      f"{file}: concat_order is {stated!r}; the layout {family!r} has "
      f"{list(CONCAT_ORDER[family])}."
    )


def _stored_mtp(model: HfModel, wanted: MtpConfig) -> MtpConfig:
  """Returns the MTP section of what the folder holds."""
  if not model.has_mtp:
    return next_token_only(wanted)
  if wanted.kind == "sequential" and wanted.depth:
    return wanted  # The same, as `_check_config` makes sure.
  return dataclasses.replace(
    wanted, kind="sequential", depth=model.has_mtp, depth_weights=()
  )


def _check_config(model: HfModel, config: Config) -> None:
  for key, value in model.overrides.items():
    free = any(key == k or (k.endswith(".") and key.startswith(k)) for k in _FREE)
    node: Any = to_dict(config)
    for part in key.split("."):
      node = node[part]
    if key.startswith("trunk.") and not free and node != value:
      raise InteropError(
        f"{key} must be {value!r}, as {model.folder / 'config.json'} has it, got "
        f"{node!r}."
      )
  layers, found = num_trunk_layers(config), model.overrides["trunk.num_layers"]
  if layers != found:
    raise InteropError(
      f"mtp.kind {config.mtp.kind!r} and mtp.arm {config.mtp.arm!r} leave a trunk of "
      f"{layers} layers, and {model.folder} has {found}: load it with mtp.kind 'none'."
    )
  mtp = config.mtp
  if model.has_mtp and mtp.kind == "sequential" and mtp.depth:
    theirs = (model.has_mtp, False, False)
    if (mtp.depth, mtp.share_modules, mtp.dense_blocks) != theirs:
      raise InteropError(
        f"{model.folder} has {model.has_mtp} MTP layer(s), each with parameters of its "
        f"own and the trunk's kind of block; got mtp.depth {mtp.depth}, share_modules "
        f"{mtp.share_modules}, dense_blocks {mtp.dense_blocks}. With mtp.kind 'none' "
        "the trunk alone is loaded."
      )
    if obstacle := unpublished_inputs(mtp):
      raise InteropError(
        f"{model.folder} has MTP layers, and {obstacle}. With mtp.kind 'none' the "
        "trunk alone is loaded."
      )


def _check_dtypes(tensors: dict[str, StoredTensor]) -> None:
  for name, tensor in tensors.items():
    if tensor.dtype not in DTYPES:
      raise InteropError(
        f"{tensor.file}: tensor {name!r} has dtype {tensor.dtype}; supported: "
        f"{', '.join(DTYPES)}."
      )


def _check_tensors(
  folder: Path,
  tensors: dict[str, StoredTensor],
  entries: tuple[Entry, ...],
  required: set[str],
) -> None:
  """Compares names and shapes with the headers."""
  expected = {entry.name: entry for entry in entries}
  for what, names in (
    ("lacks", required - tensors.keys()),
    ("has unknown", tensors.keys() - expected.keys()),
  ):
    if names:
      raise InteropError(f"{folder} {what} tensors: {_some(sorted(names))}.")
  wrong = [
    f"{name} is {list(tensor.shape)}, expected {list(expected[name].shape)}"
    for name, tensor in tensors.items()
    if tensor.shape != expected[name].shape
  ]
  if wrong:
    raise InteropError(f"{folder}: wrong shapes: {_some(wrong)}.")


def _check_repeated(
  folder: Path, entry: Entry, stored: np.ndarray, trunk: dict[str, Any]
) -> None:
  """Compares what a folder of predictors repeats of the trunk with the trunk."""
  (piece,) = entry.pieces
  ours = piece.form.to_stored(np.asarray(trunk[piece.path]))
  if not np.array_equal(_float32(stored), _float32(ours.astype(stored.dtype))):
    raise InteropError(
      f"{folder}: {entry.name} must be {piece.path} of the trunk, which our model uses "
      "in its place, and differs from it."
    )


def _some(names: list[str]) -> str:
  more = f" and {len(names) - 5} more" if len(names) > 5 else ""
  return ", ".join(name[:200] for name in names[:5]) + more


def _check_copies(model: HfModel, entries: tuple[Entry, ...]) -> None:
  for entry in entries:
    if not entry.copy_of or entry.name not in model.tensors:
      continue
    copy = model.tensors[entry.name].open()
    original = model.tensors[entry.copy_of].open()
    for i in range(0, len(copy), _ROWS_AT_ONCE):
      rows = slice(i, i + _ROWS_AT_ONCE)
      if not np.array_equal(_float32(copy[rows]), _float32(original[rows])):
        raise InteropError(
          f"{model.folder}: {entry.name} must equal {entry.copy_of}, which our model "
          f"uses in its place; they differ in rows {i} to {i + len(copy[rows]) - 1}."
        )


def _float32(x: np.ndarray) -> np.ndarray:
  return x.astype(np.float32)


def _part(tensor: StoredTensor, entry: Entry, i: int) -> Callable[[], np.ndarray]:
  """Returns what opens piece i of a tensor, in the form of our parameter."""
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
  """Returns one parameter, of which every device reads its own part."""
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
  """Returns the part of a parameter between `bounds`, from what it is made of."""
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
