"""Tokenizers of the Hugging Face library, checked to lose no text; training of BPE."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mtp_jax.data.chat import ChatFormat
from mtp_jax.data.errors import DataError
from mtp_jax.data.special_tokens import BOS, EOS, SpecialTokens

# Our own key in the JSON of a tokenizer: the special ids of its model folder.
KEY = "mtp_jax"
# Names of begin and end tokens in well-known tokenizers; the first one found is used.
_BOS_NAMES = (
  BOS, "<|begin_of_text|>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<s>",
  "<bos>", "<|startoftext|>", "[BOS]",
)  # fmt: skip
_EOS_NAMES = (
  EOS, "<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "</s>",
  "<eos>", "<|endoftext|>", "[EOS]",
)  # fmt: skip
_MOST_TOKENS = 1 << 22
_PROBE = 'def f(x):\n\treturn  {x: "\u00e9\u6f22\U0001f642"}\n\n    # A,b 123\n'


class SubwordTokenizer:
  """A tokenizer of the `tokenizers` library.

  A file in a model folder has that folder's begin and end of document. A file by itself
  has the first special tokens with well-known names (`_BOS_NAMES`, `_EOS_NAMES`);
  without one, <|bos|> or <|eos|> is added after the file's own ids. Text that contains
  the name of a special token is encoded as plain text, so that no document can forge a
  document boundary.

  Raises:
    DataError: the tokenizer loses text (unknown tokens, lower case, white space), so
      that bits per byte and completions would be wrong; or it encodes text that looks
      like a special token as that token.
  """

  def __init__(
    self,
    model: tokenizers.Tokenizer,
    name: str,
    special: SpecialTokens | None = None,
    content: dict[str, Any] | None = None,
  ):
    """Args:
      model: the library's tokenizer, as read from the file.
      name: for messages.
      special: the special ids of the file's model folder; None without a folder.
      content: the parsed file; needed with `special`.
    """
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True
    if getattr(model.model, "dropout", None):  # The same text has the same tokens.
      model.model.dropout = None
    self._model = model
    self.chat: ChatFormat | None = None
    if special is None:
      bos, eos = self._special(_BOS_NAMES), self._special(_EOS_NAMES)
      special, self._json = SpecialTokens(bos, eos, (eos,)), model.to_str()
      vocab = model.get_vocab(with_added_tokens=True)
    else:
      # Kept from the file: the library does not write everything, padding for example.
      values = special._asdict() | {"end_ids": list(special.end_ids)}
      self._json = json.dumps(content | {KEY: values}, ensure_ascii=False)
      # Special tokens do not count: a model may lack rows for unused ones.
      vocab = model.get_vocab(with_added_tokens=True)
      added = model.get_added_tokens_decoder()
      vocab = {t: i for t, i in vocab.items() if i not in added or not added[i].special}
    self.bos_id, self.eos_id, self.end_ids = special
    ids = [i for i in (*special[:2], *special.end_ids) if i is not None]
    self.vocab_size = 1 + max([*vocab.values(), *ids], default=0)
    if self.vocab_size > _MOST_TOKENS:
      raise DataError(
        f"tokenizer.path must have token ids below {_MOST_TOKENS}, {name!r} has "
        f"{self.vocab_size - 1}."
      )
    self.token_texts = self._texts(vocab)
    self.token_bytes_V = np.array([len(text) for text in self.token_texts], np.int64)
    self._check_lossless(name)
    self._check_unforgeable(name)

  def encode(self, text: str) -> np.ndarray:
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]

  def encode_marked(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(ids [n], offsets [n, 2])` of text in which special tokens are meant.

    Offsets are the first character of a token and the one after its last.
    """
    self._model.encode_special_tokens = False
    encoding = self._model.encode(text, add_special_tokens=False)
    self._model.encode_special_tokens = True
    return np.array(encoding.ids, np.int32), np.array(encoding.offsets).reshape(-1, 2)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    ids = np.asarray(ids).tolist()
    return self._model.decode(ids, skip_special_tokens=True)

  def special_id(self, name: str) -> int | None:
    added = self._model.get_added_tokens_decoder()
    i = self._model.token_to_id(name)
    return i if i in added and added[i].special else None

  def to_json(self) -> str:
    return self._json

  def __eq__(self, other: object) -> bool:
    return isinstance(other, SubwordTokenizer) and self._json == other._json

  def __hash__(self) -> int:
    return hash(self._json)

  def _special(self, names: tuple[str, ...]) -> int:
    added = self._model.get_added_tokens_decoder()
    ids = {token.content: i for i, token in added.items() if token.special}
    for name in names:
      if name in ids:
        return ids[name]
    self._model.add_special_tokens([names[0]])
    return self._model.token_to_id(names[0])

  def _texts(self, vocab: dict[str, int]) -> list[bytes]:
    added = self._model.get_added_tokens_decoder()
    is_byte_level = '"ByteLevel"' in json.dumps(
      json.loads(self._model.to_str())["decoder"]
    )
    texts, bytes_of = [b""] * self.vocab_size, byte_vocab()
    for token, i in vocab.items():
      if i in added:
        texts[i] = b"" if added[i].special else added[i].content.encode()
      elif is_byte_level and bytes_of.keys() >= set(token):
        texts[i] = bytes(map(bytes_of.get, token))
      elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        texts[i] = bytes.fromhex(token[3:5])  # SentencePiece's byte fallback.
      else:
        texts[i] = token.replace("\u2581", " ").encode()
    return texts

  def _check_lossless(self, name: str) -> None:
    added = self._model.get_added_tokens_decoder().values()
    for text in (_PROBE, *(f"a{x.content}b" for x in added if not x.special)):
      try:
        ids = self.encode(text)
      # The library raises plain Exception for text that has no token.
      except Exception as error:
        raise DataError(
          f"tokenizer.path must be a tokenizer that encodes any text, {name!r} does "
          f"not encode {text!r} ({error})."
        ) from error
      num_bytes, expected = int(self.token_bytes_V[ids].sum()), len(text.encode())
      if self.decode(ids) != text or num_bytes - expected not in (0, 1):
        raise DataError(
          f"tokenizer.path must be a tokenizer that loses no text, got {name!r}: it "
          f"turns {text!r} into {self.decode(ids)!r} ({num_bytes} bytes by its tokens, "
          f"{expected} in the text)."
        )

  def _check_unforgeable(self, name: str) -> None:
    # A Unigram model, for example, has the names among its pieces.
    added = self._model.get_added_tokens_decoder()
    for special in {self.bos_id, self.eos_id} & added.keys():
      text = f"a{added[special].content}b"
      if special in self.encode(text):
        raise DataError(
          "tokenizer.path must be a tokenizer that encodes the names of its special "
          f"tokens as plain text, {name!r} makes token {special} of "
          f"{added[special].content!r}."
        )


def train_bpe(vocab_size: int, train_texts: Iterable[str]) -> SubwordTokenizer:
  """Returns byte-level BPE (GPT-2's pre-tokenizer), which encodes any text."""
  model = tokenizers.Tokenizer(models.BPE())
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[BOS, EOS],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator(train_texts, trainer)
  return SubwordTokenizer(model, "BPE trained on the corpus")


def byte_vocab() -> dict[str, int]:
  """Returns GPT-2's printable character for each byte, mapped to the byte."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  vocab = {chr(byte): byte for byte in printable}
  vocab.update({chr(256 + i): byte for i, byte in enumerate(others)})
  return dict(sorted(vocab.items(), key=lambda item: item[1]))
