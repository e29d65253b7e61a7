"""Induction: complete a name that occurred before, given the first of its two words.

After Gloeckle et al. 2024 (arXiv 2404.19737), section 4.1 and appendix J, whose stories
are not published. Ours are generated from sentence patterns; training scores the whole
story, as text. A name is two words, its halves. In training, names come from a fixed
list, with frequencies by Zipf's law, so that they can be memorised. Held-out stories
have new pairs of the same words, so that they cannot be memorised although every word
has been trained on. A share of the training stories (`fresh_share`) draws uniformly
from all pairs that are not held out: too many to memorise if there are many halves.

  prompt   <story> mira tol went to the river . ... one day mira
  answer   tol

The prompt ends after the first half of a name that the story has mentioned before.
"""

import numpy as np

from mtp_jax.config import InductionConfig
from mtp_jax.data.tasks.interface import Example, Task

_START = "<story>"
_NOUNS = "river house garden forest market school lake tower bridge field".split()
_THINGS = "ball book cake kite hat lamp stone cup bell rope".split()
_FEELINGS = "happy sad tired proud hungry brave quiet kind".split()
# X and Y are names, N a place, T a thing, F a feeling.
_PATTERNS = tuple(
  pattern.split()
  for pattern in (
    "X went to the N .",
    "one day X found a T near the N .",
    "X was very F .",
    "X gave the T to Y .",
    "then Y and X played with the T .",
    "Y said that X was F .",
    "in the N there was a T and X took it .",
    "Y was F but X was F .",
  )
)  # fmt: skip


class Induction(Task):
  splits_by_prompt = False
  answer_ends = False

  def __init__(self, config: InductionConfig):
    self._config = config
    half = config.num_halves
    self._firsts = tuple(f"first{i}" for i in range(half))
    self._seconds = tuple(f"second{i}" for i in range(half))
    words = {w for p in _PATTERNS for w in p if len(w) > 1 or w == "."} | {"a"}
    self.symbols = (
      _START, *sorted(words | {*_NOUNS, *_THINGS, *_FEELINGS}),
      *self._firsts, *self._seconds,
    )
    # A name is two words in place of one letter of a pattern.
    sentence = max(len(p) + sum(x in "XY" for x in p) for p in _PATTERNS)
    self.max_prompt = config.num_sentences * sentence + 1
    self.max_answer = 1
    self.max_tokens = self.max_prompt
    # Pairs by cyclic shifts, so that the first `num_names` contain every half.
    rng = np.random.default_rng(0)
    pairs = [(i, (i + shift) % half) for shift in range(half) for i in range(half)]
    fixed, rest = pairs[: config.num_names], pairs[config.num_names :]
    if config.fresh_share:
      # Holds out the last tenth, in whole shifts: every half occurs equally often.
      rest = pairs[-max(1, len(rest) // half // 10) * half :]
    self._free_names = pairs[: len(pairs) - len(rest)]
    self._names = [fixed[i] for i in rng.permutation(len(fixed))]
    self._new_names = rest
    weights = 1.0 / np.arange(1, 1 + len(fixed))  # Zipf's law.
    self._cumulative = np.cumsum(weights / weights.sum())

  def sample(self, rng: np.random.Generator, is_held_out: bool) -> Example:
    # Names with the same first half would make the answer ambiguous.
    pool = self._new_names if is_held_out else None
    if self._config.fresh_share and not is_held_out:
      is_fresh = rng.random() < self._config.fresh_share
      pool = self._free_names if is_fresh else None
    names = [self._name(rng, pool)]
    while len(names) < 2:
      name = self._name(rng, pool)
      if name[0] != names[0][0]:
        names.append(name)
    words, mentions = self._story(rng, names)
    if not is_held_out:
      return Example((_START,), words)
    end = mentions[rng.integers(len(mentions))]
    return Example((_START, *words[:end]), (words[end],))

  def _name(
    self, rng: np.random.Generator, pool: list[tuple[int, int]] | None
  ) -> tuple[int, int]:
    """Draws a name: uniformly from a pool, or from the fixed list by frequency."""
    if pool is not None:
      return pool[rng.integers(len(pool))]
    i = int(np.searchsorted(self._cumulative, rng.random()))
    return self._names[min(i, len(self._names) - 1)]

  def _story(
    self, rng: np.random.Generator, names: list[tuple[int, int]]
  ) -> tuple[tuple[str, ...], list[int]]:
    """Returns the words, and the places of second halves of repeated names."""
    words: list[str] = []
    met: set[int] = set()
    mentions: list[int] = []
    fill = {"N": _NOUNS, "T": _THINGS, "F": _FEELINGS}
    # Drawn again until a name is repeated: without that there is nothing to complete.
    while not mentions:
      words, met, mentions = [], set(), []
      for _ in range(self._config.num_sentences):
        order = rng.permutation(2)
        for word in _PATTERNS[rng.integers(len(_PATTERNS))]:
          if word in ("X", "Y"):
            who = int(order["XY".index(word)])
            first, second = names[who]
            if who in met:
              mentions.append(len(words) + 1)
            met.add(who)
            words += [self._firsts[first], self._seconds[second]]
          elif word in fill:
            words.append(fill[word][rng.integers(len(fill[word]))])
          else:
            words.append(word)
    return tuple(words), mentions

  def is_correct(self, prompt: tuple[str, ...], answer: tuple[str, ...]) -> bool:
    """Compares with the word that followed the first half at its first mention."""
    return answer == (prompt[prompt.index(prompt[-1]) + 1],)
