"""Results folders with planted numbers: what the findings should say is known."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mtp_jax.analysis.claims import kinds as of_kinds
from mtp_jax.analysis.claims.drafters import ARMS, WRITTEN
from mtp_jax.analysis.results import Facts
from mtp_jax.analysis.runs import METRIC_COLUMNS
from mtp_jax.files import write_json

Trial = dict[str, Any]
FACTS = Facts(
  command=("python -m launch.sweep --config=x.py:cpu",),
  commit=("0123abc",),
  hardware=("1 x <chip>",),
  versions=("jax 0.10",),
  seeds=(0, 1, 2),
  finished=3,
  trials=3,
  date="2026-01-02",
)
NTP, TWO, FOUR = ("none", 0), ("parallel", 1), ("parallel", 3)
ONE_MODULE, THREE_MODULES = ("sequential", 1), ("sequential", 3)


def grid(
  methods: Iterable[tuple[str, int]], seeds: Iterable[int], **keys: Iterable[Any]
) -> list[Trial]:
  """Returns one trial for each method, seed and value of the keys (`__` for a dot)."""
  names = [key.replace("__", ".") for key in keys]
  return [
    {"mtp.kind": kind, "mtp.depth": depth, "seed": seed, "data.seed": seed}
    | dict(zip(names, values, strict=True))
    for (kind, depth), seed, *values in itertools.product(
      methods, seeds, *keys.values()
    )
  ]


def write_results(
  folder: Path,
  trials: list[Trial],
  measure: Callable[[Trial, np.random.Generator], dict[tuple[str, int], float]],
  shared: dict[str, Any] | None = None,
  curve: Callable[[Trial, np.random.Generator], Iterable[dict]] | None = None,
) -> Path:
  """Writes the results of trials; `measure` gives {(metric, at_depth): mean}.

  `curve` yields the records of curves.csv; without it there are two of the accuracy.
  """
  folder.mkdir(parents=True)
  rows, metrics, curves = [], [], []
  for index, trial in enumerate(trials):
    rng = np.random.default_rng(index)
    name = f"trial{index}"
    state = {"status": "finished", "step": 10, "size": 1000, "tokens": 100}
    rows.append(
      {"trial": name, "train_flops": 1.0, "train_seconds": 1.0, "data.source": "stdlib"}
      | state | trial
    )
    values = measure(trial, rng)
    metrics += [
      {
        "trial": name, "metric": metric, "at_depth": depth, "mean": mean,
        "stderr": 0.01, "count": 100,
      }
      for (metric, depth), mean in values.items()
    ]
    if curve:
      curves += [
        {"trial": name, "tokens": 10 * x["step"], "bits_per_byte": 1.0} | x
        for x in curve(trial, rng)
      ]
      continue
    accuracy = values.get(("task_accuracy", 0), np.nan)
    curves += [
      {
        "trial": name, "step": step, "tokens": 10 * step, "loss": 1 / step,
        "bits_per_byte": 1.0, "task_accuracy": accuracy * step / 10,
      }
      for step in (5, 10)
    ]
  tables = {
    "trials": pd.DataFrame(rows),
    "metrics": pd.DataFrame(metrics, columns=METRIC_COLUMNS),
    "curves": pd.DataFrame(curves),
  }
  for file, table in tables.items():
    table.to_csv(folder / f"{file}.csv", index=False)
  run = dataclasses.asdict(FACTS) | {"config": shared or {}}
  write_json(folder / "run.json", run)
  return folder


def clipped_texts(figure: Figure) -> list[str]:
  """Returns the titles and axis labels that reach beyond the figure."""
  FigureCanvasAgg(figure).draw()
  inside = figure.bbox.padded(1)
  texts = [x for ax in figure.axes for x in (ax.title, ax.xaxis.label, ax.yaxis.label)]
  boxes = {x.get_text(): x.get_window_extent() for x in texts if x.get_text()}
  return [
    text for text, box in boxes.items()
    if not (inside.contains(*box.min) and inside.contains(*box.max))
  ]


def star_graph(folder: Path) -> Path:
  """NTP at chance, n = 2 solves, n = 4 on half of the seeds, one module on none."""
  methods = (NTP, TWO, FOUR, ONE_MODULE, THREE_MODULES)
  trials = [
    trial | {"task.star_graph.reversed": False} for trial in grid(methods, range(10))
  ]
  trials += [
    trial | {"task.star_graph.reversed": True} for trial in grid([NTP], range(3))
  ]

  def measure(trial: Trial, rng: np.random.Generator) -> dict:
    solves = {
      NTP: trial["task.star_graph.reversed"], TWO: True, FOUR: trial["seed"] % 2 == 0,
      ONE_MODULE: False, THREE_MODULES: True,
    }[trial["mtp.kind"], trial["mtp.depth"]]
    return {("task_accuracy", 0): 0.99 if solves else 0.5 + rng.uniform(-0.05, 0.05)}

  shared = {
    "task.star_graph.arms": 2, "task.star_graph.length": 3, "mtp.fed": "true",
  }
  return write_results(folder, trials, measure, shared)


def task(folder: Path, gain: float, base: float = 0.3, **keys: Iterable[Any]) -> Path:
  """Accuracy that rises by `gain` for each extra token at the least width, if any."""
  trials = grid((NTP, TWO, FOUR), range(3), **keys)

  def measure(trial: Trial, rng: np.random.Generator) -> dict:
    shrink = 16 / trial.get("trunk.embed_dim", 16)
    accuracy = base + 0.02 * trial["seed"] + gain * trial["mtp.depth"] * shrink
    return {("task_accuracy", 0): accuracy + rng.uniform(-0.002, 0.002)}

  return write_results(folder, trials, measure)


def polynomial(folder: Path) -> Path:
  """MTP is better in domain, and so much worse out of it that it is worse overall."""

  def measure(trial: Trial, rng: np.random.Generator) -> dict:
    rises = 0.1 * trial["mtp.depth"] + rng.uniform(-0.01, 0.01)
    return {("task_accuracy", 0): 0.5 - rises} | {
      (f"task_accuracy:operators={m}", 0): 0.4 + (rises if m <= 5 else -9 * rises)
      for m in range(1, 8)
    }

  trials = grid((NTP, TWO), range(3))
  return write_results(folder, trials, measure, {"task.polynomial.max_operators": 5})


def acceptance(folder: Path) -> Path:
  """Falls with depth for heads only; modules accept more; wider more; no induction."""
  trials = grid(
    (FOUR, THREE_MODULES), range(3), trunk__embed_dim=(16, 64),
    data__source=("stdlib", "docstrings", "induction"),
  )

  def measure(trial: Trial, rng: np.random.Generator) -> dict:
    if trial["data.source"] == "induction":
      return {("main_loss", 0): 1.0}
    is_parallel = trial["mtp.kind"] == "parallel"
    wide = 0.1 * (trial["trunk.embed_dim"] == 64)
    return {
      ("sampled_acceptance", k): 0.8 + wide + rng.uniform(-0.01, 0.01)
      - (0.1 * k if is_parallel else -0.02 * k)
      for k in (1, 2, 3)
    }

  return write_results(folder, trials, measure)


def schedules(folder: Path) -> Path:
  """Anneal closes the penalty, reverse does not, only forward keeps the drafts."""
  penalty = {"constant": 0.2, "piecewise": 0.15, "anneal": 0.02, "forward": 0.18,
             "reverse": 0.19}
  rounds = {"constant": 2.0, "piecewise": 1.9, "anneal": 1.2, "forward": 1.95,
            "reverse": 1.1}
  trials = grid([NTP], range(3), mtp__schedule=["constant"], mtp__curriculum=["none"])
  for methods, arms in (([FOUR], penalty), ([ONE_MODULE], ("constant", "piecewise"))):
    for arm in arms:
      is_curriculum = arm in ("forward", "reverse")
      trials += grid(
        methods, range(3), mtp__schedule=["constant" if is_curriculum else arm],
        mtp__curriculum=[arm if is_curriculum else "none"],
      )

  def measure(trial: Trial, rng: np.random.Generator) -> dict:
    loss = 2.0 + 0.1 * trial["seed"] + rng.uniform(-0.005, 0.005)
    if trial["mtp.depth"] == 0:
      return {("main_loss", 0): loss}
    curriculum = trial["mtp.curriculum"]
    arm = trial["mtp.schedule"] if curriculum == "none" else curriculum
    return {
      ("main_loss", 0): loss + penalty[arm],
      ("sampled_tokens_per_round", 0): rounds[arm] + rng.uniform(-0.02, 0.02),
    }

  return write_results(folder, trials, measure)


def bytes_or_bpe(folder: Path) -> Path:
  """Heads cost 0.02 bits per byte each on BPE, 0.01 on bytes."""
  methods = (NTP, FOUR, ("parallel", 7))
  trials = grid(methods, range(3), tokenizer__kind=("bytes", "bpe"))

  def measure(trial: Trial, rng: np.random.Generator) -> dict:
    cost = 0.02 if trial["tokenizer.kind"] == "bpe" else 0.01
    bits = 2.0 + cost * trial["mtp.depth"] + rng.uniform(-0.001, 0.001)
    return {("bits_per_byte", 0): bits}

  return write_results(folder, trials, measure)


def data_repetition(folder: Path) -> Path:
  """The gain grows with repetition: not what was published."""
  trials = grid((NTP, TWO, FOUR), range(3), data__test_fraction=(0.05, 0.5, 0.9))

  def measure(trial: Trial, rng: np.random.Generator) -> dict:
    gain = 0.2 * trial["data.test_fraction"] * (trial["mtp.depth"] > 0)
    return {("main_loss", 0): 2.0 - gain + rng.uniform(-0.001, 0.001)}

  return write_results(folder, trials, measure)


def markov(folder: Path) -> Path:
  """A table adds a sampled token and costs 0.1 nats; greedy rounds stay as they are."""
  trials = grid([FOUR], range(3), trunk__embed_dim=(32, 64), mtp__markov_rank=(0, 256))

  def measure(trial: Trial, rng: np.random.Generator) -> dict:
    has_table = trial["mtp.markov_rank"] > 0
    return {
      ("main_loss", 0): 2.0 + 0.1 * has_table + rng.uniform(-0.001, 0.001),
      ("decoded_tokens_per_round", 0): 3.5 + rng.uniform(-0.01, 0.01),
      # Drawn drafts gain from the table, the most likely ones do not.
      ("sample_proposal_tokens_per_round", 0):
        1.2 + has_table + rng.uniform(-0.01, 0.01),
      ("argmax_proposal_tokens_per_round", 0): 1.4 + rng.uniform(-0.01, 0.01),
    }

  return write_results(folder, trials, measure)


def hidden_source(folder: Path) -> Path:
  """Chained is better, the embedding does not help, the norm changes nothing."""
  arms = (
    ("chained", "after", "true"), ("chained", "before", "true"),
    ("trunk", "after", "true"), ("trunk", "before", "true"),
    ("chained", "after", "none"),
  )
  keys = ("mtp.hidden", "mtp.hidden_norm", "mtp.fed")
  trials = [
    trial | dict(zip(keys, arm, strict=True))
    for arm in arms for trial in grid([("sequential", 2)], range(3))
  ]

  def measure(trial: Trial, rng: np.random.Generator) -> dict:
    second = 0.7 if trial["mtp.hidden"] == "chained" else 0.5
    first = 0.8 if trial["mtp.fed"] == "true" else 0.95
    noise = lambda: rng.uniform(-0.01, 0.01)  # noqa: E731
    return {
      ("main_loss", 0): 2.0 + 0.1 * noise(),
      ("sampled_acceptance", 1): first + noise(),
      ("sampled_acceptance", 2): second + noise(),
    }

  return write_results(folder, trials, measure)


def drafters(folder: Path) -> Path:
  """Joint modules are far ahead, KL helps, text of the trunk's own does not matter."""
  brings = {
    "medusa": 1.4, "medusa, shared matrix": 1.2, "eagle": 1.5, "eagle3": 1.9,
    "modules": 1.7, "module": 1.6, "module, KL": 1.8, "module, TV": 1.7,
    "module, LK": 1.9, "module, KL, written text": 1.8, "parallel, joint": 1.5,
    "modules, joint": 2.2, "module, joint": 2.0, "medusa, joint": 1.45,
  }
  price = {"parallel, joint": 0.1, "modules, joint": 0.0, "medusa, joint": 0.01}
  arms = {}
  for arm, where in ARMS.items():
    for trial in grid([(where["mtp.kind"], 3)], range(3), trunk__embed_dim=(32, 64)):
      written = "runs/x.jsonl" if arm == WRITTEN else ""
      key = len(arms)
      arms[key] = arm, trial | where | {"data.train_on": written}
  trials = [trial | {"index": key} for key, (_, trial) in arms.items()]
  for trial in trials:
    trial |= {"added_parameters": 500, "flops_per_token": 2e6}

  def measure(trial: Trial, rng: np.random.Generator) -> dict:
    arm, noise = arms[trial["index"]][0], lambda: rng.uniform(-0.001, 0.001)
    taus = {
      (f"{how}_tokens_per_round", 0): brings[arm] + noise()
      for how in ("sampled", "decoded")
    }
    rates = {
      (f"sampled_{metric}", k): 0.6 - 0.1 * k + noise()
      for metric in ("acceptance", "survival") for k in (1, 2, 3)
    }
    loss = 2.0 + 0.1 * trial["seed"] + price.get(arm, 0.0) + noise()
    return taus | rates | {("main_loss", 0): loss}

  return write_results(folder, trials, measure)


