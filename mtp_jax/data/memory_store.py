"""Token stores in memory: documents tokenized by this process, and their texts."""

from collections.abc import Sequence

import numpy as np

from mtp_jax.data import packing, sources
from mtp_jax.data import tokenizers as tokenizers_lib
from mtp_jax.data.packing import token_ids

# Texts encoded at once: the library's encodings take far more memory than their ids.
_BATCH_TEXTS = 256


class MemoryStore:
  """`packing.TokenStore` of documents that were tokenized in this process."""

  def __init__(
    self,
    documents: sources.Documents,
    tokenizer: tokenizers_lib.Tokenizer,
    identity: dict[str, str | int | float],
  ):
    self.identity = identity
    self.hashes_NX = documents.hashes_NX
    self.has_unscored = documents.stats.num_chats > 0
    is_short = tokenizer.vocab_size <= 1 << 16 and not self.has_unscored
    dtype = np.uint16 if is_short else np.int32
    parts = []
    for begin in range(0, len(documents.documents), _BATCH_TEXTS):
      batch = documents.documents[begin : begin + _BATCH_TEXTS]
      encoded = tokenizers_lib.encode_batch(tokenizer, [x.text for x in batch])
      parts += [
        tokenizers_lib.document(tokenizer, ids, *x.edges).astype(dtype)
        for x, ids in zip(batch, encoded, strict=True)
      ]
    self.lengths_N = np.array([len(part) for part in parts], np.int64)
    self._starts_N = np.cumsum(self.lengths_N) - self.lengths_N
    self._tokens = np.concatenate(parts)

  def read(self, document: int, begin: int, end: int) -> np.ndarray:
    start = self._starts_N[document]
    return self._tokens[start + begin : start + end].astype(np.int32)


class DecodedTexts(Sequence[str]):
  """Texts of some documents of a token store, decoded on access."""

  def __init__(
    self,
    store: packing.TokenStore,
    tokenizer: tokenizers_lib.Tokenizer,
    documents: np.ndarray,
  ):
    self._store, self._tokenizer, self._documents = store, tokenizer, documents

  def __len__(self) -> int:
    return len(self._documents)

  def __getitem__(self, index: int) -> str:
    document = int(self._documents[index])
    length = int(self._store.lengths_N[document])
    return self._tokenizer.decode(token_ids(self._store.read(document, 0, length)))
