"""Import: reads model folders of other frameworks into our parameters.

`read_model` reads config.json and the headers only. `load_params` lays every parameter
out on a mesh; each device reads its own part.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtp_jax import accounting
from mtp_jax.config import (
  PUBLISHED_INPUTS,
  Config,
  MtpConfig,
  get_dotted,
  next_token_only,
)
from mtp_jax.data.special_tokens import read_files
from mtp_jax.interop.drafter_config import check_drafter_config, drafter_obstacle
from mtp_jax.interop.drafter_tensors import drafter_table
from mtp_jax.interop.errors import InteropError
from mtp_jax.interop.hf_config import TrunkDescription, read_config
from mtp_jax.interop.layouts import DRAFTERS, NUMBERED, unpublished_inputs
from mtp_jax.interop.placing import assemble, flat, parameter_shapes, shapes_of
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
  tensor_table,
)
from mtp_jax.predictors import num_trunk_layers

CONTRACT = "mtp_contract.json"
# Constants that older versions saved with the parameters.
_BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")
# Keys that may differ from the folder: they do not change shapes or names.
_FREE = ("trunk.rope_theta", "trunk.rope_scaling.", "trunk.attention_dim")
_ROWS_AT_ONCE = 4096
# Tensors of token ids in the folders of drafters, and their dtypes.
_IDS = {"d2t": "I64", "t2d": "BOOL"}


@dataclasses.dataclass(frozen=True)
class HfModel:
  """A model folder: its config as overrides of ours, and its tensors' headers.

  family:     gpt2 | llama | qwen2 | qwen3 | deepseek_v3 | mimo | glm4_moe.
  overrides:  dotted config keys and values of the trunk, the vocabulary and, if the
              folder has MTP layers, `mtp`.
  has_mtp:    number of MTP layers in the folder.
  max_length: longest text in tokens, from config.json.
  tokenizer:  the folder's tokenizer.json, or None.
  files:      `special_tokens.MODEL_FILES` by name, JSON parsed.
  tensors:    by name, from the headers.
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
    InteropError: an unsupported architecture, variant or dtype, or a damaged or missing
      file; names the file and the key or tensor.
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
  # The files decide about MTP layers: config.json may name layers that were dropped.
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
    overrides |= _read_contract(folder, described.family)
  tokenizer = folder / "tokenizer.json"
  return HfModel(
    folder, described.family, overrides, depth, described.max_length,
    tokenizer if tokenizer.is_file() else None, read_files(folder) or {}, tensors,
  )  # fmt: skip


