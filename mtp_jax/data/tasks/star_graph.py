"""Star graphs G(d, l): find the one arm that leads to the goal.

Bachmann and Nagarajan 2024 (arXiv 2403.06963), their released code's format. `d` arms
leave a source; an arm has `l` nodes, source and goal included. Edges are written from
the source outward and shuffled; then come source and goal, and the path is asked for:

  4 1 | 2 7 | 1 9 | 4 2 / 4 7 =        4 2 7

All but the first step follow from the edges, and the first one needs the whole arm: a
model that learns to copy the next edge from the one before never learns it, and stays
at 1/d. Ours: a begin before and an end after each example, the end is a target too.
"""

import itertools

import numpy as np

from mtp_jax.config import StarGraphConfig
from mtp_jax.data.tasks.interface import Example, numbers


class StarGraph:
  """Draws labels of nodes without replacement; `reversed` asks for the path backward.

  The goal is then named first, and every step follows from the edges: the control that
  next-token prediction can learn.
  """

  splits_by_prompt = True
  answer_ends = True

  def __init__(self, config: StarGraphConfig):
    self._config = config
    edges = config.arms * (config.length - 1)
    self.symbols = (*numbers(config.num_labels), "|", "/", "=")
    self.max_prompt = 3 * edges + 3
    self.max_answer = config.length
    self.max_tokens = self.max_prompt + self.max_answer

  def sample(self, rng: np.random.Generator, is_held_out: bool) -> Example:
    del is_held_out
    c = self._config
    num_nodes = 1 + c.arms * (c.length - 1)
    source, *others = map(str, rng.permutation(c.num_labels)[:num_nodes])
    arms = [
      [source, *others[i : i + c.length - 1]]
      for i in range(0, len(others), c.length - 1)
    ]
    edges = [pair for arm in arms for pair in itertools.pairwise(arm)]
    prompt: list[str] = []
    for i in rng.permutation(len(edges)):
      prompt += [*edges[i], "|"]
    path = arms[0]  # The labels are random: any arm will do.
    prompt[-1:] = ["/", path[0], path[-1], "="]
    return Example(tuple(prompt), tuple(path[::-1] if c.reversed else path))

  def is_correct(self, prompt: tuple[str, ...], answer: tuple[str, ...]) -> bool:
    return answer == self._path(prompt)

  def group(self, prompt: tuple[str, ...]) -> str:
    del prompt
    return ""

  def _path(self, prompt: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the path, found from the goal backward: every node has one parent."""
    slash = prompt.index("/")
    source, goal = prompt[slash + 1 : slash + 3]
    parent = {prompt[i + 1]: prompt[i] for i in range(0, slash, 3)}
    path = [goal]
    while path[-1] != source:
      path.append(parent[path[-1]])
    return tuple(path if self._config.reversed else path[::-1])
