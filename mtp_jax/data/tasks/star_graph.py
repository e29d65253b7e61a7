"""Star graphs G(d, l): find the one arm that leads to the goal.

Bachmann and Nagarajan 2024 (arXiv 2403.06963), their released code's format. `d` arms
leave a source; an arm has `l` nodes, source and goal included. Edges are written from
the source outward and shuffled; then come source and goal, and the path is asked for:

  4 1 | 2 7 | 1 9 | 4 2 / 4 7 =        4 2 7

All steps but the first follow from the edges; the first step needs the whole arm. A
model that learns to copy the next edge from the step before never learns the first
step, and stays at 1/d. Unlike the released code, each example has a begin token and an
end token, which is a target, too.
"""

from collections.abc import Sequence

import numpy as np

from mtp_jax.config import StarGraphConfig
from mtp_jax.data.tasks.interface import DrawnTask, numbers


class StarGraph(DrawnTask):
  """Draws labels of nodes without replacement; `reversed` asks for the path backward.

  The goal is then named first, and every step follows from the edges: the control that
  next-token prediction can learn.
  """

  def __init__(self, config: StarGraphConfig):
    self._config = config
    self._num_edges = edges = config.arms * (config.length - 1)
    self.num_words = config.num_labels + edges
    self.symbols = (*numbers(config.num_labels), "|", "/", "=")
    self.max_prompt = 3 * edges + 3
    self.max_answer = config.length
    self.max_tokens = self.max_prompt + self.max_answer

  def draw(self, words_NW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Legend: A arms, L nodes of an arm, E edges."""
    c, N, E = self._config, len(words_NW), self._num_edges
    bar, slash, equals = range(c.num_labels, c.num_labels + 3)
    # The order of random numbers is a random order.
    nodes_NV = np.argsort(words_NW[:, : c.num_labels])[:, : 1 + E]
    arms_NAL = np.concatenate(
      [
        np.broadcast_to(nodes_NV[:, :1, None], (N, c.arms, 1)),
        nodes_NV[:, 1:].reshape(N, c.arms, c.length - 1),
      ],
      axis=2,
    )
    order_NE = np.argsort(words_NW[:, c.num_labels :])
    prompt_NE3 = np.full((N, E, 3), bar)
    for i, ends_NAL in enumerate((arms_NAL[:, :, :-1], arms_NAL[:, :, 1:])):
      ends_NE = ends_NAL.reshape(N, E)
      prompt_NE3[:, :, i] = np.take_along_axis(ends_NE, order_NE, axis=1)
    prompt_NE3[:, -1, 2] = slash
    path_NL = arms_NAL[:, 0]  # The labels are random: any arm will do.
    answer_NL = path_NL[:, ::-1] if c.reversed else path_NL
    symbols_NS = np.concatenate(
      [
        prompt_NE3.reshape(N, 3 * E), path_NL[:, [0, -1]], np.full((N, 1), equals),
        answer_NL,
      ],
      axis=1,
    )
    return symbols_NS, np.ones(N, bool)

  def is_correct(self, prompt: tuple[str, ...], answer: tuple[str, ...]) -> bool:
    return answer == self._path(prompt)

  def baselines(self, prompts: Sequence[tuple[str, ...]]) -> dict[str, float]:
    del prompts
    return {"random arm": 1 / self._config.arms}

  def _path(self, prompt: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the path, found from the goal backward: every node has one parent."""
    slash = prompt.index("/")
    source, goal = prompt[slash + 1 : slash + 3]
    parent = {prompt[i + 1]: prompt[i] for i in range(0, slash, 3)}
    path = [goal]
    while path[-1] != source:
      path.append(parent[path[-1]])
    return tuple(path if self._config.reversed else path[::-1])
