"""Metrics of generated text: completions of held-out text, and answers to tasks.

Decoding uses all extra predictors as drafters, so it also measures which drafts are
accepted. Errors over documents are by linearisation, see `evaluate.ratio`; errors of a
share of prompts are binomial.
"""

import ast
import dataclasses
import itertools
import math
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

from mtp_jax.config import Config
from mtp_jax.data.pipeline import Corpus
from mtp_jax.data.tasks.corpus import TaskCorpus
from mtp_jax.data.tasks.interface import Example, Task
from mtp_jax.decode.acceptance import counts
from mtp_jax.decode.generate import (
  Completion,
  Decoding,
  compile_ahead,
  generate,
)
from mtp_jax.decode.target import unstack
from mtp_jax.decode.warp import check_warp
from mtp_jax.evaluate import ratio
from mtp_jax.executables import awaited
from mtp_jax.predictors import num_drafts
from mtp_jax.program import program_config

_NO_TOKEN = -1


def line_prompts(
  texts: Iterable[str], limit: int, prompt_bytes: int, max_line: int
) -> list[tuple[str, str]]:
  """Returns up to `limit` (prompt, next line) pairs, one per held-out text.

  The prompt ends with a newline in the middle of the file, and the line after it is not
  blank and at most `max_line` bytes long.
  """
  pairs = []
  for text in texts:
    if len(pairs) == limit:
      break
    lines = text.split("\n")
    middle = len(lines) // 2
    usable = (
      i for i in range(max(middle, 1), len(lines) - 1)
      if lines[i].strip() and len(lines[i].encode()) <= max_line
    )
    i = next(usable, None)
    if i is not None:
      before = "\n".join(lines[:i]) + "\n"
      pairs.append((_last_bytes(before, prompt_bytes), lines[i]))
  return pairs


