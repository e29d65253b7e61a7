"""Export: writes our parameters as a model folder of other frameworks."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers.processors import TemplateProcessing

from mtp_jax import files
from mtp_jax.config import Config
from mtp_jax.data.special_tokens import first_ids
from mtp_jax.data.tokenizers import Tokenizer, plain_json
from mtp_jax.interop.drafter_config import (
  drafter_contract,
  layouts_for,
  mask_token_of,
  write_drafter_config,
)
from mtp_jax.interop.drafter_tensors import drafter_table
from mtp_jax.interop.errors import InteropError
from mtp_jax.interop.hf_config_writing import ID_KEYS, TokenIds, write_config
from mtp_jax.interop.importing import CONTRACT
from mtp_jax.interop.layouts import DRAFTERS
from mtp_jax.interop.placing import parameter_shapes
from mtp_jax.interop.tensor_files import (
  NewTensor,
  write_file,
  write_json,
  write_tensors,
)
from mtp_jax.interop.tensor_table import CONCAT_ORDER, Entry, Piece, tensor_table
from mtp_jax.lm import deployed

_DTYPES = {
  "float32": np.dtype(np.float32),
  "bfloat16": np.dtype(jnp.bfloat16),
}


def export_params(
  params: dict[str, Any],
  config: Config,
  folder: Path,
  layout: str,
  dtype: str = "float32",
  max_shard_bytes: int = 5 * 10**9,
  trunk_only: bool = False,
  token_ids: TokenIds | None = None,
  base_model: str = "",
  tokenizer: Tokenizer | None = None,
  model_folder: dict[str, Any] | None = None,
  card: str = "",
) -> None:
  """Writes config.json, safetensors and `mtp_contract.json` into a new folder.

  With a tokenizer, also tokenizer.json, tokenizer_config.json and, for a layout with a
  trunk, generation_config.json. The folder appears whole or not at all. One tensor is
  in memory at a time.

  Args:
    params, config: as trained.
    folder: a new or empty folder; its parent exists.
    layout: a layout that `layouts_for(config, trunk_only)` allows.
    dtype: float32 | bfloat16; the balancing bias of experts stays float32.
    max_shard_bytes: larger models are split into several files with an index; layouts
      of drafters alone always have one file.
    trunk_only: deletes the extra predictors (`lm.deployed`).
    token_ids: begin and end of a text; by default the tokenizer's.
    base_model: folder or name of the trunk, for the config.json of drafters alone.
    tokenizer: of the model.
    model_folder: files of an imported model besides its weights; written unchanged.
    card: the README.md of the folder; "": there is none.

  Raises:
    InteropError: the layout cannot hold the model, or the folder is not empty.
    OSError: the folder could not be written in full; nothing of it is left.
  """
  folder = Path(folder)
  check_target(folder)
  obstacles = layouts_for(config, trunk_only)
  if layout not in obstacles:
    raise InteropError(
      f"layout must be one of {', '.join(map(repr, obstacles))}, got {layout!r}."
    )
  if obstacles[layout]:
    possible = [name for name, obstacle in obstacles.items() if not obstacle]
    raise InteropError(
      f"this model has no place in the layout {layout!r}: {obstacles[layout]}. "
      f"Possible: {', '.join(possible) or 'none'}."
    )
  if dtype not in _DTYPES:
    raise InteropError(f"dtype must be {' or '.join(_DTYPES)}, got {dtype!r}.")
  # Everything is checked before the first byte is written.
  if trunk_only:
    params, config = deployed(params, config)
  leaves = flax.traverse_util.flatten_dict(params, sep="/")
  shapes = parameter_shapes(config)
  check_params(leaves, shapes)
  if token_ids is None and tokenizer is not None:
    ends = tokenizer.end_ids
    token_ids = tokenizer.bos_id, list(ends) if len(ends) > 1 else tokenizer.eos_id
  if layout in DRAFTERS:
    num_tokens = tokenizer and tokenizer.vocab_size
    mask_token = mask_token_of(config, (token_ids or [None])[0], num_tokens)
    entries = drafter_table(config, shapes, mask_token)
  else:
    entries = tensor_table(config, layout, shapes)
  own = {entry.name: entry for entry in entries if not entry.copy_of}
  tensors = [
    _new_tensor(entry, own.get(entry.copy_of, entry), leaves, _DTYPES[dtype])
    for entry in entries
    if entry.written
  ]

  came = model_folder or {}
  # Written beside the target and renamed, so that no half folder is ever visible.
  temporary = Path(files.temporary_name(folder))
  temporary.mkdir()
  try:
    if layout in DRAFTERS:
      write_file(temporary / DRAFTERS[layout], tensors)
      values = write_drafter_config(config, dtype, token_ids, base_model, mask_token)
      # Facts about the trunk stay as its authors stated them.
      of_trunk = (*ID_KEYS, "max_position_embeddings")
      own = came.get("config.json", {})
      for part in (values, values.get("transformer_layer_config", {})):
        part |= {key: own[key] for key in of_trunk if key in own and key in part}
    else:
      write_tensors(temporary, tensors, max_shard_bytes)
      values = write_config(
        config, layout, dtype, token_ids, came.get("config.json")
      )
    write_json(temporary / "config.json", values)
    write_json(temporary / CONTRACT, _contract(config, layout))
    if card:
      files.write_whole(temporary / "README.md", card.encode())
    if tokenizer is not None:
      for name, content in _other_files(tokenizer, values, came, layout).items():
        is_text = isinstance(content, str)
        encoded = content if is_text else json.dumps(content, indent=2)
        files.write_whole(temporary / name, encoded.encode())
    os.replace(temporary, folder)
  finally:
    if temporary.exists():
      shutil.rmtree(temporary)


def _other_files(
  tokenizer: Tokenizer, values: dict[str, Any], came: dict[str, Any], layout: str
) -> dict[str, dict[str, Any] | str]:
  """Returns the files besides weights and config.json, by name.

  Files of an imported model (`came`) replace ours. `values`: the config.json.
  """
  found = tokenizer_files(tokenizer, values) | came
  before = came.get("config.json", values).get("n_positions")
  if values.get("n_positions") != before:  # Fewer learned positions than imported.
    found["tokenizer_config.json"] = found["tokenizer_config.json"] | {
      "model_max_length": values["n_positions"]
    }
  skipped = {"config.json"}
  if layout in DRAFTERS:  # Drafters alone generate no text.
    skipped.add("generation_config.json")
  return {name: content for name, content in found.items() if name not in skipped}


def tokenizer_files(
  tokenizer: Tokenizer, values: dict[str, Any]
) -> dict[str, dict[str, Any] | str]:
  """Returns the files, by name, with which AutoTokenizer returns the ids of training.

  `values`: of config.json.
  """
  content = plain_json(tokenizer)
  model = tokenizers.Tokenizer.from_str(content)
  names = {
    name: None if i is None else model.id_to_token(i)
    for name, i in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
  }
  bos = names["bos_token"]
  if bos is not None and not first_ids(model):
    model.post_processor = TemplateProcessing(
      single=[bos, "$A"],
      pair=[bos, "$A", f"{bos}:1", "$B:1"],
      special_tokens=[(bos, tokenizer.bos_id)],
    )
    content = model.to_str(pretty=True)
  longest = values.get("max_position_embeddings", values.get("n_positions"))
  return {
    "tokenizer.json": content,
    "tokenizer_config.json": {
      "tokenizer_class": "PreTrainedTokenizerFast",
      **{name: token for name, token in names.items() if token is not None},
      "clean_up_tokenization_spaces": False,
    } | ({} if longest is None else {"model_max_length": longest}),
    "generation_config.json": {
      key: values[key] for key in ID_KEYS if values.get(key) is not None
    },
  }


def check_target(folder: Path) -> None:
  if not folder.parent.is_dir():
    raise InteropError(f"the folder {folder.parent} does not exist.")
  if folder.exists() and not folder.is_dir():
    raise InteropError(f"{folder} is a file.")
  if folder.is_dir() and any(folder.iterdir()):
    raise InteropError(f"{folder} is not empty; choose a new folder.")


def check_params(leaves: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
  for path in sorted(leaves.keys() ^ shapes.keys()):
    verb = "has" if path in leaves else "lacks"
    raise InteropError(f"the parameter tree {verb} {path!r}, unlike its config.")
  for path, leaf in leaves.items():
    if tuple(leaf.shape) != shapes[path]:
      raise InteropError(
        f"parameter {path!r} has shape {list(leaf.shape)}; its config needs "
        f"{list(shapes[path])}."
      )
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      raise InteropError(
        f"parameter {path!r} is spread over several processes; export from one."
      )


def content_of(entry: Entry, leaves: dict[str, Any]) -> np.ndarray:
  """Returns a tensor as a file has it, but for its dtype."""
  def stored(piece: Piece) -> np.ndarray:
    return piece.form.to_stored(np.asarray(leaves[piece.path][piece.index]))

  content = np.concatenate([stored(piece) for piece in entry.pieces], axis=-1)
  if entry.row is not None:
    row, piece = entry.row
    content[row] = stored(piece)
  return content


def _new_tensor(
  entry: Entry, source: Entry, leaves: dict[str, Any], dtype: np.dtype
) -> NewTensor:
  if entry.name.endswith("e_score_correction_bias"):
    dtype = np.dtype(np.float32)
  if source.pieces:
    dtype = source.pieces[0].form.dtype or dtype

  def make() -> np.ndarray:
    if not source.pieces:
      return np.zeros(entry.shape, dtype)
    return content_of(source, leaves).astype(dtype)

  return NewTensor(entry.name, dtype, entry.shape, make)


def _contract(config: Config, layout: str) -> dict[str, Any]:
  """Returns facts about the MTP layers that readers need and layouts lack."""
  depth = config.mtp.depth
  contract = {"kind": config.mtp.kind if depth else "none", "depth": depth}
  if not depth:
    return contract
  if layout in DRAFTERS:
    return contract | drafter_contract(config)
  return contract | {
    "concat_order": list(CONCAT_ORDER[layout]),
    "hidden_source": "trunk output after its final norm",
    "norm_point": "each input of the projection, and the output, has its own norm",
    "recycled_state": "layer k reads the normed output of layer k - 1",
    "position_offset": 0,
    "row": "layer k at position i reads the embedding of token i + k and predicts "
    "token i + k + 1; k starts at 1",
    "embedding_zeroed_at_position_0": config.mtp.zero_first,
    "embedding_shared": True,
    "unembedding_shared": True,
  }
