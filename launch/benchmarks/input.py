"""`launch.benchmark input`: what the data pipeline delivers, against what a step takes.

A step is never to wait for its rows. So beside each other, in interleaved rounds: the
train step on one batch that stays on the device; the same step in a loop that reads its
rows as training does; and the pipeline alone, from the shuffled order of the rows to
arrays on the device, for a consumer that does nothing.

The floor of the pipeline is one copy of the same tokens out of a memory map, from front
to back. The peer is what users of nanoGPT have: a PyTorch DataLoader that cuts rows out
of such a map wherever chance will have it. It knows no documents: it makes no segment
ids, no positions, no epochs, and goes on after a stop with other rows.
"""

import argparse
import dataclasses
import functools
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from launch.benchmarks.contestants import Contestant, Turns
from launch.benchmarks.records import (
  MODELS,
  Progress,
  add_huge_pages,
  add_output,
  apply_preset,
  header,
  heading,
  make_config,
  new_parser,
  ratios,
  slug,
  spread,
  table,
  write,
)
from mtp_jax import accounting
from mtp_jax.batch import Batch
from mtp_jax.config import Config, ConfigError, with_overrides
from mtp_jax.config_rules import validate
from mtp_jax.data.pipeline import TrainLoader, load_corpus
from mtp_jax.data.prepare import prepare_folder
from mtp_jax.data.tokenizers import save_tokenizer
from mtp_jax.sharding import make_mesh, put_batch
from mtp_jax.train_state import hyperparameters
from mtp_jax.train_step import compiled, programs, shape_of

SOURCES = ("bytes", "bpe", "prepared")
_PRESETS = {
  "cpu": {
    "models": ["1M", "350M"], "seq_lens": [128, 64], "batch_sizes": [16, 1],
    "workers": [0, 1, 2], "rounds": 5, "steps_per_round": 2,
  },
  "gpu": {
    "models": ["1M", "350M"], "seq_lens": [256, 1024], "batch_sizes": [64, 16],
    "workers": [0, 1, 4, 16], "rounds": 7, "steps_per_round": 5,
  },
}
_QUICK = {
  "models": ["1M"], "seq_lens": [32], "batch_sizes": [2], "workers": [0],
  "sources": ["prepared"], "depths": [0], "text": "language_reference", "rounds": 2,
  "steps_per_round": 1, "least_seconds": 0.02,
}
_STEP, _LOOP, _FLOOR = "step", "loop", "floor"


@dataclasses.dataclass(frozen=True)
class Ready:
  """What a contestant says once it is warm; `tokens` are those of one of its turns."""

  hardware: str
  tokens: int


def add_parser(commands: Any) -> None:
  """Adds the `input` subcommand to the subparsers of `launch.benchmark`."""
  parser = new_parser(
    commands, "input", _PRESETS, __doc__,
    "what the data pipeline delivers, against what a train step takes",
    (
      "  python -m launch.benchmark input --quick        a check that takes a minute\n"
      "  python -m launch.benchmark input                the published table of a CPU\n"
      "  python -m launch.benchmark input --preset gpu   that of a GPU\n"
      "  python -m launch.benchmark input --models 1M --seq_lens 256 --batch_sizes 32\n"
    ),
  )
  add = parser.add_argument
  add(
    "--models", nargs="+", choices=list(MODELS), metavar="MODEL",
    help=f"by number of parameters: {', '.join(MODELS)}",
  )
  add("--seq_lens", nargs="+", type=int, metavar="T", help="one for every size")
  add("--batch_sizes", nargs="+", type=int, metavar="B", help="one for every size")
  add(
    "--workers", nargs="+", type=int, metavar="N",
    help="processes that read rows; the training loop has the first of these numbers",
  )
  add("--rounds", type=int, help="turns of every contestant")
  add("--steps_per_round", type=int)
  add(
    "--sources", nargs="+", default=list(SOURCES), choices=SOURCES, metavar="SOURCE",
    help="bytes, bpe: tokens in memory; prepared: bytes in an ArrayRecord folder",
  )
  add("--depths", nargs="+", type=int, default=[0, 1], metavar="D")
  add("--text", default="stdlib", help="data.source: the text, one without a path")
  add("--bpe_vocab", type=int, default=1024, help="of the tokenizer that is trained")
  add("--least_seconds", type=float, default=0.3, help="of every timed piece of work")
  add_huge_pages(parser)
  add_output(parser, "tiny rows of a small text, two rounds")
  parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
  """Measures, prints the tables, writes them and their figures.

  Raises:
    ConfigError: sizes without a T and a B each, or sizes that no model has.
  """
  apply_preset(args, _PRESETS, _QUICK)
  for key in ("seq_lens", "batch_sizes"):
    if len(getattr(args, key)) != len(args.models):
      raise ConfigError(
        f"--{key} must be one for each of the {len(args.models)} --models, got "
        f"{getattr(args, key)}."
      )
  shapes = list(zip(args.models, args.seq_lens, args.batch_sizes, strict=True))
  for shape in shapes:  # Before the text is read, which takes a while.
    for depth in args.depths:
      validate(_config(args, shape, depth), 1)
  num_cells = len(shapes) * len(args.sources) * len(args.depths)
  say = Progress(num_cells * (3 + 2 * len(args.workers)), args.rounds)
  with tempfile.TemporaryDirectory() as folder:
    sources = {name: _write_source(args, name, Path(folder)) for name in args.sources}
    rows = [
      _measure(args, shape, depth, name, *source, say)
      for shape in shapes
      for name, source in sources.items()
      for depth in args.depths
    ]
  record = header(args) | {"rows": rows}
  name = "input-quick" if args.quick else f"input-{slug(rows[0]['hardware'])}"
  write(args.output, name, record, markdown(record))


