"""Generated texts, available on every machine: prose and stories.

language_reference: the topics of Python's `help()`, English prose with some code.
stories:            1,500 fixed examples of the task `induction`, written as text.
"""

import functools
from collections.abc import Callable, Sequence
from pydoc_data.topics import topics

import numpy as np

from mtp_jax.config import InductionConfig
from mtp_jax.data.tasks.induction import Induction

_NUM_STORIES = 1500
_STORIES = InductionConfig(
  num_sentences=10, num_halves=50, num_names=500, fresh_share=0.0
)


def _language_reference() -> Sequence[tuple[str, str]]:
  return tuple(topics.items())


@functools.cache
def _stories() -> Sequence[tuple[str, str]]:
  task, stories = Induction(_STORIES), []
  for number in range(_NUM_STORIES):
    rng = np.random.Generator(np.random.Philox(key=[0, number]))
    words = task.sample(rng, is_held_out=False).answer
    stories.append((f"story {number}", " ".join(words) + "\n"))
  return tuple(stories)


# data.source -> (name, text) of its documents.
GENERATED: dict[str, Callable[[], Sequence[tuple[str, str]]]] = {
  "language_reference": _language_reference,
  "stories": _stories,
}
