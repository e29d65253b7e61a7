"""Self-distillation: a trained model writes text, on which predictors are trained.

A drafter has to predict the tokens of the trunk, not of the corpus. A drafter that is
trained on a finished trunk can therefore learn from text that the trunk wrote
(Medusa, arXiv 2401.10774, section 2.3.2; FastMTP, arXiv 2509.18362).

    training document -> excerpt -> completion by the model -> a line that
    `data.distilled_text` reads
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtp_jax.data.packing import token_ids
from mtp_jax.data.pipeline import Corpus
from mtp_jax.decode.generate import Completion
from mtp_jax.trained_model import TrainedModel


@dataclasses.dataclass(frozen=True, eq=False)
class Excerpt:
  """A part of a training document, which the model continues.

  number:   number of the text.
  document: hex content hash of the document.
  begin:    index of the first token in the document; token 0 is the begin-of-document
            token, if documents have one.
  tokens:   [n] ids.
  """

  number: int
  document: str
  begin: int
  tokens: np.ndarray


class Excerpts:
  """The beginnings of texts: `excerpts[number]`, for any number >= 0.

  Numbers go through the training documents in the run's shuffled order, repeatedly.
  The excerpt of a short document is the whole document, without its end token.
  """

  def __init__(self, corpus: Corpus, length: int, at: int | None, seed: int):
    """Args:
      corpus: of the run.
      length: tokens of an excerpt, >= 1; fewer in short documents.
      at: index of its first token, or less if the document is too short; None draws the
        index uniformly.
      seed: for these draws.
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
      token_ids(self._store.read(document, begin, min(begin + self._length, end))),
    )


def write(
  model: TrainedModel,
  excerpts: Sequence[Excerpt],
  max_new_tokens: int,
  seed: int,
  **how: Any,
) -> list[dict[str, Any]]:
  """Returns lines for `data/distilled_text.py`, written by the model.

  A text is an excerpt and its completion. Characters that are cut at either end are
  removed. Texts with other broken characters, or with tokens that stand for no text,
  are skipped, so that there may be fewer lines than excerpts. The completion of a
  number does not depend on the other numbers.

  Args:
    model: writes the completions.
    excerpts: with consecutive numbers.
    max_new_tokens: longest completion.
    seed: for sampling.
    **how: other arguments of `TrainedModel.generate`, which also raises ValueErrors.
  """
  generations = model.generate(
    [x.tokens for x in excerpts],
    max_new_tokens,
    seed=seed,
    first=excerpts[0].number,
    **how,
  )
  # `bos` and `eos`: which ends of a document the text has.
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
  """Returns the text of excerpt and completion; None if it is to be skipped."""
  # Ids beyond the tokenizer's have no text: 0 bytes.
  num_bytes_V = np.zeros(model.config.tokenizer.vocab_size, np.int64)
  num_bytes_V[: model.tokenizer.vocab_size] = model.tokenizer.token_bytes_V
  new = completion.tokens[: len(completion.tokens) - completion.is_stopped]
  text = model.tokenizer.decode(np.concatenate([excerpt_n, new])).lstrip("\ufffd")
  if not completion.is_stopped:
    text = text.rstrip("\ufffd")
  if "\ufffd" in text or not text or not np.all(num_bytes_V[new]):
    return None
  return text
