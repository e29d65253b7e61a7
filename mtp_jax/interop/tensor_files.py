"""Safetensors files: reading headers, mapping tensors, and writing.

A file is 8 bytes with the length of its header, the header (JSON: dtype, shape and byte
range of every tensor), and the data. Reading maps the data into memory, so that only
the parts used are read. Writing makes one tensor at a time.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from mtp_jax import files
from mtp_jax.interop.errors import InteropError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Supported dtypes, by their names in files; parameters become float32.
DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(jnp.bfloat16),
  "F64": np.dtype(np.float64),
}
# Dtypes of token ids and of masks of the vocabulary.
_ID_DTYPES = {"I64": np.dtype(np.int64), "BOOL": np.dtype(np.bool_)}
_NAMES = {dtype: name for name, dtype in (DTYPES | _ID_DTYPES).items()}


class StoredTensor(NamedTuple):
  """Place of a tensor in a file; `offset` counts bytes from the start of `file`."""

  file: Path
  dtype: str
  shape: tuple[int, ...]
  offset: int

  def open(self) -> np.ndarray:
    """Returns the tensor as a read-only view of the file; nothing is read yet."""
    dtype = (DTYPES | _ID_DTYPES)[self.dtype]
    if 0 in self.shape:
      return np.empty(self.shape, dtype)
    return np.memmap(self.file, dtype, "r", self.offset, self.shape)

  def row(self, index: int) -> "StoredTensor":
    """Returns one entry of the first axis."""
    shape = self.shape[1:]
    size = int(np.prod(shape)) * (DTYPES | _ID_DTYPES)[self.dtype].itemsize
    return self._replace(shape=shape, offset=self.offset + index * size)


class NewTensor(NamedTuple):
  """A tensor to be written; `make` returns its content."""

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]

  @property
  def num_bytes(self) -> int:
    return self.dtype.itemsize * int(np.prod(self.shape))


def read_json(file: Path) -> dict[str, Any]:
  """Returns the object in a JSON file.

  Raises:
    InteropError: the file is missing, not JSON, or not an object.
  """
  try:
    return files.read_json(file)
  except (OSError, ValueError) as error:
    raise InteropError(f"{file} cannot be read: {error}") from error


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
  """Returns the tensors of a folder by name, from the headers of its files alone.

  Raises:
    InteropError: there is no safetensors file; the index names a missing file or
      disagrees with a file; or as `read_header`.
  """
  if (folder / SINGLE).is_file():
    return read_header(folder / SINGLE)
  index = folder / INDEX
  if not index.is_file():
    raise InteropError(
      f"{folder} has neither {SINGLE} nor {INDEX}; other formats are not read."
    )
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise InteropError(f"{index}: weight_map must name the file of every tensor.")
  found: dict[str, StoredTensor] = {}
  for shard in sorted(set(map(str, weight_map.values()))):
    if not _is_file_in(folder, shard):
      raise InteropError(
        f"{index} names the file {files.shortened(shard)}, which is not in {folder}."
      )
    found |= read_header(folder / shard)
  # An index of another download would silently mix weights: both must agree.
  for name in sorted(found.keys() ^ weight_map.keys()):
    has, lacks = ("the files", index) if name in found else (index, "the files")
    short = files.shortened(name)
    raise InteropError(f"{folder}: {has} have a tensor {short} that {lacks} lack.")
  for name, shard in weight_map.items():
    if found[name].file.name != shard:
      raise InteropError(
        f"{index} has {name!r} in {shard!r}, but it is in {found[name].file.name!r}."
      )
  return found


def _is_file_in(folder: Path, name: str) -> bool:
  """Returns whether `name`, without any path, is a file in `folder`."""
  try:
    return Path(name).name == name and (folder / name).is_file()
  except (OSError, ValueError):  # The name is too long, or has a NUL character.
    return False


def read_header(file: Path) -> dict[str, StoredTensor]:
  """Returns the tensors of one file by name.

  Raises:
    InteropError: the file is missing, damaged, or not of the size in its header.
  """
  try:
    # The library checks that the header is sound and that the tensors fill the file.
    with safetensors.safe_open(file, framework="numpy"):
      pass
    with open(file, "rb") as handle:
      length = int.from_bytes(handle.read(8), "little")
      header = json.loads(handle.read(length))
  except (OSError, safetensors.SafetensorError) as error:
    raise InteropError(f"{file} is not a whole safetensors file: {error}") from error
  header.pop("__metadata__", None)
  return {
    name: StoredTensor(
      file, at["dtype"], tuple(at["shape"]), 8 + length + at["data_offsets"][0]
    )
    for name, at in header.items()
  }


def write_tensors(
  folder: Path, tensors: Iterable[NewTensor], max_shard_bytes: int
) -> None:
  """Writes one file; above `max_shard_bytes`, several shards with an index.

  A tensor larger than `max_shard_bytes` gets a shard of its own.
  """
  shards: list[list[NewTensor]] = [[]]
  size = 0
  for tensor in tensors:
    if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(tensor)
    size += tensor.num_bytes
  if len(shards) == 1:
    write_file(folder / SINGLE, shards[0])
    return
  weight_map = {}
  for i, shard in enumerate(shards, start=1):
    file = folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
    write_file(file, shard)
    weight_map |= {tensor.name: file.name for tensor in shard}
  total = sum(tensor.num_bytes for shard in shards for tensor in shard)
  write_json(
    folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
  )


def write_json(file: Path, value: dict[str, Any]) -> None:
  """Writes an object as indented JSON."""
  files.write_whole(file, json.dumps(value, indent=2).encode() + b"\n")


def write_file(file: Path, tensors: list[NewTensor]) -> None:
  """Writes one file, with one tensor in memory at a time."""
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # Readers insist on it.
  offset = 0
  for tensor in tensors:
    end = offset + tensor.num_bytes
    header[tensor.name] = {
      "dtype": _NAMES[tensor.dtype],
      "shape": list(tensor.shape),
      "data_offsets": [offset, end],
    }
    offset = end
  encoded = json.dumps(header).encode()
  encoded += b" " * (-len(encoded) % 8)  # Data is aligned for mapping.
  with open(file, "wb") as handle:
    handle.write(len(encoded).to_bytes(8, "little") + encoded)
    for tensor in tensors:
      content = np.ascontiguousarray(tensor.make(), tensor.dtype)
      if content.shape != tensor.shape:
        raise ValueError(f"{tensor.name} is {content.shape}, not {tensor.shape}.")
      handle.write(content.view(np.uint8).data if content.size else b"")
    handle.flush()
    os.fsync(handle.fileno())
