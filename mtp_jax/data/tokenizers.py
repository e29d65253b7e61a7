"""Tokenizers: bytes, byte-level BPE, symbols of tasks, or any `tokenizer.json`.

Every tokenizer is lossless and has the number of bytes of text per id, so that losses
convert to bits per byte. Our own tokenizers have a begin and an end of document;
tokenizers of model folders have the folder's ids, see `special_tokens`. All kinds
are saved as a Hugging Face `tokenizer.json`, which other tools read, and, for a model
folder, `special_tokens.json` beside it.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mtp_jax import config as config_lib
from mtp_jax import files, run_folder
from mtp_jax.data.chat import CHAT, read_format
from mtp_jax.data.errors import DataError
from mtp_jax.data.special_tokens import (
  BOS,
  EOS,
  SpecialTokens,
  read_files,
  special_tokens,
)
from mtp_jax.data.subword_tokenizer import KEY, SubwordTokenizer, byte_vocab, train_bpe

# Its own special ids, beside the tokenizer of a run folder.
SPECIAL_TOKENS = "special_tokens.json"


class Tokenizer(Protocol):
  """The interface of all tokenizers.

  bos_id, eos_id: ids that begin and end a document, or None; `encode` never returns a
                  special token.
  end_ids:        the tokens that end a generated text.
  vocab_size:     1 + the largest id; the least `tokenizer.vocab_size` that works.
  token_bytes_V:  [vocab_size] int64, UTF-8 bytes of text per id; 0 for special tokens.
                  The sum over `encode(text)` is `len(text.encode())` for byte-level
                  tokenizers. SentencePiece may add one leading space; with a Unicode
                  normaliser the sum is the length of the normalised text.
  token_texts:    [vocab_size] the bytes of each id.
  """

  bos_id: int | None
  eos_id: int | None
  end_ids: tuple[int, ...]
  vocab_size: int
  token_texts: list[bytes]
  token_bytes_V: np.ndarray

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids [n] int32 of `text`, without special tokens."""

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns `encode` of each text; uses all cores where that helps."""

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text without special tokens; broken characters become U+FFFD."""

  def special_id(self, name: str) -> int | None:
    """Returns the id of the special token with this name, or None."""

  def to_json(self) -> str:
    """Returns the content of a Hugging Face `tokenizer.json`.

    For a tokenizer of a model folder it has one extra key, with the special ids.
    """


def encode_batch(
  tokenizer: Tokenizer, texts: Sequence[str | np.ndarray]
) -> list[np.ndarray]:
  """Returns the ids of each text; ids in place of a text are returned as they are."""
  encoded = iter(tokenizer.encode_batch([x for x in texts if isinstance(x, str)]))
  return [next(encoded) if isinstance(x, str) else x for x in texts]


def document(
  tokenizer: Tokenizer, ids: np.ndarray, begins: bool = True, ends: bool = True
) -> np.ndarray:
  """Returns `ids` with the tokenizer's begin and end of document, where asked for."""
  bos, eos = tokenizer.bos_id, tokenizer.eos_id
  before = [bos] if begins and bos is not None else []
  after = [eos] if ends and eos is not None else []
  return np.concatenate([before, ids, after]).astype(np.int32)


