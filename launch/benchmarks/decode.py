"""`launch.benchmark decode`: what drafts save, what they cost, and whether it adds up.

With --runs, the extra predictors of trained models draft on held-out text: how much is
accepted, and how much faster decoding is than without them. With --sizes, models with
random weights show the costs at sizes that nobody trained: drafts are then true by
decree, with and without the work of the predictors. There, plain decoding is also timed
against PyTorch with a KV cache. The floor of a step is the time in which the device
reads the bytes that it must.

The parts of a round, whole generations and PyTorch take turns for several rounds; every
ratio is formed within a round, so that a machine that is busy for a while slows both of
its sides.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.benchmarks import decode_parts, decode_peers, limits
from launch.benchmarks.contestants import Contestant
from launch.benchmarks.decode_peers import start_peers
from launch.benchmarks.decode_tables import markdown
from launch.benchmarks.records import (
  MODELS,
  Progress,
  add_output,
  apply_preset,
  header,
  make_config,
  new_parser,
  ratios,
  slug,
  write,
)
from mtp_jax.config import TASKS, Config, ConfigError
from mtp_jax.config_rules import validate
from mtp_jax.data.pipeline import load_corpus
from mtp_jax.decode import acceptance, drafters, loop, network, trees
from mtp_jax.decode.generate import Decoding, generate, make_plan
from mtp_jax.model.layers import compute_dtype
from mtp_jax.model.lm import MtpLm, zeros_batch
from mtp_jax.sharding import unbox

DEFINITIONS = {
  "step": "T_1, the time in which the target runs one token per sequence, up to the "
  "arg max of its logits",
  "verify": "the same for the K + 1 tokens of a round, or for the newest token and all "
  "nodes of a tree",
  "draft": "catching up with a round's new features and proposing K drafts, or nodes",
  "round": "everything that a round does",
  "v": "verify / step",
  "sum_c": "draft / step; a draft costs 1 / K of it on average",
  "overhead": "(round - verify - draft) / step: judging, committing, counting; and "
  "what the two lose by alternating, since a part that is repeated alone may find more "
  "of its weights in the processor's caches",
  "plain_overhead": "(round without drafts - step) / step",
  "batch tau": "rounds in which plain decoding finishes the batches / rounds with "
  "drafts; a batch takes as many rounds as the slowest of its sequences, so that at "
  "batch size 1 this is tau, and else less or equal to what tau promises",
  "predicted": "batch tau / (v + sum_c)",
  "measured": "time of plain decoding / time with drafts, same prompts, prefill "
  "excluded",
  "identical": "prompts whose text with drafts is that of plain decoding, token for "
  "token, by the programs that were timed",
  "plain_over_torch": "time per token of plain decoding / of the same sizes in "
  "PyTorch, prefill excluded; below 1 ours is the faster",
  "floor": "the time in which the device reads the bytes that a step must read: "
  "weights of the plain model, its embedding's table left out, and the slots of the "
  "cache that are filled, as a mean over a generation; at the rate of an array that no "
  "cache holds. Smaller models can be faster than this floor, from the processor's "
  "caches",
  "floor_over_step": "floor / step, the share of the memory's bandwidth that is used",
  "oracle": "drafts are the tokens that the target will choose, and cost nothing",
  "forced": "the predictors do their work, then drafts are those of the oracle",
}

_PRESETS = {
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
}
_QUICK = {
  "models": ["tiny"], "trunks": ["llama"], "vocabs": [264], "kinds": ["sequential"],
  "depth": 2, "batch_sizes": [2], "prompts": 4,
  "prompt_tokens": 8, "max_new_tokens": 12, "rounds": 2, "least_seconds": 0.005,
}


@dataclasses.dataclass(frozen=True)
class Model:
  """What is decoded with; `prompts_NP` are all of one length."""

  name: str
  config: Config
  weights: network.Weights
  prompts_NP: np.ndarray
  max_new_tokens: int
  stop_ids: tuple[int, ...]


def add_parser(commands: Any) -> None:
  """Adds the `decode` subcommand to the subparsers of `launch.benchmark`."""
  parser = new_parser(
    commands, "decode", _PRESETS, __doc__,
    "decoding with drafts: acceptance, costs, predicted and measured speed-up",
    (
      "  python -m launch.benchmark decode --quick       a check that takes seconds\n"
      "  python -m launch.benchmark decode --runs runs/seq2\n"
      "  python -m launch.benchmark decode --runs RUN --trees own\n"
      "  python -m launch.benchmark decode --sizes       the published costs\n"
      "  python -m launch.benchmark decode --sizes --preset gpu    those of a GPU\n"
    ),
  )
  add = parser.add_argument
  add("--runs", nargs="+", type=Path, default=[], metavar="RUN", help="run folders")
  add("--sizes", action="store_true", help="random weights; the default without --runs")
  add("--batch_sizes", nargs="+", type=int, metavar="B")
  add(
    "--max_new_tokens", type=int,
    help="per prompt; of a run no more than fit into the length it was trained on",
  )
  add(
    "--prompt_tokens", type=int,
    help="per prompt; of a run no more than a quarter of that length",
  )
  add("--rounds", type=int, help="turns of everything that is timed")
  add(
    "--least_seconds", type=float,
    help="how long a part of a round is repeated per turn",
  )
  add("--seed", type=int, default=0, help="of random weights, prompts and resamples")
  add = parser.add_argument_group("with --runs").add_argument
  add("--prompts", type=int, help="from as many held-out documents")
  add("--split", default="test", choices=["validation", "test"])
  add(
    "--drafts", nargs="+", type=int, metavar="K",
    help="drafts per round; by default one per extra predictor",
  )
  add(
    "--recurse", action="store_true",
    help="let the last sequential module draft on from its own output for larger K",
  )
  add(
    "--trees", nargs="+", default=[], metavar="TREE",
    help="beside the chains: files of launch.tree, own for the tree.json of each run, "
    "or dynamic:DEPTH,WIDTH,NODES",
  )
  add = parser.add_argument_group("with --sizes").add_argument
  add("--models", nargs="+", choices=list(MODELS), help="by number of parameters")
  add("--trunks", nargs="+", choices=["gpt2", "llama"])
  add("--vocabs", nargs="+", type=int, metavar="V")
  kinds = ["sequential", "parallel", "linear", "medusa", "eagle", "eagle3"]
  add("--kinds", nargs="+", choices=kinds)
  add("--depth", type=int, help="extra predictors, all of which draft")
  add("--torch", action=argparse.BooleanOptionalAction, default=True)
  add = parser.add_argument
  add("--name", help="of the two files; by default decode-runs- or decode-sizes-DEVICE")
  add_output(parser, "tiny sizes, two rounds")
  parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
  """Measures, prints the tables, writes them and their figures.

  Raises:
    ConfigError: settings, a run folder or its text do not fit.
  """
  apply_preset(args, _PRESETS, _QUICK)
  if args.runs and args.sizes:
    raise ConfigError("--runs and --sizes write files of their own: give one of them.")
  for key in ("batch_sizes", "prompts", "prompt_tokens", "max_new_tokens"):
    if np.min(getattr(args, key)) < 1:
      raise ConfigError(f"--{key} must be at least 1, got {getattr(args, key)}.")
  record = header(args) | {"definitions": acceptance.DEFINITIONS | DEFINITIONS}
  mode, measured = ("runs", _runs(args)) if args.runs else ("sizes", _sizes(args))
  record |= {"device": jax.devices()[0].device_kind, **measured}
  name = args.name or f"decode-{mode}-" + (
    "quick" if args.quick else slug(record["device"])
  )
  record["settings"]["runs"] = [str(path) for path in args.runs]
  write(args.output, name, record, markdown(record))


def _runs(args: argparse.Namespace) -> dict[str, Any]:
  """Returns acceptance and speed of trained models."""
  for path in args.runs:  # A run that is missing shows before the first is measured.
    if not (path / "config.json").is_file():
      raise ConfigError(f"--runs must name run folders, {str(path)!r} is none.")
  too_large = [size for size in args.batch_sizes if args.prompts % size]
  if too_large:
    raise ConfigError(
      f"--prompts must be divisible by every one of --batch_sizes, got {args.prompts} "
      f"and {too_large}."
    )
  decodings_of = {path: _decodings(path, args) for path in args.runs}
  say = Progress(len(args.runs) * len(args.batch_sizes), args.rounds)
  accepted, rows = [], []
  for path in args.runs:
    model = _trained(path, args)
    try:
      plans = {
        decoding: make_plan(model.config, decoding) for decoding in decodings_of[path]
      }
    except ValueError as error:
      raise ConfigError(f"{path}: {error}") from error
    plans = {d: plan for d, plan in plans.items() if plan.drafter.num_drafts}
    if not plans:
      raise ConfigError(f"{path}: the model has no extra predictors, nothing drafts.")
    names = {
      decoding: f"own, {decoding.tree or f'K={plan.drafter.num_drafts}'}"
      for decoding, plan in plans.items()
    }
    if len(set(names.values())) < len(names):
      raise ConfigError(f"--trees must differ in nodes or depth, got {args.trees}.")
    for decoding, name in names.items():
      completions = generate(
        model.config, model.weights, list(model.prompts_NP),
        max_new_tokens=model.max_new_tokens, stop_ids=model.stop_ids,
        decoding=decoding, batch_size=args.batch_sizes[0],
      )
      figures = acceptance.summarize(completions, seed=args.seed)
      del figures["definitions"]
      accepted.append({
        "model": model.name, "drafter": name, "split": args.split,
        **_teacher_forced(path), "decoding": figures,
      })
    variants = {
      names[decoding]: Variant(plan, lambda weights, _: weights)
      for decoding, plan in plans.items()
    }
    for batch_size in args.batch_sizes:
      rows += measure(model, variants, batch_size, args, say)
  return {"acceptance": accepted, "rows": rows}


def _decodings(path: Path, args: argparse.Namespace) -> list[Decoding]:
  """Returns the ways to decode that are measured on a run: chains, then trees."""
  chains = [
    Decoding(num_drafts=K, recurse=args.recurse) for K in args.drafts or [None]
  ]
  texts = [str(path / "tree.json") if text == "own" else text for text in args.trees]
  try:
    return chains + [
      Decoding(recurse=args.recurse, tree=trees.read(text)) for text in texts
    ]
  except ValueError as error:
    raise ConfigError(f"--trees: {error}") from error


def _sizes(args: argparse.Namespace) -> dict[str, Any]:
  """Returns the costs of models with random weights, and plain decoding in PyTorch."""
  cases = list(itertools.product(
    args.models, args.trunks, args.vocabs, args.kinds, args.batch_sizes
  ))
  say = Progress(len(cases), args.rounds)
  rows = []
  for size, trunk, vocab, kind, batch_size in cases:
    model = _random(args, size, trunk, vocab, kind, batch_size)
    plan = make_plan(model.config, Decoding())
    own, K = plan.drafter, plan.drafter.num_drafts
    variants = {
      f"forced, K={K}": Variant(
        plan._replace(drafter=decode_parts.forced(own)),
        lambda weights, drafts_BS: (weights, drafts_BS),
      ),
      f"oracle, K={K}": Variant(
        plan._replace(drafter=drafters.given(K)),
        lambda _, drafts_BS: drafts_BS,
        has_cost=False,
      ),
    }
    # The plain model does not depend on the predictors: one comparison will do.
    with_torch = args.torch and kind == args.kinds[0] and kind != "parallel"
    peers = start_peers(
      model.config, batch_size, args.prompt_tokens, args.max_new_tokens
    ) if with_torch else {}
    try:
      rows += measure(model, variants, batch_size, args, say, peers)
    finally:
      for peer in peers.values():
        peer.close()
  return {"rows": rows}


@dataclasses.dataclass(frozen=True)
class Variant:
  """A way to draft.

  make_weights: (weights, true tokens drafts_BS) -> weights of the drafter.
  has_cost: its drafts are work that is worth timing.
  """

  plan: loop.Plan
  make_weights: Callable[[Any, jax.Array], Any]
  has_cost: bool = True


def measure(
  model: Model,
  variants: dict[str, Variant],
  batch_size: int,
  args: argparse.Namespace,
  say: Progress,
  peers: Mapping[str, Contestant] = MappingProxyType({}),
) -> list[dict[str, Any]]:
  """Returns a table row per variant; everything that is timed takes turns."""
  prompts_NP = model.prompts_NP
  batches = np.split(prompts_NP, len(prompts_NP) // batch_size)
  plan = make_plan(model.config, Decoding(num_drafts=0))
  plain = Generation(model, plan, batches, [None] * len(batches))
  reads = _read_all(compute_dtype(model.config.trunk))
  timers = _plain_timers(plain, args.least_seconds) | {"reads": reads.seconds}
  for name, peer in peers.items():
    timers[name] = lambda peer=peer: peer.run(1)[0]
  drafted = {}
  for name, variant in variants.items():
    K = variant.plan.drafter.num_drafts
    weights = [
      variant.make_weights(model.weights, jnp.pad(tokens_BS, ((0, 0), (0, K))))
      for tokens_BS in plain.tokens
    ]
    drafted[name] = Generation(model, variant.plan, batches, weights)
    _add_timers(timers, name, drafted[name], variant.has_cost, args.least_seconds)
  say(f"{model.name} B={batch_size}: compiled")
  seconds: dict[str, list[float]] = {name: [] for name in timers}
  for turn in range(args.rounds):
    # Every other round backwards, so that nothing always follows the same.
    for name in list(timers)[:: 1 if turn % 2 == 0 else -1]:
      seconds[name].append(timers[name]())
    say(f"{model.name} B={batch_size}: round {turn + 1}")
  floor = np.array(seconds["reads"]) * _step_bytes(model, plain) / reads.amount
  return [
    _describe(model, batch_size, plain)
    | _row(name, plain, generation, seconds, floor)
    for name, generation in drafted.items()
  ]


# An array that fills memory is kept for all models of a run.
_read_all = functools.cache(limits.reads)


def _step_bytes(model: Model, plain: "Generation") -> float:
  """Returns the bytes that a 1-row step must read, as a mean over a generation.

  Of experts, all count.
  """
  weights, (_, state) = model.weights, plain.first()
  read = (weights.blocks, weights.final_norm, weights.unembed_DV)
  filled = model.prompts_NP.shape[1] + model.max_new_tokens / 2
  return _size(read) + _size(state.cache) * filled / state.tokens_BS.shape[1]


def _size(tree: Any) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


class Generation:
  """The decoding of all batches by one plan, again and again.

  tokens: what it decoded, tokens_BS of every batch. rounds: of all batches together.
  sequence_rounds, sequence_tokens: of all sequences together, prefill excluded.
  """

  def __init__(
    self,
    model: Model,
    plan: loop.Plan,
    batches: Sequence[np.ndarray],
    draft_weights: Sequence[Any],
  ):
    self.plan = plan
    self.limit = batches[0].shape[1] + model.max_new_tokens
    stop_ids = np.array(model.stop_ids, np.int32)
    self._batches = [
      (batch, loop.Inputs(model.weights, weights, None, stop_ids))
      for batch, weights in zip(batches, draft_weights, strict=True)
    ]
    self.prefill_seconds: list[float] = []
    self.tokens: list[jax.Array] = []
    self.rounds = self.sequence_rounds = self.sequence_tokens = 0
    for batch, inputs in self._batches:
      state = loop.finish(plan, inputs, self._start(batch, inputs))
      self.tokens.append(state.tokens_BS[:, : self.limit])
      self.rounds += int(state.stats.rounds_B.max())
      self.sequence_rounds += int(state.stats.rounds_B.sum())
      self.sequence_tokens += int((state.length_B - batch.shape[1] - 1).sum())

  def seconds(self) -> float:
    """Decodes everything; returns the time without prefill, which is noted."""
    prefill = finish = 0.0
    for batch, inputs in self._batches:
      times = [time.perf_counter()]
      state = jax.block_until_ready(self._start(batch, inputs))
      times.append(time.perf_counter())
      jax.block_until_ready(loop.finish(self.plan, inputs, state))
      times.append(time.perf_counter())
      prefill += times[1] - times[0]
      finish += times[2] - times[1]
    self.prefill_seconds.append(prefill)
    return finish

  def first(self) -> tuple[loop.Inputs, loop.DecodeState]:
    """Returns the inputs of the first batch and its state after the prefill."""
    batch, inputs = self._batches[0]
    return inputs, self._start(batch, inputs)

  def _start(self, batch_BP: np.ndarray, inputs: loop.Inputs) -> loop.DecodeState:
    rows, length = batch_BP.shape
    slots = loop.slots_for(self.limit, self.plan.drafter.num_drafted)
    tokens_BS = np.zeros((rows, slots), np.int32)
    tokens_BS[:, :length] = batch_BP
    full_B = functools.partial(np.full, rows, dtype=np.int32)
    return loop.prefill(
      self.plan, length, inputs, tokens_BS, full_B(length), full_B(self.limit),
      np.uint32(0), np.arange(rows, dtype=np.int32),  # Noise, which greedy has none of.
    )


def _plain_timers(
  plain: Generation, least_seconds: float
) -> dict[str, Callable[[], float]]:
  inputs, state = plain.first()
  parts = {
    "step": decode_parts.forward_rows(plain.plan, inputs, state, 1),
    "plain round": decode_parts.whole_round(plain.plan, inputs, state),
  }
  for part in parts.values():
    part.warm_up(least_seconds)
  return {"plain": plain.seconds} | {name: x.seconds for name, x in parts.items()}


def _add_timers(
  timers: dict[str, Callable[[], float]],
  name: str,
  generation: Generation,
  has_cost: bool,
  least_seconds: float,
) -> None:
  """Adds a variant's timers, but for a verification that is there already."""
  timers[name] = generation.seconds
  plan = generation.plan
  inputs, state = generation.first()
  parts = {}
  verify = _verify(name, plan)
  if plan.drafter.num_nodes is not None:
    parts[verify] = decode_parts.forward_nodes(plan, inputs, state)
  elif verify not in timers:
    rows = 1 + plan.drafter.num_drafts
    parts[verify] = decode_parts.forward_rows(plan, inputs, state, rows)
  if has_cost:
    parts[f"{name} draft"] = decode_parts.draft(plan, inputs, state)
    parts[f"{name} round"] = decode_parts.whole_round(plan, inputs, state)
  for label, part in parts.items():
    part.warm_up(least_seconds)
    timers[label] = part.seconds


