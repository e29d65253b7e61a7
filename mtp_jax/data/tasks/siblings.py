"""Sibling discovery: two children of one parent, named before the parent is.

Nagarajan et al. 2025 (arXiv 2504.15266). Every parent has children of its own; an
example is a random prefix (which conditions the sample and says nothing), two different
children and, last, their parent:

  k s a ... :        c17 c803 p1

An answer is coherent if both are children of that parent. What counts is how many of
many answers are coherent, different from each other, and not in the training set (see
`evaluate.task_metrics`).
"""

import string

import numpy as np

from mtp_jax.config import SiblingsConfig
from mtp_jax.data.tasks.interface import Example


class Siblings:
  splits_by_prompt = False
  answer_ends = True

  def __init__(self, config: SiblingsConfig):
    self._config = config
    count = config.num_parents * config.num_children
    self._children = tuple(f"c{i}" for i in range(count))
    self._parents = tuple(f"p{i}" for i in range(config.num_parents))
    self.symbols = (*string.ascii_lowercase, ":", *self._parents, *self._children)
    self.max_prompt = config.prefix_length + 1
    self.max_answer = 3
    self.max_tokens = self.max_prompt + self.max_answer

  def sample(self, rng: np.random.Generator, is_held_out: bool) -> Example:
    del is_held_out
    c = self._config
    prefix = [string.ascii_lowercase[i] for i in rng.integers(26, size=c.prefix_length)]
    parent = int(rng.integers(c.num_parents))
    pair = rng.permutation(c.num_children)[:2] * c.num_parents + parent
    children = [self._children[i] for i in pair]
    return Example((*prefix, ":"), (*children, self._parents[parent]))

  def is_correct(self, prompt: tuple[str, ...], answer: tuple[str, ...]) -> bool:
    del prompt
    if len(answer) != 3:
      return False
    *children, parent = answer
    return (
      parent in self._parents
      and len(set(children)) == 2
      and all(x.startswith("c") and len(x) > 1 for x in children)
      and all(
        int(x[1:]) % self._config.num_parents == int(parent[1:]) for x in children
      )
    )

  def group(self, prompt: tuple[str, ...]) -> str:
    del prompt
    return ""
