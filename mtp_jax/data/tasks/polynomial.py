"""Arithmetic with polynomials over F_7 modulo X^5.

Gloeckle et al. 2024 (arXiv 2404.19737), section 4.2 and appendix K: operands are five
uniform coefficients; operators are uniform among negation, addition, multiplication and
composition; the number of operations is uniform from 1 up. The notation is ours: infix
in full parentheses, random binary trees, coefficients from the lowest degree up;
composition f(g) is of the representatives of degree below 5, modulo X^5:

  ( ( n 3 0 0 6 1 ) * 1 2 0 0 0 ) =        4 1 5 1 1
"""

import numpy as np

from mtp_jax.config import PolynomialConfig
from mtp_jax.data.tasks.interface import Example, Task, numbers

PRIME, LENGTH = 7, 5
_PAUSE = "<pause>"
# n: negation, o: composition.
_OPERATORS = ("n", "+", "*", "o")


class Polynomial(Task):
  def __init__(self, config: PolynomialConfig):
    self._config = config
    self.symbols = (*numbers(PRIME), *_OPERATORS, "(", ")", "=", _PAUSE)
    self.max_prompt = self._longest(config.held_out_operators)
    self.max_answer = LENGTH
    longest = max(config.max_operators, config.held_out_operators)
    self.max_tokens = self._longest(longest) + LENGTH

  def _longest(self, operators: int) -> int:
    # All binary: one operand more than operators, each of which adds 3 symbols.
    return LENGTH * (operators + 1) + 3 * operators + 1 + self._config.num_pauses

  def sample(self, rng: np.random.Generator, is_held_out: bool) -> Example:
    c = self._config
    most = c.held_out_operators if is_held_out else c.max_operators
    text, value = _expression(rng, 1 + int(rng.integers(most)))
    prompt = (*text, "=", *(_PAUSE,) * c.num_pauses)
    return Example(prompt, tuple(map(str, value.tolist())))

  def is_correct(self, prompt: tuple[str, ...], answer: tuple[str, ...]) -> bool:
    text = [x for x in prompt if x not in ("=", _PAUSE)]
    value, rest = _evaluate(text)
    assert not rest
    return answer == tuple(map(str, value.tolist()))

  def group(self, prompt: tuple[str, ...]) -> str:
    """Returns the number of operations: more than were trained on are out of domain."""
    return f"operators={sum(x in _OPERATORS for x in prompt)}"


def _expression(
  rng: np.random.Generator, operators: int
) -> tuple[list[str], np.ndarray]:
  if operators == 0:
    value = rng.integers(PRIME, size=LENGTH)
    return list(map(str, value.tolist())), value
  operator = _OPERATORS[rng.integers(len(_OPERATORS))]
  if operator == "n":
    text, value = _expression(rng, operators - 1)
    return ["(", "n", *text, ")"], negate(value)
  in_left = int(rng.integers(operators))
  left, a = _expression(rng, in_left)
  right, b = _expression(rng, operators - 1 - in_left)
  return ["(", *left, operator, *right, ")"], _BINARY[operator](a, b)


def _evaluate(text: list[str]) -> tuple[np.ndarray, list[str]]:
  """Returns the value of the first expression in `text`, and the rest of `text`."""
  if text[0] != "(":
    return np.array([int(x) for x in text[:LENGTH]]), text[LENGTH:]
  if text[1] == "n":
    value, rest = _evaluate(text[2:])
    return negate(value), rest[1:]
  a, (operator, *rest) = _evaluate(text[1:])
  b, rest = _evaluate(rest)
  return _BINARY[operator](a, b), rest[1:]


def negate(a: np.ndarray) -> np.ndarray:
  return -a % PRIME


def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return (a + b) % PRIME


def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return np.convolve(a, b)[:LENGTH] % PRIME


def compose(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Returns a(b), by Horner's rule; all coefficients from the lowest degree up."""
  value = np.zeros(LENGTH, np.int64)
  for coefficient in a[::-1]:
    value = multiply(value, b)
    value[0] = (value[0] + coefficient) % PRIME
  return value


_BINARY = {"+": add, "*": multiply, "o": compose}