class ByteTokenizer:
  """Ids 0 to 255 are UTF-8 bytes; 256 begins and 257 ends a document."""

  bos_id = 256
  eos_id = 257
  end_ids = (257,)
  vocab_size = 258

  def __init__(self):
    self.token_texts = [*(bytes([byte]) for byte in range(256)), b"", b""]
    self.token_bytes_V = np.array([1] * 256 + [0, 0], np.int64)

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    return [self.encode(text) for text in texts]

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    ids = np.asarray(ids)
    return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

  def special_id(self, name: str) -> int | None:
    return {BOS: self.bos_id, EOS: self.eos_id}.get(name)

  def to_json(self) -> str:
    """Returns a BPE without merges whose vocabulary is the 256 bytes in order."""
    model = tokenizers.Tokenizer(models.BPE(vocab=byte_vocab(), merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=False
    )
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([BOS, EOS])
    return model.to_str()


_BYTES = SpecialTokens(
  ByteTokenizer.bos_id, ByteTokenizer.eos_id, ByteTokenizer.end_ids
)


class SymbolTokenizer:
  """A closed vocabulary of words, separated by white space, for synthetic tasks."""

  bos_id = 0
  eos_id = 1
  end_ids = (1,)

  def __init__(self, symbols: Iterable[str]):
    self._symbols = (BOS, EOS, *symbols)
    self._ids = {symbol: i for i, symbol in enumerate(self._symbols)}
    self.vocab_size = len(self._symbols)
    if len(self._ids) != self.vocab_size:
      raise ValueError("symbols must be different from each other, got repeats.")
    self.token_texts = [b"", b"", *(s.encode() for s in self._symbols[2:])]
    self.token_bytes_V = np.array([len(text) for text in self.token_texts], np.int64)

  def encode(self, text: str) -> np.ndarray:
    """Returns ids; ValueError for a word that is no symbol of the task."""
    return self.encode_symbols(text.split())

  def encode_symbols(self, symbols: Sequence[str]) -> np.ndarray:
    unknown = [x for x in symbols if self._ids.get(x, 0) < 2]
    if unknown:
      raise ValueError(
        f"text must be symbols of the task, separated by spaces; {unknown[0]!r} is "
        f"none. They are: {' '.join(self._symbols[2:42])}"
        + (" ..." if self.vocab_size > 42 else "")
      )
    return np.array([self._ids[x] for x in symbols], np.int32)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    return [self.encode(text) for text in texts]

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    return " ".join(self.decode_symbols(ids))

  def decode_symbols(self, ids: Sequence[int] | np.ndarray) -> tuple[str, ...]:
    """Returns the symbols, without special tokens and unused ids."""
    return tuple(self._symbols[i] for i in ids if 2 <= i < self.vocab_size)

  def special_id(self, name: str) -> int | None:
    return {BOS: self.bos_id, EOS: self.eos_id}.get(name)

  def to_json(self) -> str:
    """Returns a WordLevel model; its unknown word, a required field, is the end."""
    model = tokenizers.Tokenizer(models.WordLevel(vocab=self._ids, unk_token=EOS))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens([BOS, EOS])
    return model.to_str()


def make_tokenizer(
  config: config_lib.TokenizerConfig, train_texts: Iterable[str]
) -> Tokenizer:
  """Returns the tokenizer of a config.

  Args:
    config: `kind`, and `vocab_size` (for `bpe`) or `path` (for `file`). Kind `symbols`
      is not made here but by its task, see tasks/corpus.py.
    train_texts: texts of the train split, in any order; only `bpe` reads them.

  Raises:
    DataError: `path` is missing or no tokenizer, or it loses text.
  """
  if config.kind == "bytes":
    return ByteTokenizer()
  if config.kind == "bpe":
    return train_bpe(config.vocab_size, train_texts)
  return load_tokenizer(config.path)


def check_vocab_size(tokenizer: Tokenizer, vocab_size: int) -> None:
  """Raises ConfigError if an embedding of `vocab_size` rows is too small."""
  if vocab_size < tokenizer.vocab_size:
    raise config_lib.ConfigError(
      f"tokenizer.vocab_size must be at least {tokenizer.vocab_size} (the ids of this "
      f"tokenizer), got {vocab_size}."
    )


def save_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike) -> None:
  """Writes `tokenizer.json`; for a model folder also special ids and chat format."""
  content, special = _split(tokenizer.to_json())
  if special is not None:
    beside = Path(path).with_name(SPECIAL_TOKENS)
    files.write_whole(beside, json.dumps(special).encode())
  files.write_whole(path, content.encode())
  if (chat := getattr(tokenizer, "chat", None)) is not None:
    files.write_json(Path(path).with_name(CHAT), chat._asdict())


def load_tokenizer(
  path: str | os.PathLike, folder: str | os.PathLike | None = None
) -> Tokenizer:
  """Returns the tokenizer of a `tokenizer.json`, written by us or any other tool.

  Args:
    path: the file.
    folder: the model folder that names the special ids; by default the file's folder,
      if that is a model folder.

  Raises:
    DataError: no such file, not a tokenizer, or one that loses text.
  """
  path = Path(os.path.expanduser(os.fspath(path)))
  beside = path.with_name(SPECIAL_TOKENS)
  try:
    text = files.read_text(path)
    special = files.read_json(beside) if folder is None and beside.is_file() else None
  except (OSError, ValueError) as error:
    raise DataError(
      f"tokenizer.path must be a readable tokenizer.json, got {str(path)!r} ({error})."
    ) from error
  folder = path.parent if folder is None else Path(folder)
  if special is None and (model_files := read_files(folder)):
    find = functools.partial(special_tokens, model_files, where=folder)
  else:
    find = _stated(special)
  tokenizer = _parse(text, str(path), find)
  if isinstance(tokenizer, SubwordTokenizer):
    tokenizer.chat = read_format(folder)
  return tokenizer