def _config(
  args: argparse.Namespace, shape: tuple[str, int, int], depth: int
) -> Config:
  size, seq_len, batch_size = shape
  values = {"seq_len": seq_len, "batch_size": batch_size, "kind": "sequential"}
  config = make_config(argparse.Namespace(**values), size, "llama", 264, depth)
  return with_overrides(
    config, {"data.source": args.text, "data.num_workers": args.workers[0]}
  )


def _write_source(
  args: argparse.Namespace, name: str, folder: Path
) -> tuple[dict[str, Any], Path]:
  """Returns the config values of a source, and the file of its training tokens."""
  config = _config(args, (args.models[0], args.seq_lens[0], args.batch_sizes[0]), 0)
  values: dict[str, Any] = {}
  if name == "bpe":
    vocab = {"tokenizer.vocab_size": args.bpe_vocab}
    trained = with_overrides(config, vocab | {"tokenizer.kind": "bpe"})
    path = folder / "tokenizer.json"
    save_tokenizer(load_corpus(trained).tokenizer, path)  # Once for all contestants.
    values = vocab | {"tokenizer.kind": "file", "tokenizer.path": str(path)}
  elif name == "prepared":
    path = folder / name
    prepare_folder(config, path, num_workers=1, shard_size=1 << 26)
    values = {"data.source": "array_record", "data.path": str(path)}
  rows = load_corpus(with_overrides(config, values)).train_rows(1)
  file = folder / f"{name}.bin"
  np.concatenate([row.tokens.astype(np.uint16) for row in rows]).tofile(file)
  return values, file


def _measure(
  args: argparse.Namespace,
  shape: tuple[str, int, int],
  depth: int,
  source: str,
  values: dict[str, Any],
  file: Path,
  say: Progress,
) -> dict[str, Any]:
  """Returns the row of one size, source and depth, its contestants in turns."""
  config = with_overrides(_config(args, shape, depth), values)
  row: dict[str, Any] = {
    "size": shape[0],
    "parameters": accounting.count(config).total,
    "depth": depth,
    "source": source,
    "seq_len": config.data.seq_len,
    "batch_size": config.data.batch_size,
    "hardware": "unknown",
    "contestants": {},
  }
  makes: dict[str, Callable[[Config], Callable[[], None]]] = {
    _FLOOR: functools.partial(_copies, file=file)
  }
  for count in args.workers:
    makes[_ours(count)] = functools.partial(_pipeline, num_workers=count)
    makes[_peer(count)] = functools.partial(_crops, file=file, num_workers=count)
  makes |= {_STEP: _fixed_step, _LOOP: _training_loop}
  with Turns(args.rounds, args.steps_per_round, say) as turns:
    for name, make in makes.items():
      build = functools.partial(_build, make, args.least_seconds)
      label = f"{shape[0]} D={depth} {source} {name}"
      turns.enter(label, Contestant(name, config, args.huge_pages, build), row)
    turns.take()
  return row


