"""Countdown: reach a target with all of the given numbers and + - * /.

A task for language models since Gandhi et al. 2024 (arXiv 2404.03683). The format is
ours: numbers are written in decimal digits, one symbol each, and pauses may precede the
answer (as in Huang et al. 2026):

  2 5 , 7 , 3 , 4 | 1 0 0 =        2 5 * 4 = 1 0 0 , ...

An answer is right if it has one equation less than there are numbers, if every equation
is true in whole positive numbers and uses two of the numbers that are left (its result
joins them), and if the last result is the target.
"""

import numpy as np

from mtp_jax.config import CountdownConfig
from mtp_jax.data.tasks.interface import Example, Task, numbers

_PAUSE = "<pause>"


class Countdown(Task):
  def __init__(self, config: CountdownConfig):
    self._config = config
    self.symbols = (*numbers(10), "+", "-", "*", "/", "=", ",", "|", _PAUSE)
    digits, n = len(str(config.largest)), config.num_inputs
    self.max_prompt = n * (digits + 1) + digits + 1 + config.num_pauses
    # No intermediate result is larger than `largest` (see `_solution`).
    self.max_answer = (n - 1) * (3 * digits + 3) - 1
    self.max_tokens = self.max_prompt + self.max_answer

  def sample(self, rng: np.random.Generator, is_held_out: bool) -> Example:
    """Draws inputs and a solution until one fits; every example can be solved."""
    del is_held_out
    c = self._config
    while True:
      inputs = [int(x) for x in rng.integers(1, 1 + c.largest, c.num_inputs)]
      equations = self._solution(rng, inputs)
      if equations is not None:
        break
    target = equations[-1].split("=")[1]
    prompt = ",".join(map(str, inputs)) + "|" + target + "="
    pauses = (_PAUSE,) * c.num_pauses
    return Example((*prompt, *pauses), tuple(",".join(equations)))

  def _solution(self, rng: np.random.Generator, inputs: list[int]) -> list[str] | None:
    left, equations = list(inputs), []
    while len(left) > 1:
      a, b = (left.pop(rng.integers(len(left))) for _ in range(2))
      operator = "+-*/"[rng.integers(4)]
      result = _apply(a, operator, b)
      if result is None or result > self._config.largest:
        return None
      equations.append(f"{a}{operator}{b}={result}")
      left.append(result)
    return equations if left[0] >= 10 else None

  def is_correct(self, prompt: tuple[str, ...], answer: tuple[str, ...]) -> bool:
    question = "".join(x for x in prompt if x != _PAUSE)
    given, target = question.removesuffix("=").split("|")
    left = [int(x) for x in given.split(",")]
    for equation in "".join(answer).split(","):
      parsed = _parse(equation)
      if parsed is None:
        return False
      a, operator, b, result = parsed
      for used in (a, b):
        if used not in left:
          return False
        left.remove(used)
      if _apply(a, operator, b) != result:
        return False
      left.append(result)
    return left == [int(target)]


def _apply(a: int, operator: str, b: int) -> int | None:
  """Returns the result if it is a whole positive number, else None."""
  if operator == "+":
    return a + b
  if operator == "-":
    return a - b if a > b else None
  if operator == "*":
    return a * b
  return a // b if b and a % b == 0 else None


def _parse(equation: str) -> tuple[int, str, int, int] | None:
  left, equals, result = equation.partition("=")
  for operator in "+-*/":
    a, found, b = left.partition(operator)
    if found and equals and all(_is_number(x) for x in (a, b, result)):
      return int(a), operator, int(b), int(result)
  return None


def _is_number(text: str) -> bool:
  """Returns whether `text` is ASCII digits without a leading zero, as we write them."""
  is_digits = bool(text) and all("0" <= x <= "9" for x in text)
  # Python raises an error for very long numbers.
  return is_digits and len(text) < 20 and (text == "0" or text[0] != "0")