def in_run(
  config: config_lib.TokenizerConfig, workdir: Path
) -> config_lib.TokenizerConfig:
  """Returns the section with the run folder's own copy as `path`, once it has one.

  So a run needs the file that it was started with no more.

  Raises:
    ConfigError: `path` names another tokenizer than the run has.
  """
  own = workdir / run_folder.TOKENIZER
  if config.kind != "file" or not own.is_file():
    return config
  given = Path(os.path.expanduser(config.path))
  if config.path not in (own.name, str(own)) and given.is_file():
    if load_tokenizer(given).to_json() != load_tokenizer(own).to_json():
      if not run_folder.is_begun(workdir):
        return config  # An attempt that was refused left its tokenizer.
      raise config_lib.ConfigError(
        f"tokenizer.path must hold the tokenizer that the run was started with, {own}; "
        f"got another one, {config.path!r}."
      )
  return dataclasses.replace(config, path=str(own))


def tokenizer_from_json(text: str, name: str = "tokenizer.json") -> Tokenizer:
  """Inverse of `Tokenizer.to_json`; `name` is for the error message."""
  content, special = _split(text)
  return _parse(content, name, _stated(special))


def plain_json(tokenizer: Tokenizer) -> str:
  """Returns the content of a `tokenizer.json` without our extra key."""
  return _split(tokenizer.to_json())[0]


def _split(text: str) -> tuple[str, dict[str, Any] | None]:
  """Returns a `tokenizer.json` without our key, and the value of the key."""
  if f'"{KEY}": {{"bos_id"' not in text:
    return text, None
  content = json.loads(text)
  special = content.pop(KEY)
  return json.dumps(content, indent=2, ensure_ascii=False), special


def _stated(
  special: dict[str, Any] | None,
) -> Callable[[tokenizers.Tokenizer], SpecialTokens | None]:
  """Returns a function that returns the special ids of `special_tokens.json`."""
  if special is None:
    return lambda model: None
  ends = tuple(special["end_ids"])
  return lambda model: SpecialTokens(special["bos_id"], special["eos_id"], ends)


def _parse(
  text: str, name: str, find: Callable[[tokenizers.Tokenizer], SpecialTokens | None]
) -> Tokenizer:
  """Returns the tokenizer of a `tokenizer.json`; `find` returns its special ids."""
  try:
    content = json.loads(text)
    loaded = tokenizers.Tokenizer.from_str(text)
    loaded.no_padding()
    special = find(loaded)
    if _is_bytes(content) and special in (None, _BYTES):
      return ByteTokenizer()
    if symbols := _symbols(content):
      return SymbolTokenizer(symbols)
    return SubwordTokenizer(loaded, name, special, content)
  except DataError:
    raise
  # The library raises plain Exception for content that it cannot parse. For content
  # that it did not expect it panics: PanicException cannot be imported.
  except BaseException as error:
    is_panic = type(error).__name__ == "PanicException"
    if not (is_panic or isinstance(error, Exception)):
      raise
    raise DataError(
      f"tokenizer.path must hold a Hugging Face tokenizer, {name!r} does not "
      f"({type(error).__name__}: {error})."
    ) from error


def _is_bytes(values: dict[str, Any]) -> bool:
  """Returns whether the parsed content equals `ByteTokenizer.to_json`."""
  added = {token["content"]: token["id"] for token in values.get("added_tokens", ())}
  return (
    values.get("normalizer") is None
    and values["model"].get("vocab") == byte_vocab()
    and values["model"].get("merges") == []
    and added == {BOS: ByteTokenizer.bos_id, EOS: ByteTokenizer.eos_id}
  )


def _symbols(values: dict[str, Any]) -> list[str]:
  """Returns the symbols of a `SymbolTokenizer.to_json`; [] for other content."""
  model = values["model"]
  if model.get("type") != "WordLevel":
    return []
  bos, eos, *symbols = sorted(model["vocab"], key=model["vocab"].get)
  is_ours = (bos, eos, model["unk_token"]) == (BOS, EOS, EOS)
  return symbols if is_ours else []
