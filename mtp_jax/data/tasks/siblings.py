"""Sibling discovery: two children of one parent, named before the parent is.

Nagarajan et al. 2025 (arXiv 2504.15266). Every parent has children of its own; an
example is a random prefix (noise, so that samples differ), two different children and,
last, their parent:

  k s a ... :        c17 c803 p1

An answer is coherent if both are children of that parent. The score is the share of
answers that are coherent, distinct, and not in the training set (see
`evaluate.task_metrics`).
"""

import string

import numpy as np

from mtp_jax.config import SiblingsConfig
from mtp_jax.data.tasks.interface import DrawnTask


class Siblings(DrawnTask):
  splits_by_prompt = False

  def __init__(self, config: SiblingsConfig):
    self._config = config
    count = config.num_parents * config.num_children
    self._children = tuple(f"c{i}" for i in range(count))
    self._parents = tuple(f"p{i}" for i in range(config.num_parents))
    self.symbols = (*string.ascii_lowercase, ":", *self._parents, *self._children)
    self.num_words = config.prefix_length + 3
    self.max_prompt = config.prefix_length + 1
    self.max_answer = 3
    self.max_tokens = self.max_prompt + self.max_answer

  def draw(self, words_NW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    c, N = self._config, len(words_NW)
    ends = [len(string.ascii_lowercase)] * c.prefix_length
    ends += [c.num_parents, c.num_children, c.num_children - 1]
    values_NW = (words_NW % np.array(ends, np.uint64)).astype(np.int64)
    prefix_NX, (parent_N, first_N, step_N) = values_NW[:, :-3], values_NW[:, -3:].T
    # A step of 1 to num_children - 1 around the circle leads to any other child.
    second_N = (first_N + 1 + step_N) % c.num_children
    colon = len(string.ascii_lowercase)
    first_child = colon + 1 + c.num_parents
    children_N2 = np.stack([first_N, second_N], axis=1) * c.num_parents
    symbols_NS = np.concatenate(
      [
        prefix_NX, np.full((N, 1), colon),
        first_child + children_N2 + parent_N[:, None],
        colon + 1 + parent_N[:, None],
      ],
      axis=1,
    )
    return symbols_NS, np.ones(N, bool)

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
