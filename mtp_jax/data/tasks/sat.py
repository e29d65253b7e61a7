"""3-SAT: an assignment that satisfies every clause.

The task of Huang et al. 2026; their clauses and format are not published, so these are
ours. A hidden assignment is drawn, then clauses of three different variables with
random signs, of those that it satisfies. Positive and negative literals are symbols:

  +1 -3 +4 , -2 +3 -5 , ... =        -1 +2 +3 -4 +5

Every assignment that satisfies all clauses is right, not the hidden one alone; with
`unique`, formulas are drawn until only the hidden one satisfies them. Trivial rules
solve many such formulas: see `baselines`.
"""

from collections.abc import Sequence

import numpy as np

from mtp_jax.config import SAT_TABLE_VARIABLES, SatConfig
from mtp_jax.data.tasks.interface import DrawnTask


class Sat(DrawnTask):
  def __init__(self, config: SatConfig):
    self._config = config
    variables = range(1, 1 + config.num_variables)
    self._literals = tuple(f"{sign}{v}" for v in variables for sign in "+-")
    self.symbols = (*self._literals, ",", "=")
    self.num_words = config.num_variables + 4 * config.num_clauses
    self.max_prompt = 4 * config.num_clauses
    self.max_answer = config.num_variables
    self.max_tokens = self.max_prompt + self.max_answer

  def draw(self, words_NW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Legend: V variables, C clauses, 3 literals of a clause."""
    c, N, V = self._config, len(words_NW), self._config.num_variables
    bits_NV = (words_NW[:, :V] % 2).astype(np.int64)
    variables_NC3, pattern_NC = _choices(words_NW[:, V:].reshape(N, -1, 4), V)
    # A pattern of 1 to 7: at least one of three literals agrees with the assignment.
    agrees_NC3 = (1 + pattern_NC[..., None]) >> np.arange(3) & 1
    truth_NC3 = bits_NV[np.arange(N)[:, None, None], variables_NC3]
    signs_NC3 = np.where(agrees_NC3, truth_NC3, 1 - truth_NC3)
    prompt_NC4 = np.full((N, c.num_clauses, 4), len(self._literals))
    prompt_NC4[..., :3] = 2 * variables_NC3 + 1 - signs_NC3
    prompt_NC4[:, -1, 3] += 1
    answer_NV = 2 * np.arange(V) + 1 - bits_NV
    symbols_NS = np.concatenate([prompt_NC4.reshape(N, -1), answer_NV], axis=1)
    if not c.unique:
      return symbols_NS, np.ones(N, bool)
    return symbols_NS, _num_solutions(variables_NC3, signs_NC3, V) == 1

  def is_correct(self, prompt: tuple[str, ...], answer: tuple[str, ...]) -> bool:
    variables = tuple(x[1:] for x in answer)
    expected = tuple(str(1 + v) for v in range(self._config.num_variables))
    if variables != expected or not set(answer) <= set(self._literals):
      return False
    clauses = (prompt[i : i + 3] for i in range(0, len(prompt), 4))
    return all(set(clause) & set(answer) for clause in clauses)

  def baselines(self, prompts: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """Returns the share of formulas that two trivial rules solve.

    majority: every variable has its more frequent sign; + in a tie.
    coin: a random assignment; absent if there are too many assignments to try.
    """
    V = self._config.num_variables
    numbers = [[int(x) for x in prompt if x not in ",="] for prompt in prompts]
    literals_NC3 = np.array(numbers).reshape(len(prompts), -1, 3)
    variables_NC3, signs_NC3 = np.abs(literals_NC3) - 1, literals_NC3 > 0
    at_N = np.arange(len(prompts))[:, None, None]
    balance_NV = np.zeros((len(prompts), V), np.int64)
    np.add.at(balance_NV, (at_N, variables_NC3), np.sign(literals_NC3))
    holds_NC3 = (balance_NV >= 0)[at_N, variables_NC3] == signs_NC3
    shares = {"majority": float(np.mean(np.all(np.any(holds_NC3, axis=2), axis=1)))}
    if V <= SAT_TABLE_VARIABLES:
      counts_N = _num_solutions(variables_NC3, signs_NC3.astype(np.int64), V)
      shares["coin"] = float(np.mean(counts_N) / 2**V)
    return shares


def _choices(words_NC4: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns three different numbers below `num`, and one below 7."""
  limits = np.array([num, num - 1, num - 2, 7], np.uint64)
  first, second, third, pattern_NC = np.moveaxis(
    (words_NC4 % limits).astype(np.int64), 2, 0
  )
  second = (first + 1 + second) % num
  # `third` counts the remaining numbers: skip the two taken ones, the smaller first.
  third += third >= np.minimum(first, second)
  third += third >= np.maximum(first, second)
  return np.stack([first, second, third], axis=2), pattern_NC


def _num_solutions(
  variables_NC3: np.ndarray, signs_NC3: np.ndarray, num_variables: int
) -> np.ndarray:
  """Returns how many assignments satisfy each formula, by trying all of them."""
  # An assignment is a number, a bit for each variable. It breaks a clause if the bits
  # of the clause's variables are all the opposite of the signs. Legend: A assignments.
  masks_NC = np.sum(1 << variables_NC3, axis=2, dtype=np.int16)
  broken_NC = np.sum((1 - signs_NC3) << variables_NC3, axis=2, dtype=np.int16)
  assignments_A = np.arange(2**num_variables, dtype=np.int16)
  holds_NA = np.ones((len(masks_NC), len(assignments_A)), bool)
  for mask_N, broken_N in zip(masks_NC.T, broken_NC.T, strict=True):
    holds_NA &= (assignments_A & mask_N[:, None]) != broken_N[:, None]
  return np.sum(holds_NA, axis=1)