def _verify(name: str, plan: loop.Plan) -> str:
  """Returns the name of a variant's verification: chains of one length share theirs."""
  is_chain = plan.drafter.num_nodes is None
  return f"verify {plan.drafter.num_drafts if is_chain else name}"


def _describe(model: Model, batch_size: int, plain: Generation) -> dict[str, Any]:
  config = model.config
  return {
    "model": model.name,
    "trunk": config.trunk.kind,
    "vocab": config.tokenizer.vocab_size,
    "embed_dim": config.trunk.embed_dim,
    "num_layers": config.trunk.num_layers,
    "kind": config.mtp.kind,
    "depth": config.mtp.depth,
    "batch_size": batch_size,
    "num_prompts": len(model.prompts_NP),
    "prompt_tokens": model.prompts_NP.shape[1],
    "max_new_tokens": model.max_new_tokens,
    "plain_rounds": plain.rounds,
  }


def _row(
  name: str,
  plain: Generation,
  drafted: Generation,
  seconds: dict[str, list[float]],
  floor: np.ndarray,
) -> dict[str, Any]:
  """Returns what was measured of one variant, and the ratios of every round.

  `floor` are the least seconds of a 1-row step.
  """
  step, num_drafts = np.array(seconds["step"]), drafted.plan.drafter.num_drafts
  own = {"verify": np.array(seconds[_verify(name, drafted.plan)])} | {
    key: np.array(seconds[f"{name} {key}"])
    for key in ("draft", "round")
    if f"{name} {key}" in seconds
  }
  batch_tau = plain.rounds / drafted.rounds
  v = own["verify"] / step
  sum_c = own["draft"] / step if "draft" in own else np.zeros_like(step)
  predicted = batch_tau / (v + sum_c)
  measured = np.array(ratios(seconds["plain"], seconds[name]))
  found = {
    "floor_over_step": floor / step,
    "v": v, "sum_c": sum_c, "predicted": predicted, "measured": measured,
    "measured_over_predicted": measured / predicted,
    "plain_overhead": np.array(seconds["plain round"]) / step - 1,
  }
  if "round" in own:
    found["overhead"] = (own["round"] - own["verify"] - own["draft"]) / step
  timed = {"floor": floor, "step": step, "plain_round": seconds["plain round"], **own}
  timed |= {"plain": seconds["plain"], "drafted": seconds[name]}
  timed["plain_prefill"] = plain.prefill_seconds
  timed["drafted_prefill"] = drafted.prefill_seconds
  against_torch = {}
  for peer in decode_peers.NAMES:
    if peer in seconds:
      timed[peer] = seconds[peer]
      against_torch[peer] = ratios(seconds["plain"], seconds[peer])
  same = [
    np.all(a == b, axis=1).sum()
    for a, b in zip(plain.tokens, drafted.tokens, strict=True)
  ]
  return {
    "drafter": name,
    "num_drafts": num_drafts,
    "num_drafted": drafted.plan.drafter.num_drafted,
    "tau": drafted.sequence_tokens / drafted.sequence_rounds,
    "batch_tau": batch_tau,
    "rounds": drafted.rounds,
    "identical": int(sum(same)),
    **{key: np.asarray(values).tolist() for key, values in found.items()},
    "plain_over_torch": against_torch,
    "seconds": {key: np.asarray(values).tolist() for key, values in timed.items()},
  }


