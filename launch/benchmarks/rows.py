"""What the benchmarks train on, with NumPy alone."""

import numpy as np

from mtp_jax.batch import Batch
from mtp_jax.config import Config


def one_document_batch(config: Config, seed: int = 0) -> Batch:
  """Returns rows [B, ...] of random tokens, each row one document without an end."""
  rng = np.random.default_rng(seed)
  rows, length = config.data.batch_size, config.data.seq_len
  extra = 1 + config.mtp.depth
  ids = rng.integers(0, config.tokenizer.vocab_size, (rows, length + extra), np.int32)
  ones = np.ones_like(ids)
  positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
  return Batch(
    ids[:, :length], ones[:, :length], positions, ids[:, length:], ones[:, length:]
  )
