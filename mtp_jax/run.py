"""The parts of one run, built once; and the door through which every run begins."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mtp_jax import accounting, checkpoint, run_folder
from mtp_jax.batch import Batch
from mtp_jax.checkpoint import Checkpointer, CheckpointError, Restored
from mtp_jax.config import Config, ConfigError, with_overrides
from mtp_jax.config_rules import validate
from mtp_jax.data.packing import token_counts
from mtp_jax.data.pipeline import Corpus, TrainLoader, load_corpus
from mtp_jax.data.sources import describe
from mtp_jax.data.tasks.corpus import TaskCorpus
from mtp_jax.data.tokenizers import Tokenizer, in_run, save_tokenizer
from mtp_jax.environment import code_commit, hardware, versions
from mtp_jax.executables import compile_ahead, compiled, stop_ahead
from mtp_jax.interrupt import Interrupted
from mtp_jax.kernels.attention import MOST_DOCUMENTS
from mtp_jax.layouts import abstract_inputs, fastest_that_fits
from mtp_jax.lm import on_trunk
from mtp_jax.predictors import tokens_after_row
from mtp_jax.predictors.vocabulary import most_frequent
from mtp_jax.program import ProgramConfig, program_config
from mtp_jax.saved_model import SOURCES, check_source, load_source
from mtp_jax.sharding import make_mesh, put_batch, replicated, row_share
from mtp_jax.train_state import Hyperparameters, TrainState, hyperparameters
from mtp_jax.train_step import Programs, programs

# Their versions go into run.json.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Diverged(RuntimeError):
  """Too many steps in a row had a loss or gradient that was not finite."""


class Start(NamedTuple):
  """Where a run begins or continues.

  state, data: of the model and of the data iterator.
  progress: what `RunLog` keeps in a checkpoint; None where nothing is done yet.
  origin: by name of `SOURCES`, where the first parameters are from.
  """

  state: TrainState
  progress: dict[str, Any] | None
  origin: dict[str, Any]


def admit(config: Config, workdir: Path, num_devices: int | None) -> Config:
  """Checks all that can be checked before the run folder is touched; the one door.

  Args:
    config: of the run.
    workdir: the run folder, which may not exist yet.
    num_devices: that the mesh has to fill; None checks no mesh.

  Returns:
    The resolved config (`accounting.resolve`).

  Raises:
    ConfigError: the config cannot work here, or the run that it begins with cannot.
  """
  validate(config, num_devices, jax.default_backend())
  check_source(config, workdir)
  return accounting.resolve(config)


def check_folder(config: Config, workdir: Path) -> None:
  """Checks that a run folder holds this very run, or none.

  Raises:
    ConfigError: it holds another run, or something that is no run.
  """
  run_folder.check_kinds(workdir)
  if (workdir / run_folder.CONFIG).exists():
    saved = run_folder.read_config(workdir)
    if run_folder.is_begun(workdir):
      checkpoint.check_resumable(saved, config)


def _with_mask_where_needed(config: Config, corpus: Corpus | TaskCorpus) -> Config:
  """Returns the config, with a mask in place of more documents than attention takes."""
  if config.trunk.attention != "cudnn_packed":
    return config
  # Held-out rows have one document each.
  if (count := corpus.train_rows(0).most_documents) <= MOST_DOCUMENTS:
    return config
  warnings.warn(
    f"trunk.attention is 'cudnn' in place of 'cudnn_packed', which takes at most "
    f"{MOST_DOCUMENTS} documents: a row may have {count}.", stacklevel=3,
  )
  return with_overrides(config, {"trunk.attention": "cudnn"})


class Run:
  """The parts of one run, built once; a context manager, which saves what is under way.

  Args:
    config: resolved.
    workdir: the run folder; its own tokenizer, if it has one, is used.
    read_only: nothing is saved.
    devices: of the mesh, by default all.
    tokenizer: takes the place of what `tokenizer.path` names.
  """

  def __init__(
    self,
    config: Config,
    workdir: Path,
    read_only: bool = False,
    devices: list[jax.Device] | None = None,
    tokenizer: Tokenizer | None = None,
  ):
    self.config = run_folder.own_config(config)
    self.workdir = workdir
    self.mesh = make_mesh(config.mesh, devices)
    section = in_run(config.tokenizer, workdir)
    self.corpus = load_corpus(dataclasses.replace(config, tokenizer=section), tokenizer)
    self.config = _with_mask_where_needed(self.config, self.corpus)
    # What is measured at a validation, by the kind of its record.
    self.validated = {"validation": self.corpus}
    if config.train.eval_test:
      splits = ("validation", "test")
      self.validated = {split: _of_split(self.corpus, split) for split in splits}
    self.model_folder = run_folder.read(workdir, run_folder.MODEL_FOLDER)
    self.checkpointer = Checkpointer(workdir, config.checkpoint.keep, read_only)
    self.flops_per_token = accounting.train_flops_per_token(config)
    self.tokens_per_step = config.data.batch_size * config.data.seq_len

  def __enter__(self) -> "Run":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    """Finishes the save under way, unless a process may be gone that it waits for.

    A save that fails must not hide the error of a run (a full disk has several), but
    `Interrupted` promises that all is saved.
    """
    stop_ahead()
    is_agreed = kind is None or issubclass(kind, (Interrupted, Diverged))
    if is_agreed or jax.process_count() == 1:
      try:
        self.checkpointer.close()
      except CheckpointError as error:
        if kind is None or issubclass(kind, Interrupted):
          raise
        warnings.warn(str(error), stacklevel=2)

  @functools.cached_property
  def program(self) -> ProgramConfig:
    """What is trained, with its layers as they run fastest here."""
    return fastest_that_fits(program_config(self.config), self.mesh)

  @functools.cached_property
  def programs(self) -> Programs:
    return programs(self.program, self.mesh)

  @functools.cached_property
  def hyperparameters(self) -> Hyperparameters:
    return jax.device_put(hyperparameters(self.config), replicated(self.mesh))

  def compiled_step(self, state: TrainState, batch: Batch) -> Callable[..., Any]:
    """Returns `train_step` as an executable for such arguments."""
    return compiled(
      self.programs.step, state, batch, self.hyperparameters, np.bool_(True)
    )

  def compile_step_ahead(self, has_unscored: bool) -> None:
    """Begins to compile the step; `has_unscored` is of the loader."""
    *inputs, _ = abstract_inputs(self.program, self.mesh, has_unscored)
    compile_ahead(self.programs.step, *inputs, np.bool_(True))

  def loader(self) -> TrainLoader:
    """Returns the training batches from the first one on."""
    data = self.config.data
    index, count = row_share(self.mesh)
    return TrainLoader(
      self.corpus.train_rows(tokens_after_row(self.config.mtp)),
      batch_size=data.batch_size,
      seed=data.seed,
      host_index=index,
      num_hosts=count,
      num_workers=data.num_workers,
    )

  def split(self, batch: Batch) -> Batch:
    """Returns rows as [A, B / A, ...] for A microbatches."""
    microbatches = self.config.train.accumulation_steps
    return jax.tree.map(lambda x: x.reshape(microbatches, -1, x.shape[-1]), batch)

  def put(self, batch: Batch) -> Batch:
    """Returns `split` rows as global arrays."""
    return put_batch(self.mesh, batch, ("microbatch",))

  def start(self, loader: TrainLoader) -> Start:
    """Returns the newest whole checkpoint and sets the loader to it, or a fresh state.

    Raises:
      CheckpointError: there are checkpoints, and none is whole.
      ConfigError: see `checkpoint.check_resumable` and `saved_model.load_source`.
      DataError: the corpus is not the checkpoint's.
    """
    restored = self.restore()
    if restored is not None:
      loader.set_state(restored.data)
      return Start(restored.state, restored.progress, self._recorded_origin())
    given, origin, model_folder = load_source(
      self.config,
      self.corpus.tokenizer.to_json(),
      self.programs.shardings.params,
      self.mesh,
    )
    if given:
      self.model_folder = model_folder
    return Start(self.initial_state(given), None, origin)

  def _recorded_origin(self) -> dict[str, Any]:
    """Returns the origin of the parameters that the run folder records."""
    facts = run_folder.read(self.workdir, run_folder.RUN)
    if facts is None:
      return dict.fromkeys(SOURCES)
    try:  # Older runs have no `start_from`.
      return {name: facts.get(name) for name in SOURCES} | {
        "trunk_from": facts["trunk_from"]
      }
    except (LookupError, TypeError, AttributeError) as error:
      raise ConfigError(
        f"{self.workdir / run_folder.RUN} must be what training wrote "
        f"({type(error).__name__}: {error}); remove it to continue, and the record of "
        "where the parameters are from is lost."
      ) from error

  def initial_state(self, given: dict[str, Any]) -> TrainState:
    """Returns the state before the first step, with given parts of its parameters.

    What is given is not initialised: there is never a second copy of it.
    """
    shardings, seed = self.programs.shardings, np.int32(self.config.seed)

    def without(state: TrainState) -> TrainState:
      kept = {name: x for name, x in state.params.items() if name not in given}
      return state.replace(params=kept)

    # Inlined in another program, what is not kept is never computed.
    init = self.programs.init if not given else jax.jit(
      lambda seed: without(self.programs.init.__wrapped__(seed)),
      out_shardings=without(shardings),
    )
    state = init(seed)
    params = state.params | given
    if "mtp" not in given:
      params = on_trunk(params, self.config, shardings.params, self._draft_tokens())
    return state.replace(params=params)

  def _draft_tokens(self) -> np.ndarray | None:
    """Returns the tokens that a new drafter can draft, None where every one can."""
    size = self.config.mtp.draft_vocab
    if not size:
      return None
    vocab_size = self.config.tokenizer.vocab_size
    return most_frequent(token_counts(self.corpus.train_rows(1), vocab_size), size)

  def restore(self, step: int | None = None) -> Restored | None:
    """Returns a checkpoint on this run's mesh; see `Checkpointer.restore`."""
    abstract = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      jax.eval_shape(self.programs.init, np.int32(0)),
      self.programs.shardings,
    )
    return self.checkpointer.restore(abstract, self.config, step)

  def save(
    self,
    state: TrainState,
    data: dict[str, Any],
    progress: dict[str, Any],
    replaces: bool = False,
  ) -> None:
    """Starts saving; see `Checkpointer.save`."""
    self.checkpointer.save(
      state, self.config, self.corpus.tokenizer.to_json(), data, progress,
      self.model_folder, replaces,
    )

  def claim(
    self, config: Config, origin: dict[str, Any], num_packed: int = 1
  ) -> None:
    """Makes the folder the folder of this run, when nothing is left but to train.

    Args:
      config: as given, not resolved.
      origin: see `Start`.
      num_packed: runs that are trained in one program.
    """
    if jax.process_index() != 0:
      return
    # The config names the tokenizer, which must be there before it.
    self.workdir.mkdir(parents=True, exist_ok=True)
    save_tokenizer(self.corpus.tokenizer, self.workdir / run_folder.TOKENIZER)
    run_folder.write_config(self.workdir, config)
    if self.model_folder is not None:
      run_folder.write(self.workdir, run_folder.MODEL_FOLDER, self.model_folder)
    counts = dataclasses.asdict(accounting.count(program_config(self.config)))
    flops = counts.pop("train_flops_per_token")
    facts = {
      "parameters": counts,
      "train_flops_per_token": flops,
      "tokens_per_step": self.tokens_per_step,
      "num_steps": self.config.train.num_steps,
      "seq_len": self.config.data.seq_len,
      "packed": num_packed,
      "hardware": hardware(),
      "versions": versions(_PACKAGES),
      "commit": code_commit(),
      "data": self.corpus.stats,
    }
    run_folder.write(self.workdir, run_folder.RUN, facts | origin)

  def describe_data(self) -> str:
    """Returns one line on what is trained on, and on held-out text from elsewhere."""
    if isinstance(self.corpus, TaskCorpus):
      return self.corpus.describe()
    stats, data = self.corpus.stats, self.config.data
    text = describe(stats)
    if stats["is_cut"]:
      held_out = ", ".join(
        f"{fraction:.3g} for {name}"
        for name, fraction in (
          ("validation", data.validation_fraction), ("test", data.test_fraction)
        )
        if fraction
      )
      cut = [x["where"] for x in stats.get("parts", ()) if x["is_cut"]]
      which = f" in {', '.join(cut)}" if cut else ""
      text += (
        f"; too few{which} to be split whole, so the end of each is held out "
        f"({held_out} of the text, after a gap of {data.seq_len} tokens)"
      )
    if stats["train_on"] is None:
      return text
    return f"{describe(stats['train_on'])}; held out, of {text}"


def _of_split(corpus: Corpus | TaskCorpus, split: str) -> Corpus | TaskCorpus:
  """Returns the corpus with another split for evaluation."""
  limits = dataclasses.replace(corpus.config.eval, split=split)
  return dataclasses.replace(
    corpus, config=dataclasses.replace(corpus.config, eval=limits)
  )
