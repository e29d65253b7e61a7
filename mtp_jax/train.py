"""The training loop: the only place where the parts meet.

    fit -> programs(shape).step -> train_step -> batch_loss -> losses.loss_sums

`fit` trains one run; `fit_pack` several of one shape side by side, in one program.
What a run logs, measures and saves is the same (`_Training`), and so is the loop
(`_train`); what differs is who takes the steps, `_Alone` or `_Packed`.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import platform
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from mtp_jax import accounting, checkpoint, evaluate
from mtp_jax.balancing import violation
from mtp_jax.batch import Batch
from mtp_jax.checkpoint import Checkpointer, CheckpointError, Restored
from mtp_jax.config import (
  Config,
  ConfigError,
  difference,
  to_dict,
)
from mtp_jax.config_rules import validate
from mtp_jax.data.pipeline import Corpus, TrainLoader, load_corpus, token_counts
from mtp_jax.data.sources import describe
from mtp_jax.data.tasks.corpus import TaskCorpus
from mtp_jax.data.tokenizers import (
  IN_RUN,
  Tokenizer,
  in_run,
  save_tokenizer,
)
from mtp_jax.environment import code_commit, hardware
from mtp_jax.files import is_begun
from mtp_jax.lm import on_trunk
from mtp_jax.metrics import (
  MetricsWriter,
  Progress,
  model_flop_utilisation,
  plain,
  write_json,
)
from mtp_jax.pack import Pack
from mtp_jax.predictors.vocabulary import most_frequent
from mtp_jax.program import program_config
from mtp_jax.saved_model import SOURCES, check_source, load_source
from mtp_jax.sharding import (
  make_mesh,
  max_over_processes,
  put_batch,
  replicated,
  row_share,
)
from mtp_jax.stopwatch import Stopwatch
from mtp_jax.train_state import Hyperparameters, TrainState, hyperparameters
from mtp_jax.train_step import Programs, compiled, programs

# What an imported model had besides weights, in a run folder.
_MODEL_FOLDER = "model_folder.json"


class Interrupted(Exception):
  """SIGTERM or SIGINT arrived; everything is saved. `signum` says which."""

  def __init__(self, signum: int, step: int):
    where = f"at step {step}; checkpoint saved" if step else "before the first step"
    super().__init__(f"{signal.Signals(signum).name} {where}")
    self.signum = signum


class Diverged(RuntimeError):
  """Too many steps in a row had a loss or gradient that was not finite."""


class Observer:
  """What `fit` tells while it works, in every process; does nothing by itself."""

  def pauses(self, activity: str) -> None:
    """No step will end for a while: starting, compiling or evaluating."""

  def stepped(self, step: int) -> None:
    """The step before `step` has ended, and `step` is on its way."""

  def logged(self, record: dict[str, Any]) -> None:
    """A `train` record of metrics.jsonl."""


def fit(
  config: Config,
  workdir: Path,
  *,
  progress: bool = True,
  observer: Observer | None = None,
  startup: Stopwatch | None = None,
) -> dict[str, Any]:
  """Trains, evaluates and fills the run folder; continues whatever it finds there.

  A run that is done is left as it is, unless a value differs that may (`finished`).

  Several processes that called `jax.distributed.initialize` train together: all call
  this with the same config and a folder that they share.

  Args:
    config: see `config_rules.validate`; arm `flops` is resolved here.
    workdir: the run folder (its contract is in launch/README.md).
    progress: show a bar or lines.
    observer: is told how far it is.
    startup: what a command has measured before; by default, time begins here.

  Returns:
    What is in eval.json.

  Raises:
    ConfigError: the config cannot work, or the folder holds another run.
    DataError: the corpus cannot be used, or is not that of the run.
    CheckpointError: no checkpoint of the folder is whole, or none of the run that this
      one is to begin with; or one cannot be written.
    Diverged: see `train.max_nonfinite_steps`.
    Interrupted: on SIGTERM or SIGINT, after a checkpoint was saved; in all processes if
      one had a signal.
  """
  startup = startup or Stopwatch()
  validate(config, jax.device_count(), jax.default_backend())
  if result := finished(config, Path(workdir)):
    loss, where = result["main_loss"]["mean"], Path(workdir) / "eval.json"
    bar = Progress(config.name, result["step"], enabled=progress)
    bar.say(f"done before: main loss {loss:.4f} nats per token, see {where}")
    return result
  with contextlib.ExitStack() as stack:
    interrupt, clock = stack.enter_context(_Interrupt()), _Clock()
    training, state = _open(
      stack, config, Path(workdir), observer or Observer(), clock, startup,
      progress=progress,
    )
    alone = _Alone(training, state)
    with jax.set_mesh(training.run.mesh):
      _train(alone, clock, startup, interrupt)
    return training.finish(alone.state(training), interrupt)


def fit_pack(
  configs: Sequence[Config],
  workdirs: Sequence[Path],
  *,
  size: int | None = None,
  observers: Sequence[Observer] | None = None,
) -> list[dict[str, Any] | Exception]:
  """Trains runs of one shape side by side, by one program; else as `fit`.

  Every run has its own folder and ends by itself: in its evaluation, which comes when
  all are trained, or in an error that does not disturb the others. All devices are
  used, each with a share of the runs; what is done for one run alone is done on the
  first of them.

  Args:
    configs: of equal `program_config`, each for a mesh of one device.
    workdirs: their run folders.
    size: runs that the program is made for, by default as many as there are: the same
      one serves packs that are smaller.
    observers: one for each.

  Returns:
    For each run what `fit` returns, or what it raises. After SIGTERM or SIGINT that is
    `Interrupted` for those that were not done.

  Raises:
    ConfigError: the runs cannot be trained together.
  """
  if jax.process_count() > 1:
    raise ConfigError(
      f"a pack is trained by one process, got {jax.process_count()}."
    )
  for config in configs:
    validate(config, 1, jax.default_backend())
  first, *others = (program_config(accounting.resolve(config)) for config in configs)
  for other in others:
    if keys := difference(first, other):
      raise ConfigError(
        "runs of a pack must have one shape, but these keys differ: "
        f"{', '.join(sorted(keys))}."
      )
  startup, clock, devices = Stopwatch(), _Clock(), jax.devices()
  with contextlib.ExitStack() as stack:
    interrupt = stack.enter_context(_Interrupt())

    def start(config: Config, workdir: Path, observer: Observer) -> Any:
      if result := finished(config, Path(workdir)):
        return result
      training, state = _open(
        stack, config, Path(workdir), observer, clock, startup, devices=devices[:1],
        num_packed=len(configs),
      )
      return training, jax.device_get(state)  # The device has one of them at a time.

    observers = observers or [Observer() for _ in configs]
    opened = [
      _outcome(functools.partial(start, *run))
      for run in zip(configs, workdirs, observers, strict=True)
    ]
    started = [x for x in opened if isinstance(x, tuple)]
    if not started:
      return opened
    trainings, states = zip(*started, strict=True)
    packed = _Packed(trainings, states, size or len(configs), devices)
    with jax.set_mesh(trainings[0].run.mesh):
      _train(packed, clock, startup, interrupt)
    return [
      packed.finish(x[0], interrupt) if isinstance(x, tuple) else x for x in opened
    ]


def finished(config: Config, workdir: Path) -> dict[str, Any] | None:
  """Returns eval.json of a run that is done under this very config, else None.

  Raises:
    ConfigError: config.json or eval.json of a run that is done cannot be read.
  """
  if not (workdir / "DONE").is_file():
    return None
  if checkpoint.read_config(workdir) != _self_contained(config):
    return None
  path = workdir / "eval.json"
  try:
    result = json.loads(path.read_text())
    result["main_loss"]["mean"], result["step"]  # What every reader needs.
    return result
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise ConfigError(
      f"{path} must be what training wrote ({type(error).__name__}: {error}); remove "
      f"{workdir / 'DONE'} to evaluate again."
    ) from error


def start_run(
  config: Config,
  workdir: Path,
  load_params: Callable[[jax.sharding.Mesh], Any],
  tokenizer: Tokenizer | None = None,
  model_folder: dict[str, Any] | None = None,
) -> None:
  """Fills a new run folder with a checkpoint of step 0 that has given parameters.

  `fit` goes on from it. Subtrees that are not given are initialised as always.

  Args:
    config: of the run, see `fit`.
    workdir: a folder without a run.
    load_params: mesh -> the given subtrees of the parameters by top-level name, in the
      layout of the mesh.
    tokenizer: takes the place of what `tokenizer.path` names.
    model_folder: what the model had besides weights; see `interop.model_files`.

  Raises:
    ConfigError: the config cannot work, or the folder holds a run.
    DataError: the corpus cannot be used.
    CheckpointError: the checkpoint could not be written.
  """
  validate(config, jax.device_count(), jax.default_backend())
  for name in SOURCES:
    if value := getattr(config.train, name):
      raise ConfigError(
        f"train.{name} must be '' where the weights come from elsewhere, got {value!r}."
      )
  workdir = Path(workdir)
  if (workdir / "config.json").exists():
    raise ConfigError(f"{workdir} holds a run already; name a new folder.")
  given = load_params(make_mesh(config.mesh))  # Nothing is written if this fails.
  run = _Run(accounting.resolve(config), workdir, tokenizer=tokenizer)
  run.model_folder = model_folder
  with contextlib.ExitStack() as stack:
    stack.callback(run.checkpointer.close)
    loader = run.loader()
    stack.callback(loader.close)
    with jax.set_mesh(run.mesh):
      run.save(run.initial_state(given), loader.get_state(), _NO_PROGRESS)
    run.checkpointer.wait()
    _claim(workdir, config, run.corpus.tokenizer)
    _write_run_json(run, dict.fromkeys(SOURCES))


def evaluate_run(
  config: Config, workdir: Path, step: int | None = None
) -> dict[str, Any]:
  """Evaluates a checkpoint of a run folder, as `fit` does at its end.

  Writes nothing. `config` may differ from the run's own where
  `checkpoint.RESUMABLE` says: what is evaluated, and on which mesh. The rows of
  training need not divide over it, those of the evaluation must. `step` names the
  checkpoint; None is the newest whole one.

  Raises:
    ConfigError: the config cannot work, or the folder holds another run.
    CheckpointError: the folder has no such whole checkpoint.
    DataError: the corpus or tokenizer here is not that of the run.
  """
  validate(config, platform=jax.default_backend())
  run = _Run(accounting.resolve(config), Path(workdir), read_only=True)
  with contextlib.closing(run.checkpointer):
    with jax.set_mesh(run.mesh):
      restored = run.restore(step)
    if restored is None:
      raise CheckpointError(f"no checkpoint in {run.checkpointer.directory}.")
    run.loader().set_state(restored.data)  # Refuses another corpus.
    return plain(_evaluate(run, restored.state, restored.progress))


_ONE_SIGNAL_SECONDS = 5.0
# What a run folder has besides config.json.
_FILES = (
  "run.json", "tokenizer.json", "startup.json", "metrics.jsonl", "eval.json", "DONE"
)

# What a checkpoint holds of `_Training.progress`, before the first step.
_NO_PROGRESS = {"seconds": 0.0, "reached": None}


class _Run:
  """The parts of one run, built once."""

  def __init__(
    self,
    config: Config,
    workdir: Path,
    read_only: bool = False,
    devices: list[jax.Device] | None = None,
    tokenizer: Tokenizer | None = None,
  ):
    """Args:
      config: resolved.
      workdir: the run folder; its own tokenizer, if it has one, is used.
      read_only: nothing is saved.
      devices: of the mesh, by default all.
      tokenizer: takes the place of what `tokenizer.path` names.
    """
    self.config = _self_contained(config)
    self.workdir = workdir
    self.mesh = make_mesh(config.mesh, devices)
    section = in_run(config.tokenizer, workdir)
    self.corpus = load_corpus(dataclasses.replace(config, tokenizer=section), tokenizer)
    # What is measured at a validation, by the kind of its record.
    self.validated = {"validation": self.corpus}
    if config.train.eval_test:
      splits = ("validation", "test")
      self.validated = {split: _of_split(self.corpus, split) for split in splits}
    file = workdir / _MODEL_FOLDER
    self.model_folder = json.loads(file.read_text()) if file.is_file() else None
    self.checkpointer = Checkpointer(workdir, config.checkpoint.keep, read_only)
    self.flops_per_token = accounting.train_flops_per_token(config)
    self.tokens_per_step = config.data.batch_size * config.data.seq_len

  def close(self, kind: type[BaseException] | None, *_: object) -> None:
    """Finishes the save under way, unless a process may be gone that it waits for.

    A save that fails is not to hide the error of a run (a full disk has several), but
    after `Interrupted` all must be saved.
    """
    is_agreed = kind is None or issubclass(kind, (Interrupted, Diverged))
    if is_agreed or jax.process_count() == 1:
      try:
        self.checkpointer.close()
      except CheckpointError as error:
        if kind is None or issubclass(kind, Interrupted):
          raise
        warnings.warn(str(error), stacklevel=2)

  @functools.cached_property
  def programs(self) -> Programs:
    return programs(program_config(self.config), self.mesh)

  @functools.cached_property
  def hyperparameters(self) -> Hyperparameters:
    return jax.device_put(hyperparameters(self.config), replicated(self.mesh))

  def compiled_step(self, state: TrainState, batch: Any) -> Any:
    return compiled(
      self.programs.step, state, batch, self.hyperparameters, np.bool_(True)
    )

  def loader(self) -> TrainLoader:
    data = self.config.data
    index, count = row_share(self.mesh)
    return TrainLoader(
      self.corpus.train_rows(1 + self.config.mtp.depth),
      batch_size=data.batch_size,
      seed=data.seed,
      host_index=index,
      num_hosts=count,
      num_workers=data.num_workers,
    )

  def start(
    self, loader: TrainLoader
  ) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
    """Returns state, `_Training.progress`, and where the parameters are from.

    Restored, `loader` too, or fresh; see `saved_model.load_source` for the last one.
    """
    restored = self.restore()
    if restored is not None:
      loader.set_state(restored.data)
      return restored.state, restored.progress, self._recorded_origin()
    given, origin, model_folder = load_source(
      self.config,
      self.corpus.tokenizer.to_json(),
      self.programs.shardings.params,
      self.mesh,
    )
    if given:
      self.model_folder = model_folder
    return self.initial_state(given), _NO_PROGRESS, origin

  def _recorded_origin(self) -> dict[str, Any]:
    """Returns where the parameters are from, as the run folder says."""
    path = self.workdir / "run.json"
    if not path.is_file():
      return dict.fromkeys(SOURCES)
    try:
      run = json.loads(path.read_text())
      # Older runs have no `start_from`.
      return {name: run.get(name) for name in SOURCES} | {
        "trunk_from": run["trunk_from"]
      }
    except (OSError, ValueError, LookupError, TypeError, AttributeError,
            RecursionError) as error:
      raise ConfigError(
        f"{path} must be what training wrote ({type(error).__name__}: {error}); "
        "without it the run goes on, and where its parameters are from is forgotten."
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
    abstract = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      jax.eval_shape(self.programs.init, np.int32(0)),
      self.programs.shardings,
    )
    return self.checkpointer.restore(abstract, self.config, step)

  def save(
    self, state: TrainState, data: dict[str, Any], progress: dict[str, Any]
  ) -> None:
    self.checkpointer.save(
      state, self.config, self.corpus.tokenizer.to_json(), data, progress,
      self.model_folder,
    )

  def split(self, batch: Batch) -> Batch:
    """Returns rows as [A, B / A, ...] for A microbatches."""
    microbatches = self.config.train.accumulation_steps
    return jax.tree.map(lambda x: x.reshape(microbatches, -1, x.shape[-1]), batch)

  def put(self, batch: Batch) -> Batch:
    """Returns `split` rows as global arrays."""
    return put_batch(self.mesh, self.split(batch), ("microbatch",))

  def likelihood(
    self,
    params: Any,
    corpus: Corpus | TaskCorpus,
    before_batch: Callable[[], None] | None = None,
  ) -> dict[str, Any]:
    """Returns `evaluate.summarize` of the held-out rows."""
    c = self.config
    batches = corpus.eval_batches(1 + c.mtp.depth)
    with jax.set_mesh(self.mesh):
      sums = evaluate.document_sums(
        program_config(c),
        params,
        batches if before_batch is None else _each_after(before_batch, batches),
        corpus.tokenizer.token_bytes_V,
        self.mesh,
      )
    return evaluate.summarize(sums)

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
      text += (
        f"; too few to be split whole, so the end of each is held out ({held_out} of "
        f"the text, after a gap of {data.seq_len} tokens)"
      )
    if stats["train_on"] is None:
      return text
    return f"{describe(stats['train_on'])}; held out, of {text}"

  def generation(
    self, params: Any, before_batch: Callable[[], None] | None = None
  ) -> dict[str, Any]:
    """Returns the part of eval.json that is measured by decoding."""
    c, corpus = self.config, self.corpus
    if isinstance(corpus, TaskCorpus):
      return evaluate.task_metrics(c, params, corpus, before_batch)
    texts = corpus.texts(c.eval.split)
    return evaluate.generative_metrics(
      c, params, corpus.tokenizer, texts, before_batch
    )

  def task_record(self, params: Any, corpus: Corpus | TaskCorpus) -> dict[str, Any]:
    """Returns the metrics of a task for metrics.jsonl; nothing for text."""
    if not isinstance(corpus, TaskCorpus) or not self.config.eval.task_examples:
      return {}
    measured = evaluate.task_metrics(self.config, params, corpus)
    return {
      name: _means(x) for name, x in measured.items() if name.startswith("task_") and x
    }


def _means(value: dict[str, Any] | float) -> Any:
  """Returns the mean of a measure, or of each by name; a plain number as it is."""
  if not isinstance(value, dict):
    return value
  if "mean" in value:
    return value["mean"]
  return {name: _means(x) for name, x in value.items()}


def _of_split(corpus: Corpus | TaskCorpus, split: str) -> Corpus | TaskCorpus:
  """Returns the corpus with another split for evaluation."""
  limits = dataclasses.replace(corpus.config.eval, split=split)
  return dataclasses.replace(
    corpus, config=dataclasses.replace(corpus.config, eval=limits)
  )


class _Clock:
  """Seconds of training; it stands still while anything else is done."""

  def __init__(self):
    self._before, self._since = 0.0, None

  def read(self) -> float:
    running = 0.0 if self._since is None else time.monotonic() - self._since
    return self._before + running

  def start(self) -> None:
    self._since = time.monotonic()

  def stop(self) -> None:
    self._before, self._since = self.read(), None

  @contextlib.contextmanager
  def stopped(self) -> Iterator[None]:
    self.stop()
    try:
      yield
    finally:
      self.start()


class _Training:
  """A run between its start and its evaluation: what it logs, measures and saves, when.

  step: done so far. seconds: of training, when it was last looked at. reached: the
  first of the latest validations in a row at which `train.stop_metric` had its value,
  as in eval.json; its `last_step` is None until training ends for it.
  """

  def __init__(
    self,
    run: _Run,
    loader: TrainLoader,
    writer: MetricsWriter,
    bar: Progress,
    observer: Observer,
    clock: _Clock,
    step: int,
    progress: dict[str, Any],
  ):
    self.run, self.loader, self.observer, self.bar = run, loader, observer, bar
    self.step, self.seconds = step, progress["seconds"]
    self.reached = progress["reached"]
    self._writer, self._clock = writer, clock
    self._earlier_seconds = self.seconds
    self._logged = step, self.seconds

  @property
  def num_steps(self) -> int:
    return self.run.config.train.num_steps

  @property
  def has_steps_left(self) -> bool:
    return self.step < self.num_steps and not _stopped(self.progress)

  @property
  def progress(self) -> dict[str, Any]:
    """What a checkpoint holds beside state and data."""
    return {"seconds": self.seconds, "reached": self.reached}

  @property
  def starts_interval(self) -> bool:
    return self.step % self.run.config.train.log_every == 0

  def _look_at_clock(self) -> None:
    self.seconds = self._earlier_seconds + self._clock.read()

  def diagnose(self, steps: "_Steps") -> None:
    """Logs how the gradients compare before a step, where that is due."""
    every = self.run.config.train.diagnostics_every
    if not (self.run.config.mtp.depth and every) or self.step % every:
      return
    with self._clock.stopped():
      self.observer.pauses("evaluating")
      state, batch = steps.state(self), steps.batch(self)
      self._writer.write(_diagnostics_record(self.run, state, batch, self.step))

  def started(self, startup: Stopwatch) -> None:
    """Says how long it took until the first step of this start had ended."""
    with self._clock.stopped():
      if jax.process_index() == 0:
        write_json(self.run.workdir / "startup.json", startup.record(self.step))
      self.bar.say(startup.describe())

  def stepped(self) -> None:
    """Counts a step that has been started."""
    self.step += 1
    self.bar.advance(self.step)
    self.observer.stepped(self.step)

  def validate(self, steps: "_Steps") -> None:
    """Measures held-out examples after a step, where that is due; may end training."""
    config = self.run.config.train
    every, per_doubling = config.eval_every, config.evals_per_doubling
    is_due = (
      ((every or per_doubling) and not self.has_steps_left)
      or (every and self.step % every == 0)
      or (per_doubling and _is_log_spaced(self.step, per_doubling))
    )
    if not is_due:
      return
    state = jax.block_until_ready(steps.state(self))
    with self._clock.stopped():
      self._look_at_clock()
      self.observer.pauses("evaluating")
      for kind in self.run.validated:
        record = _validation_record(self.run, kind, state, self.step, self.seconds)
        self._writer.write(record)
        if kind == "validation":
          self._look_for_success(record)

  def _look_for_success(self, record: dict[str, Any]) -> None:
    """Ends training if a validation reaches what the one before it reached."""
    metric, wanted = (
      self.run.config.train.stop_metric, self.run.config.train.stop_value
    )
    if not metric:
      return
    value = record["loss"][0] if metric == "loss" else record[metric]
    is_accuracy = metric.startswith("task_")
    if not (value >= wanted if is_accuracy else value <= wanted):
      self.reached = None
    elif self.reached is None:
      named = {"metric": metric, "value": value, "last_step": None}
      self.reached = {key: record[key] for key in ("step", "tokens")} | named
    else:
      self.reached = self.reached | {"last_step": self.step}
      self.bar.ends(self.step)
      first = self.reached["step"]
      self.bar.say(f"{metric} reached {wanted} at steps {first} and {self.step}")

  def log(self, steps: "_Steps") -> None:
    """Logs an interval that ended.

    Raises:
      Diverged: too many steps in a row were not finite.
    """
    if not self.starts_interval and self.has_steps_left:
      return
    report = steps.report(self)
    self._look_at_clock()
    (step, seconds), self._logged = self._logged, (self.step, self.seconds)
    rate = (self.step - step) * self.run.tokens_per_step / (self.seconds - seconds)
    record = _train_record(self.run, self.step, self.seconds, rate, report)
    self._writer.write(record)
    self.observer.logged(record)
    self.bar.report(self.step, record["loss_total"], rate)
    _stop_if_diverged(self.run, report, self.step)

  def keep(self, steps: "_Steps", signum: int | None) -> None:
    """Saves after a step, where that is due.

    Raises:
      Interrupted: `signum` asks for an end; all is saved.
    """
    is_saved = self.step % self.run.config.checkpoint.every_steps == 0
    is_last = not self.has_steps_left
    if not (is_last or signum or is_saved):
      return
    state = jax.block_until_ready(steps.state(self))
    with self._clock.stopped():
      self._look_at_clock()
      # Amid skipped updates nothing is saved unless it must: the newest checkpoint
      # stays one from which training went on.
      if is_last or signum or (is_saved and not state.nonfinite_run):
        self.run.save(state, steps.data_state(self), self.progress)
      if signum:
        self.run.checkpointer.wait()
        raise Interrupted(signum, self.step)

  def stop(self, signum: int) -> None:
    """Raises `Interrupted` before the next step, where there is nothing to save."""
    raise Interrupted(signum, self.step)

  def finish(self, state: TrainState, interrupt: "_Interrupt") -> dict[str, Any]:
    """Evaluates the trained model; writes and returns eval.json.

    Raises:
      Interrupted: a signal asks for an end; nothing of the evaluation is kept.
    """
    run = self.run

    def look() -> None:
      if signum := interrupt.received():
        self.stop(signum)

    self.observer.pauses("evaluating")
    look()
    result = _evaluate(run, state, self.progress, look)
    run.checkpointer.wait()
    look()
    main, error = result["main_loss"].values()
    spread = f"+- {error:.4f} nats per token"
    if np.isnan(error):
      spread = f"nats per token ({evaluate.NO_ERROR})"
    self.bar.say(f"done: main loss {main:.4f} {spread}")
    if jax.process_index() == 0:
      write_json(run.workdir / "eval.json", result)
      (run.workdir / "DONE").write_text("")
    return plain(result)


def _open(
  stack: contextlib.ExitStack,
  config: Config,
  workdir: Path,
  observer: Observer,
  clock: _Clock,
  startup: Stopwatch,
  progress: bool = False,
  devices: list[jax.Device] | None = None,
  num_packed: int = 1,
) -> tuple[_Training, TrainState]:
  """Starts a run or goes on with it; what is to be closed goes on the stack."""
  observer.pauses("starting")
  check_source(config, workdir)
  _check_claimed(workdir, config)
  startup.ends("devices")
  run = _Run(accounting.resolve(config), workdir, devices=devices)
  stack.push(run.close)
  loader = run.loader()
  stack.callback(loader.close)
  startup.ends("data")
  with jax.set_mesh(run.mesh):
    state, done, origin = run.start(loader)
  # Nothing is left but to train.
  _claim(workdir, config, run.corpus.tokenizer)
  _write_run_json(run, origin, num_packed)
  step = int(state.step)
  writer = stack.enter_context(MetricsWriter(workdir, step))
  bar = Progress(config.name, run.config.train.num_steps, enabled=progress)
  stack.callback(bar.close)
  bar.say(run.describe_data())
  if step:
    bar.say(f"resumed at step {step}")
  startup.ends("state")
  return _Training(run, loader, writer, bar, observer, clock, step, done), state


class _Steps(Protocol):
  """Takes the steps of the runs in `_train`."""

  def active(self) -> list[_Training]:
    """Returns the runs that go on."""

  def attempt(self, training: _Training, part: Callable[..., None], *args: Any) -> None:
    """Does what one of the runs has to do between steps."""

  def prepare(self) -> None:
    """Takes the first batch and compiles."""

  def advance(self, is_last: bool) -> Any:
    """Starts a step, then prepares the next batch; returns what to wait for."""

  def state(self, training: _Training) -> TrainState:
    """Returns the state of a run, on its own mesh."""

  def batch(self, training: _Training) -> Batch:
    """Returns what the next step of a run is taken on, on its own mesh."""

  def report(self, training: _Training) -> dict[str, Any]:
    """Returns the report of the last step; waits for it."""

  def data_state(self, training: _Training) -> dict[str, Any]:
    """Returns the state of the data iterator after the batch of the last step."""


class _Alone(_Steps):
  """One run; what goes wrong in it is raised."""

  def __init__(self, training: _Training, state: TrainState):
    self._training, self._state = training, state
    self._batch = self._data_state = self._program = self._report = None

  def active(self) -> list[_Training]:
    return [self._training] if self._training.has_steps_left else []

  def attempt(self, training: _Training, part: Callable[..., None], *args: Any) -> None:
    part(*args)

  def prepare(self) -> None:
    self._load()
    self._program = self._training.run.compiled_step(self._state, self._batch)

  def advance(self, is_last: bool) -> Any:
    starts_interval = np.bool_(self._training.starts_interval)
    self._state, self._report = self._program(
      self._state, self._batch, self._training.run.hyperparameters, starts_interval
    )
    self._data_state = self._training.loader.get_state()
    if not is_last:
      self._load()
    return self._report["loss_total"]

  def _load(self) -> None:
    self._batch = self._training.run.put(next(self._training.loader))

  def state(self, training: _Training) -> TrainState:
    return self._state

  def batch(self, training: _Training) -> Batch:
    return self._batch

  def report(self, training: _Training) -> dict[str, Any]:
    return jax.device_get(self._report)

  def data_state(self, training: _Training) -> dict[str, Any]:
    return self._data_state


class _Packed(_Steps):
  """Several runs of one shape; what goes wrong in one is noted, the others go on.

  Runs that read the same rows in the same order share one batch. If not all do, as
  where some went on from another step, each has its own.
  """

  def __init__(
    self,
    trainings: Sequence[_Training],
    states: Sequence[TrainState],
    size: int,
    devices: Sequence[jax.Device],
  ):
    self._trainings = list(trainings)
    self._errors: dict[_Training, Exception] = {}
    configs = [training.run.config for training in trainings]
    hypers = [hyperparameters(config) for config in configs]
    self._pack = Pack(program_config(configs[0]), states, hypers, size, devices)
    active = self.active()
    read = [training.loader.get_state() for training in active]
    shares = all(x == read[0] for x in read)
    # Who reads the rows of whom, the rows, and the readers' states before those.
    self._reader = {t: active[0] if shares else t for t in active}
    self._rows: dict[_Training, Batch] = {}
    self._data_states: dict[_Training, dict[str, Any]] = {}
    self._batch = None

  def active(self) -> list[_Training]:
    return [t for t in self._trainings if t.has_steps_left and t not in self._errors]

  def attempt(self, training: _Training, part: Callable[..., None], *args: Any) -> None:
    if training in self._errors:
      return
    try:
      part(*args)
    except Exception as error:
      self._errors[training] = error

  def prepare(self) -> None:
    self._load()
    self._pack.compile(self._batch)

  def advance(self, is_last: bool) -> Any:
    active, index = self.active(), self._trainings.index
    current = self._pack.step(
      self._batch, {index(t): t.starts_interval for t in active}
    )
    self._data_states = {
      reader: reader.loader.get_state() for reader in self._reader.values()
    }
    if not is_last:
      self._load()
    return current

  def _load(self) -> None:
    readers = dict.fromkeys(self._reader[training] for training in self.active())
    self._rows |= {t: t.run.split(next(t.loader)) for t in readers}
    rows = list(self._rows.values())
    if len(set(self._reader.values())) > 1:
      # Of a run without steps left the rows do not count.
      rows = [self._rows.get(t, rows[0]) for t in self._trainings]
    self._batch = self._pack.put(rows)

  def state(self, training: _Training) -> TrainState:
    state = self._pack.state(self._trainings.index(training))
    return jax.device_put(state, training.run.programs.shardings)

  def batch(self, training: _Training) -> Batch:
    return training.run.put(self._rows[self._reader[training]])

  def report(self, training: _Training) -> dict[str, Any]:
    return self._pack.report(self._trainings.index(training))

  def data_state(self, training: _Training) -> dict[str, Any]:
    return self._data_states[self._reader[training]]

  def finish(
    self, training: _Training, interrupt: "_Interrupt"
  ) -> dict[str, Any] | Exception:
    """Returns what became of a run, evaluated if it was trained to its end."""
    if training in self._errors:
      return self._errors[training]
    return _outcome(lambda: training.finish(self.state(training), interrupt))


def _outcome(work: Callable[[], Any]) -> Any:
  """Returns what `work` returns, or raises."""
  try:
    return work()
  except Exception as error:
    return error


def _train(
  steps: _Steps, clock: _Clock, startup: Stopwatch, interrupt: "_Interrupt"
) -> None:
  """Runs the remaining steps of one run, or of several side by side."""
  def look() -> list[_Training]:
    if signum := interrupt.received():
      for training in steps.active():
        steps.attempt(training, training.stop, signum)
    return steps.active()

  active = look()
  if not active:
    return
  for training in active:
    training.observer.pauses("compiling")
  steps.prepare()
  startup.ends("compile")
  active = look()
  for training in active:
    training.bar.start(training.step)
  clock.start()
  previous = None
  while active:
    for training in active:
      steps.attempt(training, training.diagnose, steps)
    if previous is None:
      startup.ends("diagnostics")
    is_last = all(training.step + 1 == training.num_steps for training in active)
    # The device works on this step while the host prepares the next batch; waiting for
    # the step before it bounds the queue, so that a signal is answered at once.
    current = steps.advance(is_last)
    if previous is None:
      jax.block_until_ready(current)
      startup.ends("first step")
      for training in active:
        steps.attempt(training, training.started, startup)
    jax.block_until_ready(previous)
    previous = current
    for training in active:
      training.stepped()
    for training in active:
      steps.attempt(training, training.validate, steps)
    for training in active:
      steps.attempt(training, training.log, steps)
    signum = interrupt.received()
    for training in active:
      steps.attempt(training, training.keep, steps, signum)
    active = steps.active()
  clock.stop()


def _train_record(
  run: _Run, step: int, seconds: float, rate: float, report: dict[str, Any]
) -> dict[str, Any]:
  """Returns the log line of the interval that ended at `step`: means over its steps.

  `loss_total` is the sum of `weighted_loss`, whose entries are the weight of a depth
  times what it minimises, averaged over the steps; the averages of weights and of
  cross-entropies stand beside it. Steps whose update was skipped do not count; a mean
  over nothing is NaN, and null in the file.
  """
  with np.errstate(invalid="ignore", divide="ignore"):
    mean = {
      name: report[name] / np.float32(report["steps"])
      for name in ("loss_total", "weighted_loss_M", "weight_M", "grad_norm")
    }
    has_targets = report["count_M"] > 0
    loss = np.where(has_targets, report["loss_M"] / np.float32(report["steps"]), np.nan)
    accuracy = report["correct_M"] / report["count_M"]
  return {
    "kind": "train",
    "step": step,
    "tokens": step * run.tokens_per_step,
    "seconds": seconds,
    "loss_total": mean["loss_total"],
    "loss": loss,
    "weighted_loss": mean["weighted_loss_M"],
    "weight": mean["weight_M"],
    "accuracy": accuracy,
    "count": report["count_M"],
    "lambda": report["lambda"],
    "learning_rate": report["learning_rate"],
    "grad_norm": mean["grad_norm"],
    "tokens_per_second": rate,
    "mfu": model_flop_utilisation(run.flops_per_token, rate),
    "nonfinite_steps": report["nonfinite_total"],
  } | _expert_record(report)


def _expert_record(report: dict[str, Any]) -> dict[str, Any]:
  """Returns what a log line says about experts; nothing of a dense model.

  `load` is each expert's share of the choices of its layer.
  """
  if not report["load"]:
    return {}
  loads = report["load"].items()
  with np.errstate(invalid="ignore", divide="ignore"):
    share = {part: x / np.sum(x, axis=-1, keepdims=True) for part, x in loads}
    balance = report["balance_loss"] / np.float32(report["steps"])
  return {
    "balance_loss": balance,
    "dropped": report["dropped"],
    "load": share,
    "violation": {part: np.mean(violation(x)) for part, x in loads},
  }


def _diagnostics_record(
  run: _Run, state: TrainState, batch: Any, step: int
) -> dict[str, Any]:
  measured = run.programs.diagnostics(
    state.params, batch, run.hyperparameters, state.step
  )
  return {"kind": "diagnostics", "step": step} | jax.device_get(measured)


def _is_log_spaced(step: int, per_doubling: int) -> bool:
  """Whether `step` is round(2^(j / per_doubling)) for a whole j."""
  below = int(per_doubling * math.log2(step))
  near = (round(2 ** (j / per_doubling)) for j in (below, below + 1))
  return step in near


def _stopped(progress: dict[str, Any]) -> dict[str, Any] | None:
  """Returns the success that ended training; None if it ends after its last step."""
  reached = progress["reached"]
  return reached if reached and reached["last_step"] else None


def _validation_record(
  run: _Run, kind: str, state: TrainState, step: int, seconds: float
) -> dict[str, Any]:
  corpus = run.validated[kind]
  summary = run.likelihood(state.params, corpus)
  return {
    "kind": kind,
    "step": step,
    "tokens": step * run.tokens_per_step,
    "seconds": seconds,
    "loss": [x["mean"] for x in summary["depth_loss"]],
    "bits_per_byte": summary["bits_per_byte"]["mean"],
  } | run.task_record(state.params, corpus)


def _stop_if_diverged(run: _Run, report: dict[str, Any], step: int) -> None:
  limit = run.config.train.max_nonfinite_steps
  if report["longest_nonfinite_run"] < limit:
    return
  run.checkpointer.wait()
  saved = run.checkpointer.steps()
  where = run.checkpointer.directory / str(saved[-1]) if saved else "none was saved yet"
  raise Diverged(
    f"loss or gradient was not finite for {int(report['longest_nonfinite_run'])} steps "
    f"in a row (train.max_nonfinite_steps = {limit}) before step {step}. Their updates "
    f"were skipped. Last good checkpoint: {where}. Lower optimizer.learning_rate "
    f"({run.config.optimizer.learning_rate}) or look at the data."
  )


def _evaluate(
  run: _Run,
  state: TrainState,
  progress: dict[str, Any],
  before_batch: Callable[[], None] | None = None,
) -> dict[str, Any]:
  """Returns eval.json: see `evaluate` for the definitions."""
  step = int(state.step)
  tokens = step * run.tokens_per_step
  split = run.config.eval.split
  return {
    "step": step,
    "tokens": tokens,
    "train_seconds": progress["seconds"],
    "train_flops": tokens * run.flops_per_token,
    "stopped": _stopped(progress),
    "split": split,
    **run.likelihood(state.params, run.corpus, before_batch),
    **run.generation(state.params, before_batch),
  }


def _each_after(work: Callable[[], None], batches: Iterator[Any]) -> Iterator[Any]:
  """Yields the batches, each when `work` is done."""
  for batch in batches:
    work()
    yield batch


def _check_claimed(workdir: Path, config: Config) -> None:
  """Checks that a run folder holds this very run, or none."""
  for name in ("config.json", *_FILES):
    if (workdir / name).is_dir():
      raise ConfigError(
        f"{workdir / name} must be a file that training writes, and is a folder."
      )
  for name in ("checkpoints", "tensorboard"):
    if (workdir / name).is_file():
      raise ConfigError(
        f"{workdir / name} must be a folder that training fills, and is a file."
      )
  if (workdir / "config.json").exists():
    saved = checkpoint.read_config(workdir)
    if is_begun(workdir):
      checkpoint.check_resumable(saved, config)


def _claim(workdir: Path, config: Config, tokenizer: Tokenizer) -> None:
  """Makes a folder that of this run; the folder gets a tokenizer of its own."""
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    if config.tokenizer.kind == "file" and not (workdir / IN_RUN).is_file():
      save_tokenizer(tokenizer, workdir / IN_RUN)
    write_json(workdir / "config.json", to_dict(_self_contained(config)))


def _self_contained(config: Config) -> Config:
  """Returns the config as a run folder has it: with its own tokenizer."""
  if config.tokenizer.kind != "file":
    return config
  tokenizer = dataclasses.replace(config.tokenizer, path=IN_RUN)
  return dataclasses.replace(config, tokenizer=tokenizer)


def _write_run_json(
  run: _Run, origin: dict[str, Any], num_packed: int = 1
) -> None:
  if jax.process_index() != 0:
    return
  counts = dataclasses.asdict(accounting.count(program_config(run.config)))
  flops = counts.pop("train_flops_per_token")
  save_tokenizer(run.corpus.tokenizer, run.workdir / IN_RUN)
  if run.model_folder is not None:
    write_json(run.workdir / _MODEL_FOLDER, run.model_folder)
  packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
  write_json(
    run.workdir / "run.json",
    {
      "parameters": counts,
      "train_flops_per_token": flops,
      "tokens_per_step": run.tokens_per_step,
      "num_steps": run.config.train.num_steps,
      "seq_len": run.config.data.seq_len,
      "packed": num_packed,
      "hardware": hardware(),
      "versions": {"python": platform.python_version()}
      | {name: importlib.metadata.version(name) for name in packages},
      "commit": code_commit(),
      "data": run.corpus.stats,
    }
    | origin,
  )


class _Interrupt:
  """Notes SIGTERM and SIGINT while it is entered; a second one acts as it always did.

  The handler only sets a flag, which is looked at between batches. An exception would
  be lost where the signal hits amid a callback, as that of JAX to the garbage
  collector. A cluster may send SIGTERM by several ways at once: that is one signal.
  Outside the main thread nothing can be caught, and nothing is.

  Processes that train together tell each other: all must ask at the same places, and
  all get the same answer. A signal of one reaches the others with the answer after the
  next, so that nobody waits for it. (JAX's own preemption service is not asked: Orbax
  reports the steps of its saves to it from another thread, and then processes may stop
  at different steps. It must be off, or SIGTERM would not reach Python.)
  """

  def __init__(self):
    self._received: int | None = None
    self._received_at = 0.0
    self._told: jax.Array | None = None
    self._old: dict[int, Any] = {}

  def received(self) -> int | None:
    """Returns the signal that asks for an end, if there is one."""
    if jax.process_count() == 1:
      return self._received
    told, self._told = self._told, max_over_processes(self._received or 0)
    return None if told is None else int(told) or None

  def __enter__(self) -> "_Interrupt":
    if threading.current_thread() is threading.main_thread():
      for signum in (signal.SIGTERM, signal.SIGINT):
        # None stands for a handler that is not Python's.
        self._old[signum] = signal.signal(signum, self._handle) or signal.SIG_DFL
    return self

  def __exit__(self, *_: object) -> None:
    for signum, handler in self._old.items():
      signal.signal(signum, handler)

  def _handle(self, signum: int, _: Any) -> None:
    now = time.monotonic()
    if self._received is None:
      self._received, self._received_at = signum, now
    elif signum == signal.SIGINT or now - self._received_at > _ONE_SIGNAL_SECONDS:
      signal.signal(signum, self._old[signum])
      signal.raise_signal(signum)
