"""`HarnessModel`: a trained model as lm-evaluation-harness calls one.

Log-likelihoods and greedy texts equal those of the harness's `HFLM` on the exported
folder. The model's extra predictors draft the texts.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mtp_jax.decode.generate import Completion
from mtp_jax.interop.hf_config_writing import longest_text
from mtp_jax.trained_model import TrainedModel

# A key for the harness's cache, the tokens of a context, and those that are scored.
_Pair = tuple[tuple[str, str] | None, list[int], list[int]]


class HarnessModel(TemplateLM):
  """Scores with the next-token predictor; generates with drafts.

  completions: what was generated, by the name of the task.
  """

  max_gen_toks = 256  # New tokens where a task states no limit, as `HFLM` has it.

  def __init__(
    self,
    model: TrainedModel,
    *,
    num_drafts: int | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
  ):
    """Args:
      num_drafts: per round; None is one per extra predictor, 0 decodes plainly.
      batch_size: texts that are computed at once.
      max_new_tokens: longest generated text, where a task allows longer ones.
    """
    super().__init__()
    self._model, self._num_drafts, self._batch_size = model, num_drafts, batch_size
    self._max_new_tokens = max_new_tokens
    self._scorer = model.without_predictors()
    self.completions: dict[str, list[Completion]] = collections.defaultdict(list)

  @property
  def eot_token_id(self) -> int | None:
    return self._model.tokenizer.eos_id

  @property
  def prefix_token_id(self) -> int | None:
    bos_id = self._model.tokenizer.bos_id
    return self.eot_token_id if bos_id is None else bos_id

  @property
  def max_length(self) -> int:
    return longest_text(self._model.config)

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **_: Any
  ) -> list[int]:
    return self._model.encode(string, bos=add_special_tokens is not False).tolist()

  def _loglikelihood_tokens(
    self, requests: Sequence[_Pair], **_: Any
  ) -> list[tuple[float, bool]]:
    # A text that is too long loses its begin. Its last token is no input.
    most = self.max_length + 1
    texts = [(context + scored)[-most:] for _, context, scored in requests]
    answers: list[Any] = [None] * len(texts)
    for part in self._parts(texts):
      found = self._scorer.next_tokens([texts[i] for i in part], self._batch_size)
      for i, (nll_T, argmax_T) in zip(part, found, strict=True):
        key, _, scored = requests[i]
        num = min(len(scored), len(nll_T))
        logprob = -float(nll_T[len(nll_T) - num :].sum(dtype="float64"))
        is_greedy = argmax_T[len(argmax_T) - num :].tolist() == scored[-num:]
        answers[i] = logprob, is_greedy
        if key is not None:
          self.cache_hook.add_partial("loglikelihood", key, answers[i])
    return answers

  def loglikelihood_rolling(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    pairs, ends = [], []
    for (text,) in (request.args for request in requests):
      windows = get_rolling_token_windows(
        self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
      )
      pairs += [(None, *make_disjoint_window(window)) for window in windows]
      ends.append(len(pairs))
    logprobs = [logprob for logprob, _ in self._loglikelihood_tokens(pairs)]
    begins = [0, *ends[:-1]]
    return [sum(logprobs[a:b]) for a, b in zip(begins, ends, strict=True)]

  def generate_until(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[str]:
    answers: list[Any] = [None] * len(requests)
    # Prompts that are decoded alike share a batch.
    alike: dict[tuple[Any, ...], list[int]] = collections.defaultdict(list)
    for i, request in enumerate(requests):
      alike[self._how(request.args[1])].append(i)
    for (stop, num_new, sampling), numbers in alike.items():
      room = self.max_length - num_new
      if room < 1:
        raise ValueError(
          f"--max_new_tokens must be less than the model's longest text, "
          f"{self.max_length} tokens, got {num_new} (a task's limit without the flag)."
        )
      prompts = {i: self.tok_encode(requests[i].args[0])[-room:] for i in numbers}
      for part in self._parts(prompts):
        generations = self._model.generate(
          [prompts[i] for i in part], num_new, num_drafts=self._num_drafts,
          stop=list(stop) or None, first=part[0], **dict(sampling),
        )
        for i, generation in zip(part, generations, strict=True):
          answers[i] = generation.text
          self.completions[requests[i].task_name].append(generation.completion)
          self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
    return answers

  def _parts(self, texts: Any) -> Iterator[list[int]]:
    """Yields the keys of texts, as many as a batch has, the longest text first."""
    keys = texts if isinstance(texts, dict) else range(len(texts))
    ordered = sorted(keys, key=lambda i: -len(texts[i]))
    for begin in range(0, len(ordered), self._batch_size):
      yield ordered[begin : begin + self._batch_size]

  def _how(self, settings: dict[str, Any]) -> tuple[Any, ...]:
    """Returns `(stop, num_new, sampling)` of a task's settings of generation."""
    until = settings.get("until") or []
    stop = tuple(x for x in ([until] if isinstance(until, str) else until) if x)
    sampling: dict[str, Any] = {}
    if settings.get("do_sample") and settings.get("temperature") != 0:
      given = {key: settings.get(key) for key in ("top_k", "top_p", "min_p")}
      heat = settings.get("temperature", 1.0)
      sampling = {"rule": "match", "temperature": heat} | given
    num_new = settings.get("max_gen_toks", self.max_gen_toks)
    if self._max_new_tokens is not None:
      num_new = min(num_new, self._max_new_tokens)
    return stop, num_new, tuple(sampling.items())
