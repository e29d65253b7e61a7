"""Small corpora that the tests of data share."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import base
from mtp_jax import config as config_lib
from mtp_jax.config import Config


class ListStore:
  """`packing.TokenStore` of given token lists."""

  def __init__(self, documents: Sequence[Sequence[int]], name: str = "lists"):
    self.documents = [np.array(document, np.int32) for document in documents]
    self.lengths_N = np.array([len(document) for document in documents], np.int64)
    digests = [hashlib.sha256(x.tobytes()).digest() for x in self.documents]
    self.hashes_NX = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
    self.identity, self.has_unscored = {"manifest": name}, False

  def read(self, document: int, begin: int, end: int) -> np.ndarray:
    assert 0 <= begin <= end <= self.lengths_N[document]
    return self.documents[document][begin:end]


def numbered_documents(lengths: Sequence[int]) -> list[list[int]]:
  """Returns documents whose tokens are all different: 0, 1, 2, ... in order."""
  ends = np.cumsum(lengths)
  return [list(range(end - n, end)) for end, n in zip(ends, lengths, strict=True)]


def some_texts(count: int, seed: int = 0) -> list[str]:
  """Returns different texts of 20 to 400 characters, some of several bytes."""
  rng = np.random.default_rng(seed)
  alphabet = np.array(list("etaoin \n(x)=é漢"))
  return [
    f"{seed}.{i} " + "".join(rng.choice(alphabet, rng.integers(20, 400)))
    for i in range(count)
  ]


def write_jsonl(file: Path, texts: Sequence[str]) -> Path:
  """Writes one {"text": ...} a line."""
  file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  return file


def data_config(source: str, path: Any = "", **overrides: Any) -> Config:
  """Returns the base config with a source; `data__seed=1` overrides `data.seed`."""
  values = {"data.source": source, "data.path": str(path)}
  values |= {key.replace("__", "."): value for key, value in overrides.items()}
  return config_lib.with_overrides(
    config_lib.from_config_dict(base.get_config()), values
  )
