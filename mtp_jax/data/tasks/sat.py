"""3-SAT: an assignment that satisfies every clause.

The task of Huang et al. 2026; their clauses and format are not published, so these are
ours. A hidden assignment is drawn, then clauses of three different variables with
random signs, of those that it satisfies. Positive and negative literals are symbols:

  +1 -3 +4 , -2 +3 -5 , ... =        -1 +2 +3 -4 +5

Every assignment that satisfies all clauses is right, not the hidden one alone.
"""

import numpy as np

from mtp_jax.config import SatConfig
from mtp_jax.data.tasks.interface import Example


class Sat:
  splits_by_prompt = True
  answer_ends = True

  def __init__(self, config: SatConfig):
    self._config = config
    variables = range(1, 1 + config.num_variables)
    self._literals = tuple(f"{sign}{v}" for v in variables for sign in "+-")
    self.symbols = (*self._literals, ",", "=")
    self.max_prompt = 4 * config.num_clauses
    self.max_answer = config.num_variables
    self.max_tokens = self.max_prompt + self.max_answer

  def sample(self, rng: np.random.Generator, is_held_out: bool) -> Example:
    del is_held_out
    n = self._config.num_variables
    is_true_N = rng.integers(2, size=n) == 1
    prompt: list[str] = []
    for _ in range(self._config.num_clauses):
      while True:
        chosen_3 = rng.permutation(n)[:3]
        sign_3 = rng.integers(2, size=3) == 1
        if np.any(is_true_N[chosen_3] == sign_3):
          break
      pairs = zip(chosen_3, sign_3, strict=True)
      prompt += [*(_literal(v, sign) for v, sign in pairs), ","]
    prompt[-1] = "="
    answer = tuple(_literal(v, x) for v, x in enumerate(is_true_N))
    return Example(tuple(prompt), answer)

  def is_correct(self, prompt: tuple[str, ...], answer: tuple[str, ...]) -> bool:
    variables = tuple(x[1:] for x in answer)
    expected = tuple(str(1 + v) for v in range(self._config.num_variables))
    if variables != expected or not set(answer) <= set(self._literals):
      return False
    clauses = (prompt[i : i + 3] for i in range(0, len(prompt), 4))
    return all(set(clause) & set(answer) for clause in clauses)

  def group(self, prompt: tuple[str, ...]) -> str:
    del prompt
    return ""


def _literal(variable: int, is_true: bool) -> str:
  return f"{'+' if is_true else '-'}{1 + variable}"