def _trained(path: Path, args: argparse.Namespace) -> Model:
  """Returns the model of a run folder, with prompts from held-out documents.

  A prompt is from the middle of a document. Prompt and continuation are no longer
  together than the rows that the model was trained on.
  """
  import mtp_jax

  loaded = mtp_jax.load(path)
  config = loaded.config
  if config.data.source in TASKS:
    raise ConfigError(
      f"--runs must name models of text; {path} was trained on the task "
      f"{config.data.source!r}, whose answers are too short to time."
    )
  length = config.data.seq_len
  prompt_tokens = min(args.prompt_tokens, max(length // 4, 1))
  max_new_tokens = min(args.max_new_tokens, length - prompt_tokens)
  held_out = dataclasses.replace(config.eval, split=args.split)
  corpus = load_corpus(dataclasses.replace(config, eval=held_out), loaded.tokenizer)
  prompts = []
  for document in corpus.documents(args.split):
    size = int(corpus.store.lengths_N[document])
    if size < 2 * prompt_tokens:
      continue
    begin = (size - prompt_tokens) // 2
    prompts.append(corpus.store.read(int(document), begin, begin + prompt_tokens))
    if len(prompts) == args.prompts:
      break
  else:
    raise ConfigError(
      f"--prompts must be at most {len(prompts)}, as many as the {args.split} split of "
      f"{path} has documents with {2 * prompt_tokens} tokens or more, got "
      f"{args.prompts}."
    )
  return Model(
    str(path), config, network.unstack(loaded.params, config), np.stack(prompts),
    max_new_tokens, loaded.tokenizer.end_ids,
  )


def _random(
  args: argparse.Namespace,
  size: str,
  trunk: str,
  vocab: int,
  kind: str,
  batch_size: int,
) -> Model:
  """Returns a model with random weights and as many prompts as one batch."""
  slots = args.prompt_tokens + args.max_new_tokens
  settings = argparse.Namespace(**vars(args) | {
    "kind": kind, "seq_len": max(slots, args.depth + 1), "batch_size": 1,
  })
  config = make_config(settings, size, trunk, vocab, args.depth)
  validate(config)
  init = lambda key: MtpLm(config).init(key, zeros_batch(config))["params"]  # noqa: E731
  params = jax.jit(lambda key: unbox(init(key)))(jax.random.key(args.seed))
  rng = np.random.default_rng(args.seed)
  prompts_NP = rng.integers(0, vocab, (batch_size, args.prompt_tokens), np.int32)
  name = f"{size} {trunk} V={vocab} {kind} D={args.depth}"
  weights = network.unstack(params, config)
  return Model(name, config, weights, prompts_NP, args.max_new_tokens, ())


def _teacher_forced(path: Path) -> dict[str, Any]:
  """Returns what the run's final evaluation says about its drafts, if there is one."""
  keys = ("teacher_forced_agreement", "simulated_accepted_length")
  file = path / "eval.json"
  found = json.loads(file.read_text()) if file.is_file() else {}
  return {
    "teacher_forced_split": found.get("split"), **{key: found.get(key) for key in keys}
  }
