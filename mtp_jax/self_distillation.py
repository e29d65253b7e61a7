"""Text that a trained model writes, for other predictors to learn from.

A drafter has to foresee what the trunk says, not what the corpus says, so one that is
trained afterwards may learn from the trunk's own text: self-distillation (Medusa, arXiv
2401.10774, section 2.3.2; FastMTP, arXiv 2509.18362).

    training document -> excerpt -> completion by the model -> a line that
    `data.distilled_text` reads
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtp_jax.data.pipeline import Corpus
from mtp_jax.decode.generate import Completion
from mtp_jax.trained_model import TrainedModel


@dataclasses.dataclass(frozen=True, eq=False)
class Excerpt:
  """The part of a training document that is continued.

  number:   of the text that it begins.
  document: hex content hash of the document.
  begin:    its first token in the document; 0 is the begin-of-document token, where
            documents have one.
  tokens:   [n] ids.
  """

  number: int
  document: str
  begin: int
  tokens: np.ndarray


class Excerpts:
  """What the texts begin with, by number: `excerpts[number]`, any number >= 0.

  Texts go through the training documents in the shuffled order of the run, over and
  over. A document that is too short is taken whole, without its end.
  """

  def __init__(self, corpus: Corpus, length: int, at: int | None, seed: int):
    """Args:
      corpus: of the run.
      length: tokens of an excerpt, >= 1, where the document has so many.
      at: where it begins, or as late as the document allows; None draws a place of
        each, uniformly.
      seed: of the places.
    """
    self._store, self._length, self._at, self._seed = corpus.store, length, at, seed
    self._order = corpus.documents("train", corpus.config.data.seed)
    self._num_ends = int(corpus.tokenizer.eos_id is not None)

  def __getitem__(self, number: int) -> Excerpt:
    document = int(self._order[number % len(self._order)])
    end = int(self._store.lengths_N[document]) - self._num_ends
    latest = max(0, end - self._length)
    if self._at is None:
      rng = np.random.Generator(np.random.Philox(key=[self._seed, number]))
      begin = int(rng.integers(1 + latest))
    else:
      begin = min(self._at, latest)
    return Excerpt(
      number,
      self._store.hashes_NX[document].tobytes().hex(),
      begin,
      self._store.read(document, begin, min(begin + self._length, end)),
    )


def write(
  model: TrainedModel,
  excerpts: Sequence[Excerpt],
  max_new_tokens: int,
  seed: int,
  **how: Any,
) -> list[dict[str, Any]]:
  """Returns the lines of `data/distilled_text.py` for consecutive excerpts.

  A text is an excerpt and what the model goes on with. A character that the excerpt or
  the end of the row cuts in two is left away. A text with another broken character, or
  with a token that no text has, is left out, so that lines may be fewer than excerpts.
  What is drawn for a number does not depend on which other numbers there are.

  `how` is that of `TrainedModel.generate`, whose ValueErrors it raises.
  """
  generations = model.generate(
    [x.tokens for x in excerpts],
    max_new_tokens,
    seed=seed,
    first=excerpts[0].number,
    **how,
  )
  lines = []
  for x, generation in zip(excerpts, generations, strict=True):
    text = _text(model, x.tokens, generation.completion)
    if text is not None:
      lines.append({
        "text": text,
        "bos": x.begin == 0,
        "eos": generation.completion.is_stopped,
        "number": x.number,
        "document": x.document,
        "begin": x.begin,
        "excerpt_tokens": len(x.tokens),
      })
  return lines


def _text(
  model: TrainedModel, excerpt_n: np.ndarray, completion: Completion
) -> str | None:
  """Returns the text of excerpt and completion, None where they are no text."""
  num_bytes_V = np.zeros(model.config.tokenizer.vocab_size, np.int64)
  num_bytes_V[: model.tokenizer.vocab_size] = model.tokenizer.token_bytes_V
  new = completion.tokens[: len(completion.tokens) - completion.is_stopped]
  text = model.tokenizer.decode(np.concatenate([excerpt_n, new])).lstrip("\ufffd")
  if not completion.is_stopped:
    text = text.rstrip("\ufffd")
  if "\ufffd" in text or not text or not np.all(num_bytes_V[new]):
    return None
  return text