def load_params(
  model: HfModel, config: Config, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
  """Returns the folder's parameters, float32, laid out on `mesh`.

  These are all parameters of `config`, but without `mtp` if the folder has no MTP
  layers, or if `config.mtp` is of another kind. Of learned positions, the first
  `data.seq_len` are read.

  Raises:
    InteropError: the config describes another model than the folder; a tensor is
      missing, unknown, or of another shape (checked before any data is read); a copy of
      the embedding or the output matrix differs from the original.
  """
  check_config(model, config)
  model = _cropped(model, config)
  boxed = accounting.abstract_params(config)
  stored_shapes = shapes_of(boxed)
  stored = dataclasses.replace(config, mtp=_stored_mtp(model, config.mtp))
  if model.has_mtp and stored.mtp != config.mtp:
    # MTP layers that are not read are checked, too: they must fit this model.
    stored_shapes = parameter_shapes(stored)
  entries = tensor_table(stored, model.family, stored_shapes)
  required = {entry.name for entry in entries if not entry.copy_of}
  _check_tensors(model.folder, model.tensors, entries, required)
  _check_copies(model, entries)
  _check_zeros(model, entries)
  return assemble(boxed, entries, model.tensors, mesh)


def _cropped(model: HfModel, config: Config) -> HfModel:
  """Returns the model with at most `data.seq_len` learned positions.

  The last positions are cut, as in nanoGPT's `crop_block_size`.
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
  """Returns the parameters `mtp`, float32, of a folder with drafters alone.

  Args:
    folder: in the layout of `config.mtp.kind`, see `drafter_config`.
    config: of the whole model.
    trunk: all other parameters of the model. The folder may repeat some of them, which
      must then be equal in the precision of the file.
    mesh: for the result.

  Raises:
    InteropError: the kind has no layout of its own; a file is missing or damaged; a
      tensor is missing, unknown, or of another shape or dtype; a repeated tensor
      differs from the trunk's.
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
  mask_token = check_drafter_config(file, read_json(file), config)
  tensors = read_header(folder / DRAFTERS[kind])
  ids = {name: tensors.pop(name) for name in _IDS if name in tensors}
  _check_dtypes(tensors)
  _check_dtypes(ids, _IDS)
  tensors |= ids
  boxed = accounting.abstract_params(config)
  entries = drafter_table(config, shapes_of(boxed), mask_token)
  repeated = [e for e in entries if not e.pieces[0].path.startswith("mtp/")]
  own = [e for e in entries if e not in repeated and e.name != "t2d"]
  masked = [e for e in repeated if e.row is not None]
  _check_tensors(folder, tensors, entries, {entry.name for entry in own + masked})
  if config.mtp.draft_vocab:
    _check_ids(folder, tensors, config.tokenizer.vocab_size)
  leaves = flat(trunk)
  for entry in repeated:
    if entry.name in tensors:
      _check_repeated(folder, entry, tensors[entry.name].open(), leaves)
  for entry in masked:
    row, piece = entry.row
    name = f"{entry.name}, row {row}"
    own.append(Entry(name, piece.shape, (piece,)))
    tensors[name] = tensors[entry.name].row(row)
  return assemble(boxed, own, tensors, mesh)["mtp"]


def _canonical(name: str, family: str) -> str:
  """Returns a tensor's present name: old GPT-2 files lack the prefix."""
  if family == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
    return f"transformer.{name}"
  return name


def _check_sizes(
  file: Path, tensors: dict[str, StoredTensor], described: TrunkDescription
) -> None:
  """Raises InteropError if sizes in config.json exceed the files.

  Checked before a model of these sizes is traced, which could take all memory. All
  shapes are compared later.
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
    # Every size is an axis, or a part of one, of a matrix with the width as other axis.
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
  """Returns the number of MTP layers in the files: as in config.json, or 0."""
  if described.family == "mimo":
    prefix, first = "model.mtp_layers.", 0
  elif described.family in NUMBERED:
    prefix, first = "model.layers.", described.overrides["trunk.num_layers"]
  else:
    return 0
  numbers = re.compile(re.escape(prefix) + r"(\d+)\.")
  layers = {int(match[1]) for match in map(numbers.match, tensors) if match}
  found = {n for n in layers if n >= first}
  # Frameworks that cannot run MTP layers drop them, but keep the number in config.json.
  if found and len(found) != described.depth:
    raise InteropError(
      f"{file}: num_nextn_predict_layers is {described.depth}, but the files have MTP "
      f"layers {', '.join(f'{prefix}{n}' for n in sorted(found))}."
    )
  return len(found)


def _read_contract(folder: Path, family: str) -> dict[str, Any]:
  """Returns the overrides that a contract beside the weights states, if there is one.

  Raises:
    InteropError: it states another concat order than its layout's.
  """
  file = folder / CONTRACT
  if not file.exists():
    return {}
  contract = read_json(file)
  stated = contract.get("concat_order")
  if stated != list(CONCAT_ORDER[family]):
    raise InteropError(
      f"{file}: concat_order is {stated!r}; the layout {family!r} has "
      f"{list(CONCAT_ORDER[family])}."
    )
  is_zeroed = contract.get("embedding_zeroed_at_position_0") is True
  return {"mtp.zero_first": True} if is_zeroed else {}


def _stored_mtp(model: HfModel, wanted: MtpConfig) -> MtpConfig:
  """Returns the MTP section of the model in the folder."""
  if not model.has_mtp:
    return next_token_only(wanted)
  if wanted.kind == "sequential" and wanted.depth:
    return wanted  # `check_config` has compared it with the folder.
  return dataclasses.replace(
    wanted, kind="sequential", depth=model.has_mtp, depth_weights=()
  )


def check_config(model: HfModel, config: Config) -> None:
  for key, value in model.overrides.items():
    free = any(key == k or (k.endswith(".") and key.startswith(k)) for k in _FREE)
    node = get_dotted(config, key)
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
  # A sequential config must equal the folder's layers; other kinds do not read them.
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


def _check_dtypes(
  tensors: dict[str, StoredTensor], wanted: dict[str, str] | None = None
) -> None:
  """Raises InteropError for a dtype that is not read; `wanted`: the one, by name."""
  for name, tensor in tensors.items():
    supported = [*DTYPES] if wanted is None else [wanted[name]]
    if tensor.dtype not in supported:
      raise InteropError(
        f"{tensor.file}: tensor {name!r} has dtype {tensor.dtype}; supported: "
        f"{', '.join(supported)}."
      )


def _check_ids(
  folder: Path, tensors: dict[str, StoredTensor], vocab_size: int
) -> None:
  """Raises InteropError if the ids of a reduced vocabulary are no set of tokens."""
  offsets = tensors["d2t"].open()
  ids = np.sort(offsets + np.arange(len(offsets)))
  if ids[0] < 0 or ids[-1] >= vocab_size or np.any(np.diff(ids) == 0):
    raise InteropError(f"{folder}: d2t must name different tokens of the vocabulary.")
  if "t2d" in tensors and not np.array_equal(
    ids, np.flatnonzero(tensors["t2d"].open())
  ):
    raise InteropError(f"{folder}: d2t and t2d must name the same tokens.")


def _check_tensors(
  folder: Path,
  tensors: dict[str, StoredTensor],
  entries: tuple[Entry, ...],
  required: set[str],
) -> None:
  """Raises InteropError if names or shapes of tensors differ from the entries."""
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
  """Raises InteropError if a drafter's copy of a trunk tensor differs."""
  (piece,) = entry.pieces
  ours = piece.form.to_stored(np.asarray(trunk[piece.path]))
  if entry.row is not None:
    stored, ours = (np.delete(x, entry.row[0], axis=0) for x in (stored, ours))
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


def _check_zeros(model: HfModel, entries: tuple[Entry, ...]) -> None:
  for entry in entries:
    if not entry.pieces and not entry.copy_of and np.any(
      model.tensors[entry.name].open()
    ):
      raise InteropError(
        f"{model.folder}: {entry.name} must be zeros, by config.json."
      )


def _float32(x: np.ndarray) -> np.ndarray:
  return x.astype(np.float32)
