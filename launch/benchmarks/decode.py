"""Measures what drafts save, what they cost, and whether the two add up.

  mtp-jax bench decode --runs=runs/seq2 --trees=own --trees=dynamic:4,3,16
  mtp-jax bench decode --models=25M --vocabs=264 --batch_sizes=1,8

With --runs, the extra predictors of trained models draft on held-out text: how many
drafts are accepted, and how much faster decoding is than without them. Without --runs,
models with random weights show the costs at sizes that nobody trained: drafts are the
tokens that the target will choose, with and without the work of the predictors. There,
plain decoding is also timed against PyTorch with a KV cache. The floor of a step is the
time in which the device reads the bytes that the step must read.

The parts of a round, whole generations and PyTorch take turns.
"""

import contextlib
import dataclasses
import functools
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from absl import flags

import mtp_jax
from launch.benchmarks import decode_parts, harness, pages, torch_steps
from launch.benchmarks.decode_parts import Model, Variant
from launch.benchmarks.harness import TORCH, Contestant, Failed
from launch.benchmarks.pages import spread
from launch.tables import markdown
from mtp_jax import run_folder
from mtp_jax.config import TASKS, ConfigError
from mtp_jax.config_rules import validate
from mtp_jax.data.packing import token_ids
from mtp_jax.data.pipeline import load_corpus
from mtp_jax.decode import acceptance, drafters, loop, trees
from mtp_jax.decode.generate import Decoding, generate, make_plan
from mtp_jax.decode.target import unstack
from mtp_jax.lm import MtpLm, zeros_batch
from mtp_jax.predictors import KINDS
from mtp_jax.sharding import unbox

DEFINITIONS = {
  "step": "T_1, the time in which the target runs one token per sequence, up to the "
  "arg max of its logits",
  "v": "verify / step; verify is the time of a step of the K + 1 tokens of a round, or "
  "of the newest token and all nodes of a tree",
  "sum_c": "draft / step; draft is the time of catching up with a round's new features "
  "and proposing K drafts, or nodes",
  "batch_tau": "rounds in which plain decoding finishes the batches / rounds with "
  "drafts; a batch takes as many rounds as its slowest sequence, so that batch_tau is "
  "tau at batch size 1",
  "predicted": "batch_tau / (v + sum_c)",
  "measured": "time of plain decoding / time with drafts, for the same prompts and "
  "without prefill",
  "identical": "prompts whose text with drafts equals the text of plain decoding, "
  "token for token, by the programs that were timed",
  "plain_over_torch": "time of plain decoding / time of the same sizes in PyTorch, "
  "prefill excluded; below 1 ours is the faster",
  "floor": "the time in which the device reads the plain model's weights, without the "
  "embedding's table, and the filled slots of the cache (mean over a generation), at "
  "the rate of an array that no cache holds",
  "oracle": "drafts are the tokens that the target will choose, and cost nothing",
  "forced": "the predictors do their work, then the oracle's drafts are taken",
}
PRESETS = {
  "cpu": {
    "models": ["25M"], "trunks": ["gpt2", "llama"], "vocabs": [264, 50304],
    "kinds": ["sequential", "parallel"], "depth": 3, "batch_sizes": [1, 8, 32],
    "prompts": 32, "prompt_tokens": 64, "max_new_tokens": 128, "rounds": 7,
    "least_seconds": 0.2,
  },
  "gpu": {
    "models": ["350M", "1.3B"], "trunks": ["llama"], "vocabs": [50304],
    "kinds": ["sequential"], "depth": 3, "batch_sizes": [1, 8, 64],
    "prompts": 64, "prompt_tokens": 64, "max_new_tokens": 128, "rounds": 5,
    "least_seconds": 0.2,
  },
  "quick": {
    "models": ["tiny"], "trunks": ["llama"], "vocabs": [264], "kinds": ["sequential"],
    "depth": 2, "batch_sizes": [2], "prompts": 4, "prompt_tokens": 8,
    "max_new_tokens": 12, "rounds": 2, "least_seconds": 0.005,
  },
}
_KINDS = tuple(name for name, kind in KINDS.items() if kind.drafter)
harness.define_settings(
  PRESETS,
  {"models": harness.MODELS, "trunks": harness.TRUNKS, "kinds": _KINDS},
  kinds=f"predictors, without --runs: {', '.join(_KINDS)}",
  depth="extra predictors, without --runs; all of them draft",
  batch_sizes="prompts that are decoded together",
  prompts="held-out documents, with --runs",
  prompt_tokens="per prompt; of a run at most a quarter of its data.seq_len",
  max_new_tokens="per prompt; of a run no more than fit into its data.seq_len",
  least_seconds="how long a part of a round is repeated per turn",
)
_RUNS = flags.DEFINE_multi_string("runs", [], "a run folder; may be given again")
_TREES = flags.DEFINE_multi_string(
  "trees", [], "beside the chains of --runs: a file of launch.tree, own for each run's "
  "tree.json, or dynamic:DEPTH,WIDTH,NODES; may be given again"
)
_DRAFTS = flags.DEFINE_list(
  "drafts", [], "drafts per round of --runs; by default one per extra predictor"
)
_RECURSE = flags.DEFINE_bool(
  "recurse", False, "let the last sequential module draft on from its own output where "
  "--drafts is more than there are modules", allow_override=True
)
_SPLIT = flags.DEFINE_enum(
  "split", "test", ["validation", "test"], "held-out documents of --runs"
)
_PEERS = flags.DEFINE_bool("torch", True, "compare with PyTorch", allow_override=True)
_SEED = flags.DEFINE_integer(
  "seed", 0, "random seed of weights, prompts and resamples", 0, 2**32 - 1,
  allow_override=True,
)