def middle_prompts(
  texts: Iterable[str], limit: int, prompt_bytes: int
) -> list[str]:
  """Returns the end of the first half of up to `limit` held-out texts."""
  halves = (text[: len(text) // 2] for text in texts if len(text) > 1)
  return [_last_bytes(half, prompt_bytes) for half in itertools.islice(halves, limit)]


def function_prompts(
  texts: Iterable[str], limit: int, prompt_bytes: int
) -> list[str]:
  """Returns up to `limit` headers of held-out functions, one per text, dedented.

  A prompt runs from `def` to the end of the first line of the body, so that the
  indentation is given; functions with longer headers or decorators are passed over.
  """
  prompts = []
  for text in texts:
    if len(prompts) == limit:
      break
    try:
      tree = ast.parse(text)
    except (SyntaxError, ValueError):  # Not Python, or Python of another version.
      continue
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
      if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
        continue
      end = node.body[0].end_lineno
      header = textwrap.dedent("".join(lines[node.lineno - 1 : end]))
      if len(header.encode()) <= prompt_bytes and _parses(header):
        prompts.append(header)
        break
  return prompts


def completed_function(prompt: str, completion: str) -> str | None:
  """Returns the source of the completed function, or None if nothing was added.

  The function ends before the first line that is not indented. A completion that ran
  into its length limit loses its last, partial line.
  """
  body, ended = [], False
  *whole, partial = completion.split("\n")
  for line in whole:
    if line.strip() and not line.startswith((" ", "\t")):
      ended = True
      break
    body.append(line)
  if not ended and not partial.strip():
    body.append(partial)
  source = "\n".join(body)
  return prompt + source + "\n" if source.strip() else None


def text_metrics(
  config: Config,
  params: Any,
  tokenizer: Any,
  texts: list[str],
  before_batch: Callable[[], None] | None = None,
) -> dict[str, Any]:
  """Returns next-line exact match, the share of functions that parse, and acceptance.

  The model decodes greedily with all its extra predictors as drafters, which does not
  change the text; `decoded_*` is the share of their drafts that was accepted, see
  `acceptance_rates`. `sampled_*` is the same for functions sampled at temperature 1
  (rule leviathan), or of whole documents from their middle where `eval.middle_prompts`
  asks for them: a small model soon repeats itself greedily, and then every draft is
  right. With `eval.both_proposals` `argmax_proposal_*` and `sample_proposal_*` are the
  same with each way to choose drafts, see `decode.generate.Decoding`.
  Errors are binomial (one prompt per document). An entry is None where it is off or no
  text suits it. For `before_batch` see `generate`.
  """
  limits, settings = config.eval, _text_settings(config)
  prompt_length = settings["prompt_length"]
  newline = tokenizer.encode("\n")
  stop_at_line = (int(newline[-1]), *tokenizer.end_ids)
  stop_at_end = (_NO_TOKEN, *tokenizer.end_ids)  # As many, for the same program.
  program = program_config(config)
  weights = unstack(params, program)

  def complete(
    prompts: list[str], stop_ids: tuple[int, ...], decoding: Decoding
  ) -> list[Completion]:
    return awaited(generate)(
      program,
      weights,
      [tokenizer.encode(prompt)[-prompt_length:] for prompt in prompts],
      stop_ids=stop_ids,
      decoding=decoding,
      before_batch=before_batch,
      **settings,
    )

  def text(x: Completion) -> str:
    return tokenizer.decode(x.tokens[:-1] if x.is_stopped else x.tokens)

  pairs = line_prompts(
    texts, limits.line_prompts, prompt_length, limits.max_new_tokens - 1
  )
  greedy = _decoding(config)
  lines = complete([prompt for prompt, _ in pairs], stop_at_line, greedy)
  # A BPE token may hold the newline and more; the line is what comes before it.
  exact = [
    text(x).split("\n")[0] == line for x, (_, line) in zip(lines, pairs, strict=True)
  ]

  headers = function_prompts(texts, limits.function_prompts, prompt_length)
  bodies = complete(headers, stop_at_end, greedy)
  sources = [
    completed_function(header, text(body))
    for header, body in zip(headers, bodies, strict=True)
  ]
  parses = [source is not None and _parses(source) for source in sources]
  sampled, by_proposal = [], {}
  if num_drafts(config.mtp):
    if limits.middle_prompts:
      headers = middle_prompts(texts, limits.middle_prompts, prompt_length)
    sampling = _decoding(config, "leviathan")
    sampled = complete(headers, stop_at_end, sampling)
    if limits.both_proposals:
      likely = dataclasses.replace(sampling, proposal="argmax")
      own = complete(headers, stop_at_end, likely)
      by_proposal = acceptance_rates("argmax_proposal", own)
      # Leviathan's rule draws drafts by default.
      by_proposal |= acceptance_rates("sample_proposal", sampled)
  return {
    "task_accuracy": None,
    "next_line_exact_match": _proportion(exact),
    "function_parses": _proportion(parses),
    **acceptance_rates("decoded", [*lines, *bodies]),
    **acceptance_rates("sampled", sampled),
    **by_proposal,
  }


def task_metrics(
  config: Config,
  params: Any,
  corpus: TaskCorpus,
  before_batch: Callable[[], None] | None = None,
) -> dict[str, Any]:
  """Returns the share of held-out examples of a task that are answered exactly.

  Answers are decoded greedily and freely, from the prompt alone, with all extra
  predictors as drafters; an answer counts if it is right up to its end
  (`Task.is_correct`), which is eos if `Task.answer_ends`. Errors are binomial. For
  `before_batch` see `generate`.

  task_accuracy:        of all `eval.task_examples`.
  task_accuracy_groups: the same by kind of prompt, see `Task.group`.
  task_new:             share of answers that are right, differ from all before them,
                        and are not in the training set; for tasks with many right
                        answers to an empty prompt (siblings, where two
                        children in the other order are another answer).
  task_baselines:       accuracy of trivial rules on the same examples, see
                        `Task.baselines`.
  decoded_*:            see `acceptance_rates`.
  """
  task, tokenizer = corpus.task, corpus.tokenizer
  examples = corpus.held_out(config.eval.task_examples)
  program = program_config(config)
  completions = awaited(generate)(
    program,
    unstack(params, program),
    [corpus.encode(Example(x.prompt, ()))[0][:-1] for x in examples],
    stop_ids=(tokenizer.eos_id, tokenizer.eos_id),
    decoding=_decoding(config),
    before_batch=before_batch,
    **_task_settings(config, task),
  )
  # Where text follows the answer, the answer is the first part.
  whole = [x.is_stopped == task.answer_ends for x in completions]
  ids = [x.tokens[: len(x.tokens) - task.answer_ends] for x in completions]
  answers = [
    tokenizer.decode_symbols(answer) if is_whole else None
    for answer, is_whole in zip(ids, whole, strict=True)
  ]
  correct = [
    answer is not None and task.is_correct(example.prompt, answer)
    for example, answer in zip(examples, answers, strict=True)
  ]
  groups: dict[str, list[bool]] = {}
  for example, is_correct in zip(examples, correct, strict=True):
    groups.setdefault(task.group(example.prompt), []).append(is_correct)
  groups.pop("", None)
  new = None
  if not task.splits_by_prompt and config.task.num_train:
    # An answer stands between what comes before it and eos.
    rows = zip(*corpus.train_set, strict=True)
    known = {tuple(row[first : length - 1].tolist()) for row, length, first in rows}
    seen: set[tuple[int, ...]] = set()
    new = []
    for answer, is_correct in zip(map(tuple, ids), correct, strict=True):
      new.append(is_correct and answer not in known and answer not in seen)
      if is_correct:  # What never ended is cut to the length of one that did.
        seen.add(answer)
  return {
    "task_accuracy": _proportion(correct),
    "task_accuracy_groups": {x: _proportion(groups[x]) for x in sorted(groups)},
    "task_new": None if new is None else _proportion(new),
    "task_baselines": task.baselines([x.prompt for x in examples]),
    "next_line_exact_match": None,
    "function_parses": None,
    **acceptance_rates("decoded", completions),
    **acceptance_rates("sampled", []),
  }


def compile_decoding(
  config: Config, params: Any, corpus: Corpus | TaskCorpus
) -> None:
  """Compiles what the metrics of generated text call; `params` are shapes."""
  limits, rules = config.eval, ["greedy"]
  if isinstance(corpus, TaskCorpus):
    is_asked, num_stops = limits.task_examples, 2
    settings = _task_settings(config, corpus.task)
  else:
    is_asked = limits.line_prompts + limits.function_prompts + limits.middle_prompts
    num_stops = 1 + len(corpus.tokenizer.end_ids)
    settings = _text_settings(config)
    rules += ["leviathan"] if num_drafts(config.mtp) else []
  if is_asked:
    decodings = [_decoding(config, rule) for rule in rules]
    compile_ahead(
      program_config(config), params, num_stops=num_stops, decodings=decodings,
      **settings,
    )


def _text_settings(config: Config) -> dict[str, int]:
  limits = config.eval
  return {
    "max_new_tokens": limits.max_new_tokens,
    "prompt_length": config.data.seq_len - limits.max_new_tokens,
    "batch_size": limits.batch_size,
  }


def _task_settings(config: Config, task: Task) -> dict[str, int]:
  return {
    "max_new_tokens": task.max_answer + task.answer_ends,
    "prompt_length": task.max_prompt + 1,
    "batch_size": config.eval.batch_size,
  }


def acceptance_rates(name: str, completions: list[Completion]) -> dict[str, Any]:
  """Returns what was accepted while decoding, errors over prompts by linearisation.

  The figures of `decode.acceptance`, with standard errors over prompts:

  NAME_tokens_per_round: committed tokens per verification, tau; 1 without drafts.
  NAME_survival:   per draft k, rounds that committed it over all rounds, S_k.
  NAME_acceptance: per draft k, rounds that committed it over those in which the drafts
                   before it were accepted and it had room, alpha_k.

  All are None where no round was run.
  """
  keys = [f"{name}_{x}" for x in ("tokens_per_round", "survival", "acceptance")]
  if not any(x.rounds for x in completions):
    return dict.fromkeys(keys)
  tokens_N, rounds_N, accepted_NK, reached_NK = counts(completions)
  survival = [ratio(x_N, rounds_N) for x_N in accepted_NK.T]
  conditional = [ratio(*x) for x in zip(accepted_NK.T, reached_NK.T, strict=True)]
  tau = ratio(tokens_N, rounds_N)
  return dict(zip(keys, (tau, survival, conditional), strict=True))


def _decoding(config: Config, rule: str = "greedy") -> Decoding:
  """Returns how the evaluation decodes: greedily, or sampling at temperature 1."""
  warp = None if rule == "greedy" else check_warp(1.0)
  num_drafts = config.eval.num_drafts or None
  return Decoding(rule, warp, num_drafts=num_drafts, recurse=True)


def _proportion(outcomes: list[bool]) -> dict[str, float] | None:
  if not outcomes:
    return None
  n, mean = len(outcomes), sum(outcomes) / len(outcomes)
  error = math.sqrt(mean * (1 - mean) / n) if n > 1 else math.nan
  return {"mean": mean, "stderr": error, "count": n}


def _parses(source: str) -> bool:
  try:
    ast.parse(source)
  except (SyntaxError, ValueError, MemoryError, RecursionError):
    return False
  return True


def _last_bytes(text: str, limit: int) -> str:
  """The longest end of `text` of at most `limit` bytes that is valid UTF-8."""
  return text.encode()[-limit:].decode("utf-8", errors="ignore")
