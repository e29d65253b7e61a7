"""What a trained model is worth: losses per depth, agreement, and generation.

Four things are called "acceptance" elsewhere; ours are told apart. *Accuracy* compares
depth m with the data. *Teacher-forced agreement* compares it with the trunk's own arg
max for the same token, on true prefixes. *Joint prefix agreement* asks that depths
1..m all agree at once, and one plus the sum of those is the *simulated accepted
length*. What is accepted while decoding is measured by decoding, not here.

Every mean is a ratio of sums over documents, with the standard error of that ratio by
linearisation over documents (Cochran 1977, section 6.4).

Legend: B batch, T sequence, M = 1 + depth.
"""

import ast
import functools
import itertools
import math
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mtp_jax.batch import Batch
from mtp_jax.config import Config
from mtp_jax.data.tasks.corpus import TaskCorpus
from mtp_jax.data.tasks.interface import Example
from mtp_jax.decode.acceptance import counts
from mtp_jax.decode.generate import Completion, Decoding, generate
from mtp_jax.decode.network import unstack
from mtp_jax.decode.warp import check_warp
from mtp_jax.lm import MtpLm, columns, draft_tokens, unembed_matrix, unembeddings
from mtp_jax.losses import token_ranks, token_stats
from mtp_jax.predictors.vocabulary import localize
from mtp_jax.program import ProgramConfig, program_config
from mtp_jax.sharding import put_batch
from mtp_jax.targets import future_targets

_NO_TOKEN = -1


def row_sums(
  config: Config, params: Any, batch: Batch, token_bytes_V: jax.Array
) -> dict[str, jax.Array]:
  """Returns per-row sums; every entry has a leading B axis.

  nll, correct, count [B, M] are over valid targets of each depth, with `draft_vocab`
  over those of them that can be drafted; agree, prefix [B, D] and reachable [B] over
  the positions where all D drafts can be compared with the trunk's choice inside the
  row; bytes [B] counts the bytes of the next-token targets.
  """
  hidden_MBTD = MtpLm(config).apply({"params": params}, batch)
  depth = config.mtp.depth
  tokens_MBT, valid_MBT = future_targets(batch, depth, config.mtp.score_from)
  targets_MBT, mask_MBT = columns(params, config, tokens_MBT, valid_MBT)
  stats = token_stats(
    hidden_MBTD, unembeddings(params, config), targets_MBT, config.loss.block_tokens
  )
  drafted_MBT, tokens_C = stats.argmax_MBT, draft_tokens(params, config)
  if tokens_C is not None:
    drafted_MBT = drafted_MBT.at[1:].set(tokens_C[drafted_MBT[1:]])
  sum_rows = lambda x: jnp.sum(x, axis=-1, dtype=jnp.float32)  # noqa: E731
  chosen, reachable_BT = _trunk_choices(drafted_MBT[0], valid_MBT)
  agree, prefix, so_far_BT = [], [], reachable_BT
  for m, chosen_BT in enumerate(chosen, start=1):
    agree_BT = reachable_BT & (drafted_MBT[m] == chosen_BT)
    so_far_BT = so_far_BT & agree_BT
    agree.append(sum_rows(agree_BT))
    prefix.append(sum_rows(so_far_BT))
  no_depth = jnp.zeros((batch.tokens.shape[0], 0), jnp.float32)
  return {
    "nll": sum_rows(jnp.where(mask_MBT, stats.nll_MBT, 0.0)).T,
    "correct": sum_rows(mask_MBT & (stats.argmax_MBT == targets_MBT)).T,
    "count": sum_rows(mask_MBT).T,
    "agree": jnp.stack(agree, axis=1) if agree else no_depth,
    "prefix": jnp.stack(prefix, axis=1) if prefix else no_depth,
    "reachable": sum_rows(reachable_BT),
    "bytes": sum_rows(jnp.where(mask_MBT[0], token_bytes_V[targets_MBT[0]], 0)),
  }


