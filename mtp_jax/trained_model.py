"""`TrainedModel`: what `mtp_jax.load(folder)` returns, for notebooks.

A checkpoint has parameters, config and tokenizer, so its folder alone, copied anywhere,
can be loaded. The optimizer state is not read.

Legend: T tokens of a text, B rows, P padded length, D embed, V vocab, M = 1 + depth.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import accounting, run_folder, saved_model
from mtp_jax.batch import Batch
from mtp_jax.checkpoint import CheckpointError
from mtp_jax.config import Config, MeshConfig
from mtp_jax.data.tokenizers import Tokenizer, document, tokenizer_from_json
from mtp_jax.decode import generate as decoding
from mtp_jax.decode import stops
from mtp_jax.decode.provenance import Generation
from mtp_jax.decode.target import unstack
from mtp_jax.decode.trees import Tree
from mtp_jax.decode.warp import check_warp
from mtp_jax.lm import (
  MtpLm,
  columns,
  deployed,
  draft_tokens,
  unembed_matrix,
  unembeddings,
)
from mtp_jax.losses import TokenStats, token_stats
from mtp_jax.predictors import kind_of, tokens_after_row
from mtp_jax.predictors.vocabulary import scatter
from mtp_jax.predictors.weights import Weights
from mtp_jax.program import ProgramConfig, program_config
from mtp_jax.sharding import make_mesh, num_row_shards, put_batch
from mtp_jax.targets import future_targets

Text = str | Sequence[int] | np.ndarray

_ID = int | np.integer


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrainedModel:
  """A trained model, read-only; `load` returns one.

  A *text* is a string or token ids [T]. A begin-of-document token is put before a
  string, as before every training document, unless the model has none (an imported
  GPT-2); `encode(text, bos=False)` returns the ids without that token. Results have one
  row per token. With rotary positions, texts may be longer than the rows of training;
  the model was not trained for such lengths.

  config: as trained, with the attention implementation for this platform.
  params: the tree of arrays, on `mesh`. folder: of the checkpoint.
  model_folder: files of an imported model besides its weights, by name.
  """

  config: Config
  params: Any
  tokenizer: Tokenizer
  step: int
  folder: Path
  mesh: jax.sharding.Mesh
  model_folder: dict[str, Any] | None = None

  def encode(self, text: str, bos: bool = True, eos: bool = False) -> np.ndarray:
    """Returns token ids [T], optionally with begin and end of document."""
    return document(self.tokenizer, self.tokenizer.encode(text), bos, eos)

  def hidden(self, text: Text) -> np.ndarray:
    """Returns hidden_MTD, float32: the hidden states before the output matrix.

    Row i of sequential module m, or of step m of EAGLE, depends on the tokens up to
    i + m (if `mtp.fed` is "true"). So does head m with `mtp.markov_rank`: the
    vector of token i + m follows its state. Rows that would depend on tokens beyond the
    text are NaN, for any `mtp.fed`.
    """
    tokens_T, _, hidden_MBPD = self._run(text)
    hidden_MTD = np.array(hidden_MBPD, np.float32)[:, 0, : len(tokens_T)]
    for m in range(1, len(hidden_MTD)):
      hidden_MTD[m, self._num_known(tokens_T, m) :] = np.nan
    return hidden_MTD

  def _num_known(self, tokens_T: np.ndarray, depth: int) -> int:
    """Returns the number of rows of a depth that depend on the text alone."""
    mtp = self.config.mtp
    ahead = kind_of(mtp).reads_ahead(mtp, depth) if depth else 0
    return max(len(tokens_T) - ahead, 0)

  def logits(self, text: Text, depth: int = 0) -> np.ndarray:
    """Returns logits_TV of one depth: row i predicts token i + 1 + depth.

    Rows without input are NaN, see `hidden`. The last rows of other predictors predict
    tokens after the text.

    Raises:
      ValueError: bad text, or a depth that the model does not have.
    """
    deepest = self.config.mtp.depth
    if not 0 <= depth <= deepest:
      raise ValueError(f"depth must be in [0, {deepest}] for this model, got {depth}.")
    tokens_T, _, hidden_MBPD = self._run(text)
    with jax.set_mesh(self.mesh):
      logits_PV = _logits(self._program, self.params, hidden_MBPD, depth)
    logits_TV = np.array(logits_PV)[: len(tokens_T)]
    logits_TV[self._num_known(tokens_T, depth) :] = np.nan
    return logits_TV

  def losses(self, text: Text) -> np.ndarray:
    """Returns nll_MT in nats: entry [m, i] is the loss of token i + 1 + m.

    Entries with i + 1 + m beyond the text are NaN. The losses equal those in training
    of a document that begins with this text and fits into one row.
    """
    tokens_T, batch, hidden_MBPD = self._run(text)
    with jax.set_mesh(self.mesh):
      stats, mask_MBP = _losses(self._program, self.params, batch, hidden_MBPD)
    nll_MBP = np.where(mask_MBP, stats.nll_MBT, np.nan)
    return nll_MBP[:, 0, : len(tokens_T)]

  def next_tokens(
    self, texts: Sequence[Text], least_rows: int = 1
  ) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns `(nll_T, argmax_T)` of each text's tokens but the first, in one batch.

    nll_T is row 0 of `losses` where that is known; argmax_T has the most likely token
    in the place of each. The last token of a text is no input: a text may have one
    token more than the model has learned positions.

    least_rows: rows of the batch; batches of one size and length share a program.
    """
    rows = [self._ids(text) for text in texts]
    batch, hidden_MBPD = self._run_rows(rows, least_rows, 1)
    with jax.set_mesh(self.mesh):
      stats, _ = _losses(self._program, self.params, batch, hidden_MBPD)
    nll_BP, argmax_BP = (np.asarray(x[0]) for x in stats)
    lengths = [len(tokens_T) - 1 for tokens_T in rows]
    return [(nll_BP[i, :n], argmax_BP[i, :n]) for i, n in enumerate(lengths)]

  def generate(
    self,
    prompt: Text | Sequence[Text],
    max_new_tokens: int = 64,
    *,
    num_drafts: int | None = None,
    rule: str = "greedy",
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    proposal: str = "auto",
    recurse: bool = False,
    tree: Tree | None = None,
    seed: int = 0,
    first: int = 0,
    stop: Sequence[str | int] | None = None,
    stream: bool = False,
  ) -> Generation | list[Generation] | Iterator[Generation]:
    """Continues a prompt, or each of a list of prompts, drafting with the predictors.

    Args:
      prompt: a text, or a list of texts; an empty string begins a document.
      max_new_tokens: longest completion.
      num_drafts: K drafts per round; None: one per extra predictor; 0: plain decoding.
      rule: `greedy`, or match | leviathan | block to sample; see `generate.Decoding`.
      temperature, top_k, top_p, min_p: for rules that sample; temperature None is 1.
      proposal: how drafts are chosen; see `generate.Decoding`.
      recurse: apply the last sequential module again if K exceeds their number.
      tree: drafts a tree of this shape instead of a chain, for rules greedy and match:
        `StaticTree`, `DynamicTree`, or a tree from `decode.trees.read`.
      seed: for sampling.
      first: number of the first prompt. Random numbers depend on a prompt's number, so
        that a long list of prompts may be split over several calls.
      stop: ends of a completion besides the model's own end tokens: ids, names of
        special tokens ("<|eot_id|>"), or strings, which are cut off. With an empty list
        nothing ends a completion early, not even the model's end tokens.
      stream: return an iterator over the growing Generation of a single prompt.

    Raises:
      ValueError: names the setting, the rule that it breaks, and its value.
    """
    is_one = isinstance(prompt, str) or not len(prompt) or isinstance(prompt[0], _ID)
    prompts = [self._ids(text) for text in ([prompt] if is_one else prompt)]
    settings = (temperature, top_k, top_p, min_p)
    warp = None
    if rule != "greedy" or any(x is not None for x in settings):
      warp = check_warp(1.0 if temperature is None else temperature, *settings[1:])
    how = decoding.Decoding(rule, warp, proposal, num_drafts, recurse, tree)
    # Strings may span tokens: a table of transitions finds them inside the loop.
    stop_ids, strings = self._stops(stop)
    stop_SV = None
    if strings:
      vocab_size = self.config.tokenizer.vocab_size
      stop_SV = stops.transitions(strings, self.tokenizer, vocab_size)
    limits = {
      "max_new_tokens": max_new_tokens,
      "stop_ids": stop_ids,
      "stop_SV": stop_SV,
      "decoding": how,
      "seed": seed,
    }
    if stream:
      if len(prompts) != 1:
        raise ValueError(f"stream=True takes one prompt, got {len(prompts)}.")
      so_far = decoding.stream(self._program, self._weights, prompts[0], **limits)
      return (Generation(prompts[0], x, self.tokenizer, strings) for x in so_far)
    completions = decoding.generate(
      self._program, self._weights, prompts, first=first, **limits
    )
    results = [
      Generation(ids, completion, self.tokenizer, strings)
      for ids, completion in zip(prompts, completions, strict=True)
    ]
    return results[0] if is_one else results

  def without_predictors(self) -> "TrainedModel":
    """Returns the next-token predictor alone, as `--trunk_only` exports it."""
    params, config = deployed(self.params, self.config)
    return dataclasses.replace(self, params=params, config=config)

  def __repr__(self) -> str:
    mtp, size = self.config.mtp, accounting.count(self.config).total
    predictors = f"{mtp.kind}, D = {mtp.depth}" if mtp.depth else "next token only"
    return (
      f"<TrainedModel {self.config.name!r}: {predictors}, {size:,} parameters, step "
      f"{self.step:,}>"
    )

  @functools.cached_property
  def _program(self) -> ProgramConfig:
    """What compiled programs depend on: models with equal ones share programs."""
    return program_config(self.config)

  @functools.cached_property
  def _weights(self) -> Weights:
    return unstack(self.params, self._program)

  def _run(self, text: Text) -> tuple[np.ndarray, Batch, jax.Array]:
    """Returns `(tokens_T, batch, hidden_MBPD)`; row 0 of the batch is the text."""
    tokens_T = self._ids(text)
    return tokens_T, *self._run_rows([tokens_T], 1, 0)

  def _run_rows(
    self, rows: Sequence[np.ndarray], least: int, ahead: int
  ) -> tuple[Batch, jax.Array]:
    """Returns `(batch, hidden_MBPD)` of texts, see `_batch`."""
    longest, most = max(map(len, rows)) - ahead, self.config.data.seq_len
    if self.config.trunk.kind == "gpt2" and longest > most:
      raise ValueError(
        f"text must have at most {most} tokens: the model has so many learned "
        f"positions (data.seq_len); got {longest}."
      )
    batch = self._batch(rows, max(len(rows), least), longest)
    batch = put_batch(self.mesh, batch, is_whole=True)
    with jax.set_mesh(self.mesh):
      return batch, _hidden(self._program, self.params, batch)

  def _batch(
    self, rows: Sequence[np.ndarray], num_rows: int, longest: int
  ) -> Batch:
    """Returns texts as padded rows, and as many empty rows as are missing.

    A text may have one token more than the `longest` inputs.
    """
    num_extra, row_shards = tokens_after_row(self.config.mtp), num_row_shards(self.mesh)
    shards = self.mesh.shape["context"]
    length = decoding.bucket_size(longest)
    length = -(-length // shards) * shards
    num_rows = -(-num_rows // row_shards) * row_shards
    tokens, segments, positions = np.zeros((3, num_rows, length + num_extra), np.int32)
    for i, tokens_T in enumerate(rows):
      tokens[i, : len(tokens_T)] = tokens_T
      segments[i, : len(tokens_T)] = 1
      positions[i, : len(tokens_T)] = np.arange(len(tokens_T))
    return Batch(
      tokens[:, :length], segments[:, :length], positions[:, :length],
      tokens[:, length:], segments[:, length:],
    )

  def _ids(self, text: Text) -> np.ndarray:
    """Returns the token ids of a text, checked."""
    if isinstance(text, str):
      text, separator = self.encode(text), self.tokenizer.eos_id
      if not len(text) and separator is not None:
        text = [separator]  # Without a begin token, a document follows a separator.
    ids, size = np.asarray(text), self.config.tokenizer.vocab_size
    if ids.size == 0:
      raise ValueError("text must have at least one token, got none.")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
      raise ValueError(
        "text must be a string or a sequence of token ids, got "
        f"{type(text).__name__} of shape {ids.shape} and type {ids.dtype}."
      )
    decoding.check_ids(ids, size, "got")
    return ids.astype(np.int32)

  def _stops(
    self, stop: Sequence[str | int] | None
  ) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Returns the ids and the strings that end a completion."""
    if isinstance(stop, str):
      raise ValueError(f"stop must be a list, got {stop!r}; write [{stop!r}].")
    has_ends = stop is None or len(stop) > 0
    ids, strings = [*self.tokenizer.end_ids] if has_ends else [], []
    for x in stop or ():
      i = self.tokenizer.special_id(x) if isinstance(x, str) else x
      if i is None:
        strings.append(x)
      else:
        ids.append(int(self._ids([i])[0]))
    return tuple(ids), tuple(strings)


def load(
  path: str | Path, step: int | None = None, mesh: jax.sharding.Mesh | None = None
) -> TrainedModel:
  """Returns the model of a checkpoint, on any devices.

  Args:
    path: a run folder, its `checkpoints`, or one checkpoint (checkpoints/STEP or a copy
      of it).
    step: the checkpoint of a run; None is the newest undamaged one (damaged ones are
      reported).
    mesh: from `sharding.make_mesh`, for the parameters; None is the first device.

  Raises:
    CheckpointError: `path` is no such folder, has no checkpoint of that step, or the
      checkpoint is damaged.
    ConfigError: a version with other config keys wrote the checkpoint.
  """
  folders = _checkpoint_folders(Path(path).expanduser(), step)
  mesh = _one_device() if mesh is None else mesh
  folder, saved = saved_model.restore_newest(folders, mesh)
  return TrainedModel(
    config=saved.config,
    params=saved.params,
    tokenizer=tokenizer_from_json(saved.tokenizer, f"{folder}/meta"),
    step=saved.step,
    folder=folder,
    mesh=mesh,
    model_folder=saved.model_folder,
  )


def _checkpoint_folders(path: Path, step: int | None) -> list[Path]:
  """Returns the checkpoints that `path` may refer to, the newest first."""
  if not path.is_dir():
    raise CheckpointError(f"{path} must be a folder; there is no such folder.")
  if (path / "meta").is_dir() and (path / "state").is_dir():
    if step is not None and path.name != str(step):
      raise CheckpointError(f"{path} is one checkpoint; step {step} was asked for.")
    return [path]
  directory = path / run_folder.CHECKPOINTS
  if not directory.is_dir():
    directory = path
  steps = run_folder.steps_in(directory)
  if not steps:
    raise CheckpointError(f"{path} {_why_not(path)}")
  if step is None:
    return [directory / str(s) for s in reversed(steps)]
  if step not in steps:
    raise CheckpointError(
      f"no checkpoint of step {step} in {directory}; there are {steps}."
    )
  return [directory / str(step)]


def _why_not(path: Path) -> str:
  """Returns the reason why a folder has no checkpoint, as the rest of a message."""
  if (path / run_folder.CHECKPOINTS).is_dir() or run_folder.is_run(path):
    return "is a run folder without a finished checkpoint."
  if runs := run_folder.folders_below(path):
    return (
      f"holds {len(runs)} run folder(s); load one of them, such as {runs[0].name!r}."
    )
  return (
    "must be a run folder (with checkpoints/STEP), a folder of checkpoints (with STEP, "
    "a number) or a checkpoint (with state/ and meta/), and has nothing of these."
  )


def _one_device() -> jax.sharding.Mesh:
  sizes = MeshConfig(data=1, fsdp=1, expert=1, tensor=1, context=1)
  return make_mesh(sizes, jax.local_devices()[:1])


@functools.partial(jax.jit, static_argnums=0)
def _hidden(config: Config, params: Any, batch: Batch) -> jax.Array:
  return MtpLm(config).apply({"params": params}, batch)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _logits(
  config: Config, params: Any, hidden_MBPD: jax.Array, depth: int
) -> jax.Array:
  """Returns logits_PV of the first row, float32 or wider."""
  matrix_DV = unembed_matrix(params, config, depth)
  logits_PV = jnp.einsum(
    "PD,DV->PV",
    hidden_MBPD[depth, 0, :, : len(matrix_DV)],
    matrix_DV,
    preferred_element_type=jnp.promote_types(hidden_MBPD.dtype, jnp.float32),
  )
  tokens_C = draft_tokens(params, config) if depth else None
  if tokens_C is None:
    return logits_PV
  return scatter(logits_PV, tokens_C, config.tokenizer.vocab_size)


@functools.partial(jax.jit, static_argnums=0)
def _losses(
  config: Config, params: Any, batch: Batch, hidden_MBPD: jax.Array
) -> tuple[TokenStats, jax.Array]:
  """Returns `(stats, mask_MBP)`, as the evaluation computes them."""
  targets_MBP, mask_MBP = columns(
    params, config, *future_targets(batch, config.mtp.depth)
  )
  stats = token_stats(
    hidden_MBPD, unembeddings(params, config), targets_MBP, config.loss.block_tokens
  )
  return stats, mask_MBP
