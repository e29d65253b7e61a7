"""What a task is: a generator of examples and an exact score."""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Example(NamedTuple):
  """Symbols of one example. Only the answer, and the end after it, is a target."""

  prompt: tuple[str, ...]
  answer: tuple[str, ...]


class Task:
  """A synthetic task.

  symbols:    everything that prompts and answers are made of.
  max_tokens: most symbols of a prompt and its answer together.
  max_prompt, max_answer: most symbols of each, in held-out examples.
  splits_by_prompt: the hash of the prompt decides the split of an example, so that no
    held-out prompt is trained on. False where held-out examples come from another
    distribution.
  answer_ends: an answer ends with eos. False where text goes on after it: what comes
    first is then the answer, as long as it must be.
  """

  symbols: tuple[str, ...]
  max_tokens: int
  max_prompt: int
  max_answer: int
  splits_by_prompt = True
  answer_ends = True

  def sample(self, rng: np.random.Generator, is_held_out: bool) -> Example:
    """Returns one example; all randomness is from `rng`."""
    raise NotImplementedError

  def is_correct(self, prompt: tuple[str, ...], answer: tuple[str, ...]) -> bool:
    """Returns whether an answer, whoever gave it, is right. Any symbols may come."""
    raise NotImplementedError

  def group(self, prompt: tuple[str, ...]) -> str:
    """Returns the kind of prompt that accuracy is also reported for; '' for none."""
    del prompt
    return ""

  def baselines(self, prompts: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """Returns the accuracy of trivial rules on these prompts, by the rule's name."""
    del prompts
    return {}


class DrawnTask(Task):
  """A task whose examples all have one length and are drawn many at a time.

  A prompt has `max_prompt` symbols and an answer `max_answer`.

  num_words: random words that one example is made from.
  """

  num_words: int

  def draw(self, words_NW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns N examples and which of them may be used.

    `(symbols_NS, is_valid_N)`: indices into `symbols`, prompt and answer, and bool.

    Args:
      words_NW: [N, num_words] uint64, uniform. An example depends on its row alone.
    """
    raise NotImplementedError


def numbers(count: int, first: int = 0) -> tuple[str, ...]:
  """Returns `count` whole numbers as symbols."""
  return tuple(map(str, range(first, first + count)))


def has_repeats(values: tuple[str, ...]) -> bool:
  return any(count > 1 for count in collections.Counter(values).values())
