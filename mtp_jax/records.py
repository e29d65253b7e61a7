"""What a run measures and writes: log lines, validations, and the final evaluation."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from mtp_jax import evaluate, executables, generative_metrics
from mtp_jax.balancing import violation
from mtp_jax.batch import Batch
from mtp_jax.data.pipeline import Corpus
from mtp_jax.data.tasks.corpus import TaskCorpus
from mtp_jax.decode.generate import generate
from mtp_jax.layouts import abstract_batch
from mtp_jax.metrics import model_flop_utilisation
from mtp_jax.predictors import tokens_after_row
from mtp_jax.program import program_config
from mtp_jax.run import Run
from mtp_jax.train_state import TrainState


class Measures(NamedTuple):
  """Measures of one state on held-out examples.

  likelihood: see `evaluate.summarize`.
  task: see `generative_metrics.task_metrics`; None for text, or if none is asked for.
  """

  likelihood: dict[str, Any]
  task: dict[str, Any] | None


def compile_ahead(run: Run, state: TrainState, batch: Batch) -> None:
  """Begins to compile what `run` calls later; the step has these arguments too.

  Not on a GPU: there XLA tries out kernels, on the device that trains.
  """
  if run.mesh.devices.flat[0].platform == "gpu":
    return
  config, program = run.config, program_config(run.config)

  def shapes(tree: Any) -> Any:
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )

  if config.mtp.depth and 0 < config.train.diagnostics_every < config.train.num_steps:
    inputs = (state.params, batch, run.hyperparameters, state.step)
    executables.compile_ahead(run.programs.diagnostics, *shapes(inputs))
  params, corpus = shapes(state.params), run.corpus
  executables.compile_ahead(
    evaluate.row_sums_program(program, run.mesh),
    params,
    abstract_batch(program, run.mesh, config.eval.batch_size, corpus.has_unscored),
    jax.ShapeDtypeStruct((config.tokenizer.vocab_size,), np.int32),
  )

  def compile_decoding() -> None:
    with _mesh_of_decoding(run):
      generative_metrics.compile_decoding(config, params, corpus)

  executables.ahead(generate, compile_decoding)


def measure(
  run: Run,
  params: Any,
  corpus: Corpus | TaskCorpus,
  before_batch: Callable[[], None] | None = None,
) -> Measures:
  """Measures what a validation has; `before_batch` may raise to end the call."""
  task = None
  likelihood = likelihood_of(run, params, corpus, before_batch)
  if isinstance(corpus, TaskCorpus) and run.config.eval.task_examples:
    with _mesh_of_decoding(run):
      task = generative_metrics.task_metrics(run.config, params, corpus, before_batch)
  return Measures(likelihood, task)


def likelihood_of(
  run: Run,
  params: Any,
  corpus: Corpus | TaskCorpus,
  before_batch: Callable[[], None] | None = None,
) -> dict[str, Any]:
  """Returns `evaluate.summarize` of the held-out rows of a corpus."""
  batches = corpus.eval_batches(tokens_after_row(run.config.mtp))
  with jax.set_mesh(run.mesh):
    sums = evaluate.document_sums(
      program_config(run.config),
      params,
      batches if before_batch is None else _each_after(before_batch, batches),
      corpus.tokenizer.token_bytes_V,
      run.mesh,
    )
  return evaluate.summarize(sums)


def validation_record(
  run: Run, kind: str, measures: Measures, step: int, seconds: float
) -> dict[str, Any]:
  """Returns the record of a validation; `kind` is validation or test."""
  likelihood, task = measures
  return {
    "kind": kind,
    "step": step,
    "tokens": step * run.tokens_per_step,
    "seconds": seconds,
    "loss": [x["mean"] for x in likelihood["depth_loss"]],
    "bits_per_byte": likelihood["bits_per_byte"]["mean"],
  } | {
    name: _means(x)
    for name, x in (task or {}).items()
    if name.startswith("task_") and x
  }


def final_evaluation(
  run: Run,
  state: TrainState,
  progress: dict[str, Any],
  before_batch: Callable[[], None] | None = None,
  known: Measures | None = None,
) -> dict[str, Any]:
  """Returns eval.json: see `evaluate` and `generative_metrics` for the definitions.

  Args:
    run, state: of what is evaluated.
    progress: see `RunLog`.
    before_batch: called before each batch; may raise to end the call.
    known: what a validation measured of this state, on the split that is evaluated.
  """
  config, corpus, params = run.config, run.corpus, state.params
  step = int(state.step)
  tokens = step * run.tokens_per_step
  if known is None:
    known = Measures(likelihood_of(run, params, corpus, before_batch), None)
  with _mesh_of_decoding(run):
    if isinstance(corpus, TaskCorpus):
      generation = known.task or generative_metrics.task_metrics(
        config, params, corpus, before_batch
      )
    else:
      generation = generative_metrics.text_metrics(
        config, params, corpus.tokenizer, corpus.texts(config.eval.split), before_batch
      )
  return {
    "step": step,
    "tokens": tokens,
    "train_seconds": progress["seconds"],
    "train_flops": tokens * run.flops_per_token,
    "stopped": stopped(progress),
    "split": config.eval.split,
    **known.likelihood,
    **generation,
  }


def _mesh_of_decoding(run: Run) -> contextlib.AbstractContextManager:
  """Returns the mesh context of decoding: tasks are decoded amid training, text not."""
  if isinstance(run.corpus, TaskCorpus):
    return jax.set_mesh(run.mesh)
  return contextlib.nullcontext()


def stopped(progress: dict[str, Any]) -> dict[str, Any] | None:
  """Returns the success that ended training; None if it ends after its last step."""
  reached = progress["reached"]
  return reached if reached and reached["last_step"] else None


def train_record(
  run: Run, step: int, seconds: float, rate: float, report: dict[str, Any]
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
  """Returns the part of a log line about experts; {} for a dense model.

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


def diagnostics_record(
  run: Run, state: TrainState, batch: Batch, step: int
) -> dict[str, Any]:
  """Returns how the gradients compare; see `train_step.gradient_diagnostics`."""
  measured = executables.awaited(run.programs.diagnostics)(
    state.params, batch, run.hyperparameters, state.step
  )
  return {"kind": "diagnostics", "step": step} | jax.device_get(measured)


def _means(value: dict[str, Any] | float) -> Any:
  """Returns the mean of a measure, or of each by name; a plain number as it is."""
  if not isinstance(value, dict):
    return value
  if "mean" in value:
    return value["mean"]
  return {name: _means(x) for name, x in value.items()}


def _each_after(work: Callable[[], None], batches: Iterator[Any]) -> Iterator[Any]:
  """Yields the batches, each when `work` is done."""
  for batch in batches:
    work()
    yield batch
