"""A trained model in one call, for notebooks: `mtp_jax.load(folder)`.

A checkpoint holds all that is needed (parameters, config, tokenizer), so that its
folder alone, copied anywhere, will do. The optimizer state is not read.

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

from mtp_jax import accounting, checkpoint, saved_model
from mtp_jax.batch import Batch
from mtp_jax.checkpoint import CheckpointError
from mtp_jax.config import Config, MeshConfig
from mtp_jax.data.tokenizers import Tokenizer, document, tokenizer_from_json
from mtp_jax.decode import generate as decoding
from mtp_jax.decode import network, stops
from mtp_jax.decode.provenance import Generation
from mtp_jax.decode.trees import Tree
from mtp_jax.decode.warp import check_warp
from mtp_jax.lm import (
  MtpLm,
  columns,
  draft_tokens,
  unembed_matrix,
  unembeddings,
)
from mtp_jax.losses import token_stats
from mtp_jax.predictors import kind_of
from mtp_jax.predictors.vocabulary import scatter
from mtp_jax.sharding import make_mesh, num_row_shards, put_batch
from mtp_jax.targets import future_targets
from mtp_jax.train_step import shape_of

Text = str | Sequence[int] | np.ndarray

_ID = int | np.integer


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrainedModel:
  """A model as training left it; `load` returns one. No method changes anything.

  A *text* is a string or token ids [T]. A string gets a begin-of-document token in
  front, as every training document has, unless the model has none (an imported GPT-2);
  `encode(text, bos=False)` gives the ids without it. Results have a row per token.
  Texts longer than the rows of training are allowed where positions are rotary; what a
  model says there, it was not trained for.

  config: as trained, with the attention implementation that suits this platform.
  params: the tree of arrays, on `mesh`. folder: of the checkpoint.
  model_folder: what an imported model had besides weights; see `interop.model_files`.
  """

  config: Config
  params: Any
  tokenizer: Tokenizer
  step: int
  folder: Path
  mesh: jax.sharding.Mesh
  model_folder: dict[str, Any] | None = None

  def encode(self, text: str, bos: bool = True, eos: bool = False) -> np.ndarray:
    """Returns token ids [T]; with `eos`, the text is a whole document."""
    return document(self.tokenizer, self.tokenizer.encode(text), bos, eos)

  def hidden(self, text: Text) -> np.ndarray:
    """Returns hidden_MTD, float32: the states that logits are made from.

    A sequential module m at row i reads the tokens up to i + m, if `mtp.fed` is "true",
    and so does step m of EAGLE. Where the text ends before that, the row is NaN,
    whatever the module is fed.
    """
    tokens_T, _, hidden_MBPD = self._run(text)
    hidden_MTD = np.array(hidden_MBPD, np.float32)[:, 0, : len(tokens_T)]
    if kind_of(self.config.mtp).is_autoregressive:
      for m in range(1, len(hidden_MTD)):
        hidden_MTD[m, -m:] = np.nan
    return hidden_MTD

  def logits(self, text: Text, depth: int = 0) -> np.ndarray:
    """Returns logits_TV of one depth: row i is about token i + 1 + depth.

    Rows that a module or step has no input for are NaN; see `hidden`. The last row of
    every depth of other predictors is about tokens after the text.

    Raises:
      ValueError: bad text, or a depth that the model does not have.
    """
    deepest = self.config.mtp.depth
    if not 0 <= depth <= deepest:
      raise ValueError(f"depth must be in [0, {deepest}] for this model, got {depth}.")
    tokens_T, _, hidden_MBPD = self._run(text)
    with jax.set_mesh(self.mesh):
      logits_PV = _logits(self._shape, self.params, hidden_MBPD, depth)
    logits_TV = np.array(logits_PV)[: len(tokens_T)]
    if depth and kind_of(self.config.mtp).is_autoregressive:
      logits_TV[-depth:] = np.nan
    return logits_TV

  def losses(self, text: Text) -> np.ndarray:
    """Returns nll_MT in nats: at [m, i], of token i + 1 + m given those up to it.

    NaN where the text ends before that token. The same as in training for a document
    that begins so and fits into one row.
    """
    tokens_T, batch, hidden_MBPD = self._run(text)
    with jax.set_mesh(self.mesh):
      nll_MBP, mask_MBP = _losses(self._shape, self.params, batch, hidden_MBPD)
    nll_MBP = np.where(mask_MBP, nll_MBP, np.nan)
    return nll_MBP[:, 0, : len(tokens_T)]

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
      num_drafts: K; None takes one per extra predictor, 0 is plain decoding.
      rule: `greedy`, or match | leviathan | block to sample; see `generate.Decoding`.
      temperature, top_k, top_p, min_p: for the rules that sample; a temperature of None
        is 1.
      proposal: how drafts are chosen; see `generate.Decoding`.
      recurse: lets the last sequential module go on where K is more than there are.
      tree: drafts as a tree of this depth instead of a chain, for the rules greedy and
        match: `StaticTree`, `DynamicTree`, or what `decode.trees.read` returns.
      seed: of sampling.
      first: number of the first prompt; prompt i draws what is drawn for number
        `first` + i, so that a long list may be given in parts.
      stop: what ends a completion beside the model's own end tokens: ids, names of
        special tokens ("<|eot_id|>"), or strings, before which the text ends. An empty
        list lets nothing end it, not even these tokens.
      stream: return an iterator over the growing Generation of one prompt instead.

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
      so_far = decoding.stream(self._shape, self._weights, prompts[0], **limits)
      return (Generation(prompts[0], x, self.tokenizer, strings) for x in so_far)
    completions = decoding.generate(
      self._shape, self._weights, prompts, first=first, **limits
    )
    results = [
      Generation(ids, completion, self.tokenizer, strings)
      for ids, completion in zip(prompts, completions, strict=True)
    ]
    return results[0] if is_one else results

  def __repr__(self) -> str:
    mtp, size = self.config.mtp, accounting.count(self.config).total
    predictors = f"{mtp.kind}, D = {mtp.depth}" if mtp.depth else "next token only"
    return (
      f"<TrainedModel {self.config.name!r}: {predictors}, {size:,} parameters, step "
      f"{self.step:,}>"
    )

  @functools.cached_property
  def _shape(self) -> Config:
    """What compiled programs depend on, so that models of one shape share them."""
    return shape_of(self.config)

  @functools.cached_property
  def _weights(self) -> network.Weights:
    return network.unstack(self.params, self._shape)

  def _run(self, text: Text) -> tuple[np.ndarray, Batch, jax.Array]:
    """Returns `(tokens_T, batch, hidden_MBPD)`; row 0 of the batch is the text."""
    tokens_T = self._ids(text)
    most = self.config.data.seq_len
    if self.config.trunk.kind == "gpt2" and len(tokens_T) > most:
      raise ValueError(
        f"text must have at most {most} tokens: the model has so many learned "
        f"positions (data.seq_len); got {len(tokens_T)}."
      )
    batch = put_batch(self.mesh, self._batch(tokens_T), is_whole=True)
    with jax.set_mesh(self.mesh):
      return tokens_T, batch, _hidden(self._shape, self.params, batch)

  def _batch(self, tokens_T: np.ndarray) -> Batch:
    """Returns the text as one document of a padded row, and as many as a mesh needs."""
    num_tokens, num_extra = len(tokens_T), 1 + self.config.mtp.depth
    shards = self.mesh.shape["context"]
    length = decoding.bucket_size(num_tokens)
    length = -(-length // shards) * shards
    rows = num_row_shards(self.mesh)
    tokens, segments, positions = np.zeros((3, rows, length + num_extra), np.int32)
    tokens[0, :num_tokens] = tokens_T
    segments[0, :num_tokens] = 1
    positions[0, :num_tokens] = np.arange(num_tokens)
    return Batch(
      tokens[:, :length], segments[:, :length], positions[:, :length],
      tokens[:, length:], segments[:, length:],
    )

  def _ids(self, text: Text) -> np.ndarray:
    """Returns the token ids of a text, checked."""
    if isinstance(text, str):
      text, separator = self.encode(text), self.tokenizer.eos_id
      if not len(text) and separator is not None:
        text = [separator]  # After which a document begins that has no begin token.
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
  """Returns the model of a checkpoint, on whatever devices there are.

  Args:
    path: a run folder, its `checkpoints`, or one checkpoint (checkpoints/STEP or a copy
      of it).
    step: which checkpoint of a run; None is the newest whole one, damaged ones are
      reported.
    mesh: from `sharding.make_mesh`, to spread the parameters; None is the first device.

  Raises:
    CheckpointError: the folder is none of these, has no checkpoint of that step, or
      what was asked for is damaged.
    ConfigError: the checkpoint was written by code with other settings.
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
  """Returns the checkpoints that a path may mean, the most wanted first."""
  if not path.is_dir():
    raise CheckpointError(f"{path} must be a folder, and there is none.")
  if (path / "meta").is_dir() and (path / "state").is_dir():
    if step is not None and path.name != str(step):
      raise CheckpointError(f"{path} is one checkpoint; step {step} was asked for.")
    return [path]
  directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
  steps = checkpoint.finished_steps(directory)
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
  """Says why no checkpoint was found in a folder."""
  if (path / "checkpoints").is_dir() or (path / "config.json").is_file():
    return "is a run folder without a finished checkpoint."
  runs = sorted(x.parent.name for x in path.glob("*/config.json"))
  if runs:
    return f"holds {len(runs)} run folder(s); load one of them, such as {runs[0]!r}."
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
  logits_PV = jnp.einsum(
    "PD,DV->PV",
    hidden_MBPD[depth, 0],
    unembed_matrix(params, config, depth),
    preferred_element_type=jnp.promote_types(hidden_MBPD.dtype, jnp.float32),
  )
  tokens_C = draft_tokens(params, config) if depth else None
  if tokens_C is None:
    return logits_PV
  return scatter(logits_PV, tokens_C, config.tokenizer.vocab_size)


@functools.partial(jax.jit, static_argnums=0)
def _losses(
  config: Config, params: Any, batch: Batch, hidden_MBPD: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns `(nll_MBP, mask_MBP)`, as the evaluation computes them."""
  targets_MBP, mask_MBP = columns(
    params, config, *future_targets(batch, config.mtp.depth)
  )
  stats = token_stats(
    hidden_MBPD, unembeddings(params, config), targets_MBP, config.loss.block_tokens
  )
  return stats.nll_MBT, mask_MBP
