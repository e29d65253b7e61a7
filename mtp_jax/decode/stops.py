"""Strings that end a completion, found inside the compiled loop.

A stop string may begin and end amid tokens. An automaton reads the bytes of the text
(Aho and Corasick 1975): its state is the longest end of the text that begins a stop
string. It starts with a completion: a prompt is no part of what may end it.

Legend: S states, V vocab.
"""

import functools
from collections.abc import Sequence

import numpy as np

from mtp_jax.data.tokenizers import Tokenizer

FOUND = 255  # State after a stop string.
MOST_BYTES = 250


@functools.lru_cache(maxsize=8)
def transitions(
  strings: tuple[str, ...], tokenizer: Tokenizer, vocab_size: int
) -> np.ndarray:
  """Returns next_SV, uint8: the state after a token, by state and token.

  The first state is 0. Tokens without text, such as specials, change nothing.

  Raises:
    ValueError: an empty string, or more than `MOST_BYTES` bytes in all.
  """
  stops = [string.encode() for string in strings]
  if not all(stops):
    raise ValueError("stop must have no empty string, got ''.")
  if sum(map(len, stops)) > MOST_BYTES:
    raise ValueError(
      f"stop must have strings of at most {MOST_BYTES} bytes together, got "
      f"{sum(map(len, stops))}."
    )
  prefixes = {stop[:n] for stop in stops for n in range(len(stop))}
  state_of = {prefix: i for i, prefix in enumerate(sorted(prefixes))}
  after_byte = np.full((256, 256), FOUND, np.uint8)  # By state and byte.
  for prefix, state in state_of.items():
    for byte in range(256):
      text = prefix + bytes([byte])
      if not text.endswith(tuple(stops)):
        while text not in state_of:
          text = text[1:]
        after_byte[state, byte] = state_of[text]
  texts = tokenizer.token_texts
  lengths_V = np.zeros(vocab_size, np.int64)
  lengths_V[: len(texts)] = [len(text) for text in texts]
  # So that programs of a few more or fewer states are the same.
  num_states = max(16, 1 << (len(state_of) - 1).bit_length())
  next_SV = np.repeat(np.arange(num_states, dtype=np.uint8)[:, None], vocab_size, 1)
  for i in range(lengths_V.max()):
    tokens = np.flatnonzero(lengths_V > i)
    bytes_ = np.array([texts[token][i] for token in tokens])
    next_SV[:, tokens] = after_byte[next_SV[:, tokens], bytes_]
  return next_SV


def cut(pieces: Sequence[str], strings: Sequence[str], is_finished: bool) -> list[str]:
  """Returns the texts of tokens, joined up to the first stop string.

  The text of a completion that is not finished is held back where it may still become
  a stop string.
  """
  text = "".join(pieces)
  ends = [text.find(string) for string in strings if string in text]
  end = min(ends, default=len(text))
  if not ends and not is_finished:
    known = text.rstrip("\ufffd")  # Of a character of which bytes are missing.
    held = (
      n for string in strings for n in range(1, len(string))
      if known.endswith(string[:n])
    )
    end = len(known) - max(held, default=0) if strings else len(text)
  kept = []
  for piece in pieces:
    kept.append(piece[:end])
    end -= len(kept[-1])
  return kept