def _build(
  make: Callable[[Config], Callable[[], Any]],
  least_seconds: float,
  config: Config,
  name: str,
) -> tuple[Callable[[], Any], Ready]:
  """Returns as many turns of `make(config)` at once as fill `least_seconds`, warm."""
  take, count = make(config), 1

  def step() -> Any:
    for _ in range(count):
      started = take()
    return started

  step()
  step()
  start = time.perf_counter()
  step()
  # Doubled, not extrapolated: the first batches were read ahead.
  while time.perf_counter() - start < least_seconds:
    count *= 2
    start = time.perf_counter()
    step()
  tokens = count * config.data.batch_size * config.data.seq_len
  return step, Ready(jax.devices()[0].device_kind, tokens)


def _copies(config: Config, *, file: Path) -> Callable[[], None]:
  """Copies a batch's tokens out of the memory map, one batch after the other."""
  tokens = np.memmap(file, np.uint16, "r")
  size, at = config.data.batch_size * config.data.seq_len, 0

  def take() -> None:
    nonlocal at
    np.array(tokens[at : at + size])
    at = at + size if at + 2 * size <= len(tokens) else 0

  return take


class Crops:
  """What a DataLoader reads: rows of T tokens and those one later, from anywhere."""

  def __init__(self, file: Path, seq_len: int):
    self._tokens = np.memmap(file, np.uint16, "r")
    self._seq_len = seq_len

  def __len__(self) -> int:
    return 1 << 40  # Without end.

  def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    begin, length = random.randrange(len(self._tokens) - self._seq_len), self._seq_len
    crop = self._tokens[begin : begin + length + 1].astype(np.int64)
    return crop[:-1], crop[1:]


def _crops(config: Config, *, file: Path, num_workers: int) -> Callable[[], None]:
  """Takes batches of the peer to the device."""
  import torch  # Optional, and only this process needs it.

  cuda = torch.cuda.is_available()
  batches = iter(
    torch.utils.data.DataLoader(
      Crops(file, config.data.seq_len),
      batch_size=config.data.batch_size,
      num_workers=num_workers,
      pin_memory=cuda,
    )
  )

  def take() -> None:
    for rows in next(batches):
      rows.to("cuda" if cuda else "cpu", non_blocking=True)
    if cuda:
      torch.cuda.synchronize()

  return take


def _pipeline(config: Config, *, num_workers: int) -> Callable[[], Batch]:
  """Takes batches of ours to the device, waiting for each while the next is read."""
  put, load = _loader(with_overrides(config, {"data.num_workers": num_workers}))
  previous = None

  def take() -> Batch:
    nonlocal previous
    current = put(load())
    jax.block_until_ready(previous)
    previous = current
    return current

  return take


def _fixed_step(config: Config) -> Callable[[], jax.Array]:
  """Trains on the first batch of the pipeline, which stays on the device."""
  put, load = _loader(config)
  batch = put(load())
  return _trains(config, batch, lambda: batch)


def _training_loop(config: Config) -> Callable[[], jax.Array]:
  """Trains on what the pipeline delivers."""
  put, load = _loader(config)
  return _trains(config, put(load()), lambda: put(load()))


def _loader(config: Config) -> tuple[Callable[[Batch], Batch], Callable[[], Batch]]:
  """Returns what puts rows on the device, and what reads them."""
  data = config.data
  loader = TrainLoader(
    load_corpus(config).train_rows(1 + config.mtp.depth),
    batch_size=data.batch_size,
    seed=data.seed,
    num_workers=data.num_workers,
  )
  mesh = make_mesh(config.mesh, jax.devices()[:1])
  jax.set_mesh(mesh)

  def put(batch: Batch) -> Batch:
    rows = jax.tree.map(lambda x: x[None], batch)  # One microbatch.
    return put_batch(mesh, rows, ("microbatch",))

  return put, lambda: next(loader)


def _trains(
  config: Config, batch: Batch, load: Callable[[], Batch]
) -> Callable[[], jax.Array]:
  """Returns a training step; as in `train.fit`, the next batch is loaded meanwhile."""
  one = programs(shape_of(config), make_mesh(config.mesh, jax.devices()[:1]))
  state, hyper = one.init(np.int32(0)), hyperparameters(config)
  program = compiled(one.step, state, batch, hyper, np.bool_(True))
  previous = None

  def take() -> jax.Array:
    nonlocal state, batch, previous
    state, report = program(state, batch, hyper, np.bool_(True))
    batch = load()
    jax.block_until_ready(previous)
    previous = report["loss_total"]
    return previous

  return take