def main() -> None:
  """Measures, and writes the page.

  Raises:
    ConfigError: settings, a run folder or its text do not fit.
  """
  settings = harness.read_settings(
    PRESETS, _RUNS, _TREES, _DRAFTS, _RECURSE, _SPLIT, _PEERS, _SEED
  )
  settings.drafts = _drafts()
  for name in ("trees", "drafts", "recurse") if not settings.runs else ():
    if flags.FLAGS[name].present:
      raise ConfigError(f"--{name} is for trained models: it needs --runs.")
  accepted, rows = runs(settings) if settings.runs else ([], sizes(settings))
  pages.write_page(
    "decode", settings, rows, __doc__, page(accepted, rows),
    device=jax.devices()[0].device_kind, acceptance=accepted,
    definitions=acceptance.DEFINITIONS | DEFINITIONS,
    mode="-runs" if settings.runs else "-sizes",
  )


def _drafts() -> list[int | None]:
  if not all(text.isdecimal() for text in _DRAFTS.value):
    raise ConfigError(f"--drafts must be whole numbers, got {','.join(_DRAFTS.value)}.")
  return [int(text) for text in _DRAFTS.value] or [None]


def runs(settings: SimpleNamespace) -> tuple[list[Any], list[dict[str, Any]]]:
  """Returns acceptance and speed of trained models.

  Raises:
    ConfigError: a run, its text, or a way to draft does not fit.
  """
  paths = [Path(run) for run in settings.runs]
  # All runs are checked before the first is measured.
  for path in paths:
    if not run_folder.is_run(path):
      raise ConfigError(f"--runs must name run folders, {str(path)!r} is none.")
  uneven = [size for size in settings.batch_sizes if settings.prompts % size]
  if uneven:
    raise ConfigError(
      "--prompts must be divisible by every one of --batch_sizes, got "
      f"{settings.prompts} and {uneven}."
    )
  decodings_of = {path: _decodings(path, settings) for path in paths}
  accepted = []

  def measured(path: Path) -> list[dict[str, Any]]:
    model, variants = _trained(path, settings), {}
    for decoding in decodings_of[path]:
      name, plan = _plan(path, model, decoding)
      if name in variants:
        raise ConfigError(
          f"--trees must differ in nodes or depth, got {settings.trees}."
        )
      variants[name] = Variant(plan, lambda weights, _: weights)
      accepted.append({
        "model": model.name, "drafter": name, "split": settings.split,
        "decoding": _acceptance(model, decoding, settings),
      })
    return [
      row
      for size in settings.batch_sizes
      for row in decode_parts.measure(model, variants, size, settings, {})
    ]

  rows = harness.measure_all(paths, measured)
  return accepted, rows


def _plan(path: Path, model: Model, decoding: Decoding) -> tuple[str, loop.Plan]:
  """Returns the plan of a way to decode, and a name for it."""
  try:
    plan = make_plan(model.config, decoding)
  except ValueError as error:
    raise ConfigError(f"{path}: {error}") from error
  if not plan.drafter.num_drafts:
    raise ConfigError(f"{path}: no extra predictors, or no drafts: nothing drafts.")
  return f"own, {decoding.tree or f'K={plan.drafter.num_drafts}'}", plan