def kinds(folder: Path) -> Path:
  """Turns beat one pass, a block beats masks, a table helps; a joint block costs."""
  brings = {"eagle3": 2.5, "peagle": 1.5, "dflash": 2.0, "medusa, Markov": 2.2}
  arms = [
    (name, how, trial | where)
    for (name, how), where in of_kinds.ARMS.items()
    for trial in grid([(where["mtp.kind"], 3)], range(3))
  ]
  trials = [
    trial | {"index": i, "added_parameters": 500, "flops_per_token": 2e6}
    for i, (_, _, trial) in enumerate(arms)
  ]

  def measure(trial: Trial, rng: np.random.Generator) -> dict:
    (name, how, _), noise = arms[trial["index"]], lambda: rng.uniform(-0.001, 0.001)
    price = 0.05 * (how == "joint" and name == "dflash")
    return {("main_loss", 0): 2.0 + 0.1 * trial["seed"] + price + noise()} | {
      (f"{by}_tokens_per_round", 0): brings.get(name, 1.4) + noise()
      for by in of_kinds.HOW.values() if name != "top"
    }

  return write_results(folder, trials, measure)


def kinds_on_siblings(folder: Path) -> Path:
  """Predictors that read no later token gain 0.05 nats, the others nothing."""
  arms = {"none": {"mtp.kind": "none", "mtp.markov_rank": 0}} | of_kinds.SIBLING_ARMS
  trials = [
    trial | arm | {"arm": name, "mtp.weight": 1.0}
    for name, arm in arms.items()
    for trial in grid(
      [(arm["mtp.kind"], int(name != "none"))], range(5), trunk__embed_dim=(32, 64),
      task__num_train=(1000,), task__siblings__num_children=(100,),
    )
  ]
  for trial in trials:
    trial["size"] = 1000 * trial["trunk.embed_dim"]

  def curve(trial: Trial, rng: np.random.Generator) -> Iterable[dict]:
    gains = dict.fromkeys(of_kinds.FED, 0.0) | {"none": 0.0}
    loss = 2.5 - gains.get(trial["arm"], 0.05) + 0.1 * trial["seed"]
    for split in ("validation", "test"):
      yield {
        "split": split, "step": 10, "loss": loss + rng.normal(0, 0.001),
        "task_accuracy": 0.5, "task_new": 0.5,
      }

  return write_results(folder, trials, lambda *_: {}, curve=curve)
