"""Stitching: tuned MTP layers back into a copy of the folder that they came from."""

import os
import shutil
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np

from mtp_jax import files
from mtp_jax.config import Config
from mtp_jax.interop.errors import InteropError
from mtp_jax.interop.exporting import check_params, check_target, content_of
from mtp_jax.interop.importing import check_config, read_model
from mtp_jax.interop.placing import parameter_shapes
from mtp_jax.interop.tensor_table import tensor_table


def stitch(
  params: dict[str, Any], config: Config, original: Path, folder: Path
) -> list[str]:
  """Copies `original`, and writes the MTP layers of `params` over the copy's.

  All other bytes stay: tensors, their order and shards, index, config.json, tokenizer.
  A tensor has the dtype that it had. Returns the names of the tensors written.

  Raises:
    InteropError: `original` has no MTP layers or is another model; the trunk of
      `params` is not its trunk, so that the layers would not fit; `folder` is in use.
  """
  original, folder = Path(original), Path(folder)
  check_target(folder)
  model = read_model(original)
  if not model.has_mtp:
    raise InteropError(f"{original} has no MTP layers that could be replaced.")
  check_config(model, config)
  leaves = flax.traverse_util.flatten_dict(params, sep="/")
  shapes = parameter_shapes(config)
  check_params(leaves, shapes)
  written: dict[str, np.ndarray] = {}
  for entry in tensor_table(config, model.family, shapes):
    if entry.copy_of or not entry.pieces:
      continue
    stored = model.tensors[entry.name].open()
    ours = content_of(entry, leaves).astype(stored.dtype)
    if entry.pieces[0].path.startswith("mtp/"):
      written[entry.name] = ours
    elif ours.tobytes() != stored.tobytes():
      raise InteropError(
        f"{original}: {entry.name} differs from the trunk of the run, which was "
        "trained: export all of it. train.freeze_trunk=True keeps a trunk."
      )
  temporary = Path(files.temporary_name(folder))
  try:
    shutil.copytree(original, temporary)
    for name, content in written.items():
      tensor = model.tensors[name]
      file = temporary / tensor.file.name
      file.chmod(0o644)
      with open(file, "r+b") as handle:
        handle.seek(tensor.offset)
        handle.write(np.ascontiguousarray(content).view(np.uint8).data)
    os.replace(temporary, folder)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return list(written)