def _acceptance(
  model: Model, decoding: Decoding, settings: SimpleNamespace
) -> dict[str, Any]:
  """Returns what is accepted when all prompts are continued."""
  completions = generate(
    model.config, model.weights, list(model.prompts_NP),
    max_new_tokens=model.max_new_tokens, stop_ids=model.stop_ids,
    decoding=decoding, batch_size=settings.batch_sizes[0],
  )
  figures = acceptance.summarize(completions, seed=settings.seed)
  del figures["definitions"]
  return figures


def _decodings(path: Path, settings: SimpleNamespace) -> list[Decoding]:
  """Returns the ways to decode that are measured on a run: chains, then trees."""
  recurse, own = settings.recurse, str(path / run_folder.TREE)
  chains = [Decoding(num_drafts=K, recurse=recurse) for K in settings.drafts]
  texts = (own if text == "own" else text for text in settings.trees)
  try:
    return chains + [Decoding(recurse=recurse, tree=trees.read(x)) for x in texts]
  except ValueError as error:
    raise ConfigError(f"--trees: {error}") from error


def _trained(path: Path, settings: SimpleNamespace) -> Model:
  """Returns the model of a run folder, with prompts from held-out documents.

  A prompt is from the middle of a document. Prompt and continuation together are no
  longer than the rows that the model was trained on.
  """
  loaded = mtp_jax.load(path)
  config = loaded.config
  if config.data.source in TASKS:
    raise ConfigError(
      f"--runs must name models of text; {path} was trained on the task "
      f"{config.data.source!r}, whose answers are too short to time."
    )
  length = config.data.seq_len
  prompt_tokens = min(settings.prompt_tokens, max(length // 4, 1))
  max_new_tokens = min(settings.max_new_tokens, length - prompt_tokens)
  held_out = dataclasses.replace(config.eval, split=settings.split)
  corpus = load_corpus(dataclasses.replace(config, eval=held_out), loaded.tokenizer)
  prompts = []
  for document in map(int, corpus.documents(settings.split)):
    size = int(corpus.store.lengths_N[document])
    begin = (size - prompt_tokens) // 2
    if size >= 2 * prompt_tokens and len(prompts) < settings.prompts:
      tokens = corpus.store.read(document, begin, begin + prompt_tokens)
      prompts.append(token_ids(tokens))
  if len(prompts) < settings.prompts:
    raise ConfigError(
      f"--prompts must be at most {len(prompts)}, as many as the {settings.split} "
      f"split of {path} has documents with {2 * prompt_tokens} tokens or more, got "
      f"{settings.prompts}."
    )
  return Model(
    str(path), config, unstack(loaded.params, config), np.stack(prompts),
    max_new_tokens, loaded.tokenizer.end_ids,
  )


def sizes(settings: SimpleNamespace) -> list[dict[str, Any]]:
  """Returns the costs of models with random weights, and plain decoding in PyTorch."""
  cases = itertools.product(
    settings.models, settings.trunks, settings.vocabs, settings.kinds,
    settings.batch_sizes,
  )
  return harness.measure_all(cases, lambda case: _of_size(settings, *case))


def _of_size(
  settings: SimpleNamespace, size: str, trunk: str, vocab: int, kind: str, rows: int
) -> list[dict[str, Any]]:
  model = _random(settings, size, trunk, vocab, kind, rows)
  plan = make_plan(model.config, Decoding())
  own, K = plan.drafter, plan.drafter.num_drafts
  variants = {
    f"forced, K={K}": Variant(
      plan._replace(drafter=decode_parts.forced(own)),
      lambda weights, drafts_BS: (weights, drafts_BS),
    ),
    f"oracle, K={K}": Variant(
      plan._replace(drafter=drafters.given(K)), lambda _, drafts_BS: drafts_BS, False
    ),
  }
  # The plain model does not depend on the predictors: one comparison will do.
  has_plain_trunk = not KINDS[kind].deployed_blocks
  is_first = kind == settings.kinds[0] and has_plain_trunk
  with contextlib.ExitStack() as processes:
    peers = {}
    for name in TORCH if settings.torch and is_first else ():
      peer = processes.enter_context(Contestant(_peer(settings, model, name), False))
      try:
        peer.wait_ready()
      except Failed as error:
        print(f"{model.name} B={rows} {name}: {error}", flush=True)
      else:
        peers[name] = peer
    return decode_parts.measure(model, variants, rows, settings, peers)


def _random(
  settings: SimpleNamespace, size: str, trunk: str, vocab: int, kind: str, rows: int
) -> Model:
  """Returns a model with random weights and as many prompts as one batch."""
  length = max(settings.prompt_tokens + settings.max_new_tokens, settings.depth + 1)
  config = harness.make_config(size, trunk, vocab, kind, settings.depth, length, 1)
  validate(config)

  def init(key: jax.Array) -> Any:
    return unbox(MtpLm(config).init(key, zeros_batch(config))["params"])

  params = jax.jit(init)(jax.random.key(settings.seed))
  rng = np.random.default_rng(settings.seed)
  prompts_NP = rng.integers(0, vocab, (rows, settings.prompt_tokens), np.int32)
  name = f"{size} {trunk} V={vocab} {kind} D={settings.depth}"
  weights = unstack(params, config)
  return Model(name, config, weights, prompts_NP, settings.max_new_tokens, ())


def _peer(settings: SimpleNamespace, model: Model, name: str) -> harness.Build:
  mtp = dataclasses.replace(model.config.mtp, kind="none", depth=0)
  return functools.partial(
    torch_steps.build_decode, dataclasses.replace(model.config, mtp=mtp), name,
    len(model.prompts_NP), settings.prompt_tokens, settings.max_new_tokens,
  )


def page(accepted: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[str]:
  """Returns the paragraphs and tables of the page."""
  parts = ["Decoding is greedy. The JSON file beside this page defines all figures."]
  if accepted:
    parts += [
      "## Acceptance",
      "Means [95 % bootstrap interval over prompts]; S_k and alpha_k of the drafts in "
      "their order.",
      markdown(map(_acceptance_cells, accepted)),
    ]
  parts += [
    "## Costs and speed-up",
    "Floor: the bytes that a step of one token must read, at the rate measured in "
    "every round. In units of such a step (T_1): v, the verification of K + 1 rows "
    "(N + 1 of a tree); sum c, all K drafts. Predicted speed-up: batch tau / "
    "(v + sum c). Measured: against plain decoding of the same prompts.",
    markdown(map(_cost_cells, rows)),
  ]
  peers = {(r["model"], r["batch_size"]): r for r in rows if r["plain_over_torch"]}
  if peers:
    parts += [
      "## Plain decoding against PyTorch",
      "KV cache, no drafts, prefill excluded; ms per round; below 1 ours is faster.",
      markdown(map(_torch_cells, peers.values())),
    ]
  return parts


def _acceptance_cells(entry: dict[str, Any]) -> dict[str, Any]:
  figures = entry["decoding"]
  return {
    "model": entry["model"], "drafter": entry["drafter"],
    "prompts": f"{figures['num_prompts']} of {entry['split']}",
    "tau": _interval(figures["tau"]),
    "accepted / drafted": _interval(figures["accepted_per_drafted"]),
    "S_k": "; ".join(map(_interval, figures["survival"])),
    "alpha_k": "; ".join(map(_interval, figures["conditional"])),
    "rounds by drafts emitted": " ".join(map(str, figures["histogram"])),
  }


def _cost_cells(row: dict[str, Any]) -> dict[str, Any]:
  return {
    "model": row["model"], "B": row["batch_size"], "drafter": row["drafter"],
    "floor ms": pages.milliseconds(row["seconds"]["floor"]),
    "T_1 ms": pages.milliseconds(row["seconds"]["step"]),
    "floor / T_1": spread(row["floor_over_step"]),
    "v": spread(row["v"]), "sum c": spread(row["sum_c"]),
    "tau": f"{row['tau']:.2f}", "batch tau": f"{row['batch_tau']:.2f}",
    "predicted": spread(row["predicted"]), "measured": spread(row["measured"]),
    "measured / predicted": spread(row["measured_over_predicted"]),
    "identical": f"{row['identical']}/{row['num_prompts']}",
  }


def _torch_cells(row: dict[str, Any]) -> dict[str, Any]:
  per_round = {
    f"{name} ms": pages.milliseconds([x / row["plain_rounds"] for x in seconds])
    for name, seconds in row["seconds"].items()
    if name in ("plain", *TORCH)
  }
  over = {f"plain / {n}": spread(x) for n, x in row["plain_over_torch"].items()}
  return {"model": row["model"], "B": row["batch_size"]} | per_round | over


def _number(value: float | None) -> str:
  return "-" if value is None else f"{value:.3f}"


def _interval(figure: dict[str, float | None]) -> str:
  mean, low, high = (_number(figure[key]) for key in ("mean", "low", "high"))
  return f"{mean} [{low}, {high}]" if mean != "-" else mean
