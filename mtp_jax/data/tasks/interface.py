"""`Task`: the interface of synthetic tasks; generates examples and scores answers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Example(NamedTuple):
  """Symbols of one example; only the answer and the end after it are targets."""

  prompt: tuple[str, ...]
  answer: tuple[str, ...]


class Task:
  """A synthetic task.

  symbols:    all symbols of prompts and answers.
  max_tokens: the longest prompt with its answer, in symbols.
  max_prompt, max_answer: the longest of each in held-out examples, in symbols.
  splits_by_prompt: the hash of the prompt decides the split of an example, so that no
    held-out prompt is trained on. False if held-out examples come from another
    distribution.
  answer_ends: an answer ends with eos. False if text continues after the answer; then
    the first `max_answer` generated symbols are the answer.
  """

  symbols: tuple[str, ...]
  max_tokens: int
  max_prompt: int
  max_answer: int
  splits_by_prompt = True
  answer_ends = True

  def sample(self, rng: np.random.Generator, is_held_out: bool) -> Example:
    """Returns one example; all randomness comes from `rng`."""
    raise NotImplementedError

  def is_correct(self, prompt: tuple[str, ...], answer: tuple[str, ...]) -> bool:
    """Returns whether `answer`, which may be any symbols, is right."""
    raise NotImplementedError

  def group(self, prompt: tuple[str, ...]) -> str:
    """Returns the group of a prompt, for accuracy by group; '' for no group."""
    del prompt
    return ""

  def baselines(self, prompts: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """Returns the accuracy of trivial rules on these prompts, by the rule's name."""
    del prompts
    return {}


class DrawnTask(Task):
  """A task whose examples have one length and are drawn many at a time.

  Every prompt has `max_prompt` symbols, every answer `max_answer`.

  num_words: random words per example.
  """

  num_words: int

  def draw(self, words_NW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(symbols_NS, is_valid_N)`: N examples, and which of them may be used.

    An example is indices into `symbols`, first the prompt, then the answer.

    Args:
      words_NW: [N, num_words] uint64, uniform. An example depends on its row alone.
    """
    raise NotImplementedError


def numbers(count: int, first: int = 0) -> tuple[str, ...]:
  """Returns `count` whole numbers as symbols."""
  return tuple(map(str, range(first, first + count)))