def _trunk_choices(
  trunk_BT: jax.Array, mask_MBT: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
  """Returns what the trunk itself says of the token that each extra depth drafts.

  `(chosen, reachable_BT)`: chosen_BT per depth, to be read at the positions where all D
  drafts can be compared with the trunk's choice inside the row.

  Args:
    trunk_BT: the arg max of depth 0.
    mask_MBT: of valid targets.
  """
  depth, length = len(mask_MBT) - 1, trunk_BT.shape[1]
  # Position i + m holds the trunk's own choice of the token that depth m drafts at i;
  # the wrapped end is not reachable.
  chosen = [jnp.roll(trunk_BT, -m, axis=1) for m in range(1, 1 + depth)]
  return chosen, mask_MBT[depth] & (jnp.arange(length) < length - depth)


def hit_sums(
  config: Config, params: Any, batch: Batch, ranks: int
) -> dict[str, jax.Array]:
  """Returns per-row sums; every entry has a leading B axis.

  hits [B, D, R] counts the positions at which the token that a depth ranks r-th is the
  trunk's own choice: at rank 0 it is `agree` of `row_sums`. reachable [B]: see there.
  """
  hidden_MBTD = MtpLm(config).apply({"params": params}, batch)
  blocks, tokens_C = config.loss.block_tokens, draft_tokens(params, config)
  mtp = config.mtp
  targets_MBT, mask_MBT = future_targets(batch, mtp.depth, mtp.score_from)
  main = [(slice(0, 1), unembed_matrix(params, config))]
  trunk = token_stats(hidden_MBTD[:1], main, targets_MBT[:1], blocks)
  chosen, reachable_BT = _trunk_choices(trunk.argmax_MBT[0], mask_MBT)
  ranks_of_depths = []
  for m, column_BT in enumerate(chosen, start=1):
    is_there_BT = reachable_BT
    if tokens_C is not None:
      column_BT, is_there_BT = localize(
        column_BT, tokens_C, config.tokenizer.vocab_size
      )
    unembed_DV = unembed_matrix(params, config, m)
    (rank_BT,) = token_ranks(
      hidden_MBTD[m : m + 1], unembed_DV, column_BT[None], blocks
    )
    ranks_of_depths.append(jnp.where(reachable_BT & is_there_BT, rank_BT, -1))
  rank_DBT = jnp.stack(ranks_of_depths)
  is_hit_DBTR = rank_DBT[..., None] == jnp.arange(ranks)
  return {
    "hits": jnp.sum(is_hit_DBTR, axis=2, dtype=jnp.float32).swapaxes(0, 1),
    "reachable": jnp.sum(reachable_BT, axis=1, dtype=jnp.float32),
  }


def top_k_hits(
  config: Config,
  params: Any,
  batches: Iterable[tuple[Batch, np.ndarray]],
  ranks: int,
  mesh: jax.sharding.Mesh,
) -> tuple[np.ndarray, int]:
  """Returns `(hits_KR, num_positions)` of the extra predictors, for static trees.

  hits[k, r] is the share of positions at which the token that depth k + 1 ranks r-th
  is the trunk's own choice: teacher-forced, at the positions of `row_sums`.

  Args:
    config: of the trial, with at least one extra predictor.
    batches: see `document_sums`.
    ranks: R, from the most likely token on.

  Raises:
    ValueError: no position, or ranks not in [1, vocab].
  """
  most = config.mtp.draft_vocab or config.tokenizer.vocab_size
  if not 1 <= ranks <= most:
    raise ValueError(f"ranks must be 1 to {most}, the vocabulary, got {ranks}.")
  program = jax.jit(functools.partial(hit_sums, config, ranks=ranks))
  hits_KR, count = np.zeros((config.mtp.depth, ranks)), 0.0
  for batch, document_B in batches:
    sums = program(params, put_batch(mesh, batch, is_whole=True))
    sums = multihost_utils.process_allgather(sums, tiled=True)
    hits_KR += np.sum(sums["hits"][document_B >= 0], axis=0, dtype=np.float64)
    count += float(np.sum(sums["reachable"][document_B >= 0], dtype=np.float64))
  if not count:
    raise ValueError(
      "held-out rows must have a position where every depth has a target, got none."
    )
  return hits_KR / count, int(count)


@functools.lru_cache(maxsize=32)
def row_sums_program(config: ProgramConfig) -> Any:
  """Returns `row_sums` as a jitted function of parameters, batch and byte counts."""
  return jax.jit(functools.partial(row_sums, config))


def document_sums(
  config: Config,
  params: Any,
  batches: Iterable[tuple[Batch, np.ndarray]],
  token_bytes_V: np.ndarray,
  mesh: jax.sharding.Mesh,
) -> dict[str, np.ndarray]:
  """Returns `row_sums` added up per document: leading axis = documents seen.

  `batches` yields (Batch, document index per row); a negative index is padding.
  """
  program = row_sums_program(config)
  table = np.zeros(config.tokenizer.vocab_size, np.int32)
  table[: len(token_bytes_V)] = token_bytes_V
  rows, documents = [], []
  for batch, document_B in batches:
    sums = program(params, put_batch(mesh, batch, is_whole=True), table)
    rows.append(multihost_utils.process_allgather(sums, tiled=True))
    documents.append(document_B)
  document = np.concatenate(documents)
  real = document >= 0
  _, index = np.unique(document[real], return_inverse=True)

  def add_up(*parts: np.ndarray) -> np.ndarray:
    values = np.concatenate(parts)[real].astype(np.float64)
    total = np.zeros((index.max() + 1, *values.shape[1:]))
    np.add.at(total, index, values)
    return total

  return jax.tree.map(add_up, *rows)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> dict[str, float]:
  """Returns mean and standard error over documents of a ratio of sums.

  The mean is NaN without any count; the error is NaN with fewer than two documents.
  """
  total, n = denominator.sum(), len(denominator)
  if total == 0:
    return {"mean": math.nan, "stderr": math.nan}
  mean = numerator.sum() / total
  if n < 2:
    return {"mean": float(mean), "stderr": math.nan}
  residual = numerator - mean * denominator
  error = np.sqrt(n / (n - 1) * np.square(residual).sum()) / total
  return {"mean": float(mean), "stderr": float(error)}


# In place of an error over documents, of which there is one.
NO_ERROR = "an error needs two documents"


def summarize(sums: dict[str, np.ndarray]) -> dict[str, Any]:
  """Returns the likelihood part of eval.json from `document_sums`."""
  num_predictors = sums["nll"].shape[1]
  loss = [ratio(sums["nll"][:, m], sums["count"][:, m]) for m in range(num_predictors)]
  reachable = sums["reachable"]
  drafts = range(num_predictors - 1)
  return {
    "num_documents": len(reachable),
    "main_loss": loss[0],
    "bits_per_byte": ratio(sums["nll"][:, 0] / math.log(2), sums["bytes"]),
    "depth_loss": [
      x | {"count": int(sums["count"][:, m].sum())} for m, x in enumerate(loss)
    ],
    "depth_accuracy": [
      ratio(sums["correct"][:, m], sums["count"][:, m]) for m in range(num_predictors)
    ],
    "teacher_forced_agreement": [ratio(sums["agree"][:, k], reachable) for k in drafts],
    "joint_prefix_agreement": [ratio(sums["prefix"][:, k], reachable) for k in drafts],
    "simulated_accepted_length": ratio(
      reachable + sums["prefix"].sum(axis=1), reachable
    ),
  }


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


def generative_metrics(
  config: Config,
  params: Any,
  tokenizer: Any,
  texts: list[str],
  before_batch: Callable[[], None] | None = None,
) -> dict[str, Any]:
  """Returns next-line exact match, the share of functions that parse, and acceptance.

  The model decodes greedily with all its extra predictors as drafters, which changes
  nothing in what is said; `decoded_*` says what share of their drafts was accepted, see
  `acceptance_rates`. `sampled_*` says so of functions sampled at temperature 1 (rule
  leviathan), or of whole documents from their middle where `eval.middle_prompts` asks
  for them: a small model soon repeats itself greedily, and then every draft is right.
  Errors are binomial (one prompt per document). An entry is None where it is off or no
  text suits it. For `before_batch` see `generate`.
  """
  limits = config.eval
  prompt_length = config.data.seq_len - limits.max_new_tokens
  newline = tokenizer.encode("\n")
  stop_at_line = (int(newline[-1]), *tokenizer.end_ids)
  stop_at_end = (_NO_TOKEN, *tokenizer.end_ids)  # As many, for the same program.
  program = program_config(config)
  weights = unstack(params, program)

  def complete(
    prompts: list[str], stop_ids: tuple[int, ...], rule: str = "greedy"
  ) -> list[Completion]:
    return generate(
      program,
      weights,
      [tokenizer.encode(prompt)[-prompt_length:] for prompt in prompts],
      max_new_tokens=limits.max_new_tokens,
      stop_ids=stop_ids,
      decoding=_decoding(config, rule),
      prompt_length=prompt_length,
      batch_size=limits.batch_size,
      before_batch=before_batch,
    )

  def text(x: Completion) -> str:
    return tokenizer.decode(x.tokens[:-1] if x.is_stopped else x.tokens)

  pairs = line_prompts(
    texts, limits.line_prompts, prompt_length, limits.max_new_tokens - 1
  )
  lines = complete([prompt for prompt, _ in pairs], stop_at_line)
  # A BPE token may hold the newline and more; the line is what comes before it.
  exact = [
    text(x).split("\n")[0] == line for x, (_, line) in zip(lines, pairs, strict=True)
  ]

  headers = function_prompts(texts, limits.function_prompts, prompt_length)
  bodies = complete(headers, stop_at_end)
  sources = [
    completed_function(header, text(body))
    for header, body in zip(headers, bodies, strict=True)
  ]
  parses = [source is not None and _parses(source) for source in sources]
  sampled = []
  if config.mtp.depth:
    if limits.middle_prompts:
      headers = middle_prompts(texts, limits.middle_prompts, prompt_length)
    sampled = complete(headers, stop_at_end, "leviathan")
  return {
    "task_accuracy": None,
    "next_line_exact_match": _proportion(exact),
    "function_parses": _proportion(parses),
    **acceptance_rates("decoded", [*lines, *bodies]),
    **acceptance_rates("sampled", sampled),
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
                        answers to a prompt that says nothing (siblings, where two
                        children in the other order are another answer).
  task_baselines:       accuracy of trivial rules on the same examples, see
                        `Task.baselines`.
  decoded_*:            see `acceptance_rates`.
  """
  task, tokenizer = corpus.task, corpus.tokenizer
  examples = corpus.held_out(config.eval.task_examples)
  program = program_config(config)
  completions = generate(
    program,
    unstack(params, program),
    [corpus.encode(Example(x.prompt, ()))[0][:-1] for x in examples],
    max_new_tokens=task.max_answer + task.answer_ends,
    stop_ids=(tokenizer.eos_id, tokenizer.eos_id),
    decoding=_decoding(config),
    prompt_length=task.max_prompt + 1,
    batch_size=config.eval.batch_size,
    before_batch=before_batch,
  )
  # An answer that the text goes on after is what comes first.
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


def acceptance_rates(name: str, completions: list[Completion]) -> dict[str, Any]:
  """Returns what was accepted while decoding, errors over prompts by linearisation.

  The figures of `decode.acceptance`, with the standard errors of this module:

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