def markdown(record: dict[str, Any]) -> str:
  """Returns the tables of a benchmark record, with what is needed to read them."""
  rows, settings = record["rows"], record["settings"]
  workers = settings["workers"]
  parts = [
    *heading(
      "Input: what the data pipeline delivers, against what a train step takes",
      record, rows[0]["hardware"],
    ),
    "Llama, with one sequential module per depth D, in "
    f"{'float32' if rows[0]['hardware'] == 'cpu' else 'bfloat16'}; on a CPU T and B "
    "are small at 350 million parameters, so that a step takes seconds. Text: "
    f"`{settings['text']}`. {settings['rounds']} interleaved rounds of "
    f"{settings['steps_per_round']} turns of at least {settings['least_seconds']} s. "
    "Figures: median over rounds, ratios [least, greatest].",
    "",
    "## Does a step wait for its rows?",
    "",
    "- step: a train step on one batch that stays on the device, in ms: the floor.",
    f"- loop: the same step, each batch read with {workers[0]} worker processes and "
    "put on the device while the step before it runs, as in training, in ms.",
    "- loop / step: 1.00 is a step that never waits. On a CPU reading takes time from "
    "the step's own cores.",
    "- appetite: tokens per second of the step, in millions.",
    "- headroom: what the pipeline delivers alone with that many workers, over the "
    "appetite; must be above 1. Headroom of the peer: the same of the DataLoader.",
    "",
  ]
  parts += table(
    (
      "parameters", "D", "T", "B", "source", "step (floor)", "loop (ours)",
      "loop / step", "appetite", "headroom", "headroom of the peer",
    ),
    [_appetite_row(row, workers[0]) for row in rows],
  )
  parts += [
    "",
    "## What the pipeline delivers",
    "",
    "Millions of tokens per second, to a consumer that does nothing; 0 workers: read "
    "by threads of the training process (peer: by its main thread).",
    "",
    "- floor: one numpy copy of a batch's tokens (2 bytes each) out of a memory map, "
    "from front to back.",
    "- ours: shuffled, packed rows with segment ids and positions, from the store to "
    "arrays on the device. Sources: bytes and bpe are tokens in memory, prepared is an "
    "ArrayRecord folder.",
    "- peer: a PyTorch DataLoader over that map, rows cut at random, tokens and "
    "targets alone, to the device.",
    "- floor / ours: how many times as much the bare copy delivers.",
    "- ours / peer: above 1 ours delivers more.",
    "",
  ]
  parts += table(
    (
      "T", "B", "D", "source", "workers", "floor", "ours", "peer", "floor / ours",
      "ours / peer",
    ),
    [_delivery_row(row, count) for row in rows for count in workers],
  )
  failures = [
    f"- {row['parameters']:,} parameters, D={row['depth']}, {row['source']}, {name}: "
    f"{figures['error']}"
    for row in rows
    for name, figures in row["contestants"].items()
    if "error" in figures
  ]
  if failures:
    parts += ["", "Failed:", "", *failures]
  return "\n".join(parts) + "\n"


def _appetite_row(row: dict[str, Any], workers: int) -> tuple[Any, ...]:
  batch = row["seq_len"] * row["batch_size"]
  step, loop = _rates(row, _STEP), _rates(row, _LOOP)
  milliseconds = lambda rates: _median([batch / x * 1e3 for x in rates], ".1f")  # noqa: E731
  return (
    f"{row['parameters']:,}", row["depth"], row["seq_len"], row["batch_size"],
    row["source"], milliseconds(step), milliseconds(loop), spread(ratios(step, loop)),
    _millions(step), spread(ratios(_rates(row, _ours(workers)), step)),
    spread(ratios(_rates(row, _peer(workers)), step)),
  )


def _delivery_row(row: dict[str, Any], workers: int) -> tuple[Any, ...]:
  floor, ours, peer = (
    _rates(row, name) for name in (_FLOOR, _ours(workers), _peer(workers))
  )
  return (
    row["seq_len"], row["batch_size"], row["depth"], row["source"], workers,
    _millions(floor), _millions(ours), _millions(peer), spread(ratios(floor, ours)),
    spread(ratios(ours, peer)),
  )


def _ours(workers: int) -> str:
  return f"ours, {workers} workers"


def _peer(workers: int) -> str:
  return f"torch, {workers} workers"


def _rates(row: dict[str, Any], name: str) -> list[float]:
  """Tokens per second in the median turn of every round; empty if there is none."""
  figures = row["contestants"].get(name, {})
  return [
    figures["tokens"] / statistics.median(turns)
    for turns in figures.get("seconds", [])
  ]


def _median(values: list[float], form: str) -> str:
  return f"{statistics.median(values):{form}}" if values else "-"


def _millions(rates: list[float]) -> str:
  return _median([rate / 1e6 for rate in rates], ".3g")
