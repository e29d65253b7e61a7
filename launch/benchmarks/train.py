"""`launch.benchmark train`: our train step against a plain PyTorch one, and its floor.

A step is forward, backward, clipping and AdamW, on random tokens, one document per row.
The contestants of one trunk and vocabulary, all depths together, take turns for several
rounds; every ratio is formed within a round, so that a machine that is busy for a while
slows both of its sides. The floor takes turns with them: products of large matrices,
at whose rate the model's FLOPs would take so long.
"""

import argparse
import ast
import functools
import statistics
from typing import Any

from launch.benchmarks.contestants import (
  NAMES,
  Contestant,
  Turns,
  build_train_step,
)
from launch.benchmarks.limits import build_products
from launch.benchmarks.records import (
  MODELS,
  Progress,
  add_huge_pages,
  add_output,
  add_trace,
  apply_preset,
  floor_seconds,
  header,
  heading,
  make_config,
  new_parser,
  ratios,
  rounds_of,
  slug,
  spread,
  table,
  write,
)
from launch.huge_pages import HUGE_PAGES
from mtp_jax import accounting
from mtp_jax.config import Config, ConfigError, with_overrides
from mtp_jax.config_rules import validate
from mtp_jax.metrics import peak_flops

_PRESETS = {
  "cpu": {
    "models": ["5M"], "trunks": ["gpt2", "llama"], "vocabs": [264, 50304],
    "depths": [0, 1, 3], "seq_len": 256, "batch_size": 16, "rounds": 7,
    "steps_per_round": 2, "contestants": list(NAMES), "apart": False,
  },
  "gpu": {
    "models": ["124M", "350M"], "trunks": ["llama"], "vocabs": [50304],
    "depths": [0, 1, 3], "seq_len": 1024, "batch_size": 16, "rounds": 5,
    "steps_per_round": 10, "contestants": ["jax", "torch.compile"], "apart": True,
  },
}
_QUICK = {
  "models": ["tiny"], "trunks": ["llama"], "vocabs": [264], "depths": [0, 1],
  "seq_len": 64, "batch_size": 4, "rounds": 2, "steps_per_round": 2,
  "contestants": ["jax", "torch eager"], "apart": False,
}
_FLOOR = "floor"
_XLA_FLAGS = "XLA_FLAGS"


def add_parser(commands: Any) -> None:
  """Adds the `train` subcommand to the subparsers of `launch.benchmark`."""
  parser = new_parser(
    commands, "train", _PRESETS, __doc__,
    "our train step against PyTorch and its floor: time, cost of depth, memory",
    (
      "  python -m launch.benchmark train --quick        a check that takes seconds\n"
      "  python -m launch.benchmark train                the published table of a CPU\n"
      "  python -m launch.benchmark train --trunks gpt2 --vocabs 264 --depths 0 1\n"
      "  python -m launch.benchmark train --preset gpu   one GPU, 124M and 350M\n"
      "  python -m launch.benchmark train --preset gpu --models 350M --depths 0 \\\n"
      "    --contestants jax --variants trunk.attention=xla trunk.attention=cudnn \\\n"
      "    trunk.remat=none trunk.remat=full loss.block_tokens=16384\n"
    ),
  )
  add = parser.add_argument
  add("--models", nargs="+", choices=list(MODELS), help="by number of parameters")
  add("--trunks", nargs="+", choices=["gpt2", "llama"])
  add("--vocabs", nargs="+", type=int, metavar="V")
  add("--depths", nargs="+", type=int, metavar="D")
  add(
    "--kind", default="sequential",
    choices=["sequential", "parallel", "linear", "medusa"],
    help="predictors at D > 0; D = 0 is plain next-token prediction",
  )
  add("--seq_len", type=int)
  add("--batch_size", type=int)
  add("--rounds", type=int, help="turns of every contestant")
  add("--steps_per_round", type=int)
  add(
    "--contestants", nargs="+", choices=NAMES, metavar="NAME",
    help=f"of {', '.join(map(repr, NAMES))}",
  )
  add(
    "--variants", nargs="+", default=[], metavar="KEY=VALUE",
    help="more JAX contestants, each with one other value in its config; or with "
    f"{_XLA_FLAGS}=... in its environment",
  )
  add(
    "--apart", action=argparse.BooleanOptionalAction, default=None,
    help="end each contestant before the next is built, where memory does not hold "
    "all; they then take no turns",
  )
  add("--name", help="of the two files; by default train-DEVICE")
  add_huge_pages(parser)
  add_trace(parser)
  add_output(parser, "tiny sizes, two rounds, no torch.compile")
  parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
  """Measures, prints the table, writes it and its figures.

  Raises:
    ConfigError: a variant or sizes that no model has.
  """
  apply_preset(args, _PRESETS, _QUICK)
  groups = [
    (model, trunk, vocab)
    for model in args.models for trunk in args.trunks for vocab in args.vocabs
  ]
  cases = {
    group: [_config(args, *group, depth) for depth in args.depths] for group in groups
  }
  entrants = {
    group: [_entrants(args, config) for config in configs]
    for group, configs in cases.items()
  }
  num_entrants = len(args.contestants) + len(args.variants)
  say = Progress(len(groups) * (1 + len(args.depths) * num_entrants), args.rounds)
  rows = [
    row
    for group in groups
    for row in _measure_group(args, group[0], cases[group], entrants[group], say)
  ]
  record = header(args) | {"rows": rows}
  hardware = slug(rows[0]["hardware"])
  name = args.name or ("train-quick" if args.quick else f"train-{hardware}")
  write(args.output, name, record, markdown(record))


def _config(
  args: argparse.Namespace, model: str, trunk: str, vocab: int, depth: int
) -> Config:
  config = make_config(args, model, trunk, vocab, depth)
  validate(config)
  return config


def _entrants(
  args: argparse.Namespace, config: Config
) -> dict[str, tuple[Config, str | None]]:
  """Returns config and XLA flags of every contestant of a row, by name."""
  found: dict[str, tuple[Config, str | None]] = {
    name: (config, None) for name in args.contestants
  }
  for text in args.variants:
    key, is_given, value = text.partition("=")
    if not is_given:
      raise ConfigError(f"--variants must be KEY=VALUE, got {text!r}.")
    if key == _XLA_FLAGS:
      found[f"jax {text}"] = (config, value)
      continue
    changed = with_overrides(config, {key: _value(value)})
    validate(changed)
    found[f"jax {text}"] = (changed, None)
  return found


def _value(text: str) -> Any:
  """What a text means as a value of a config: a number, a truth or itself."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def _measure_group(
  args: argparse.Namespace,
  model: str,
  configs: list[Config],
  entrants: list[dict[str, tuple[Config, str | None]]],
  say: Progress,
) -> list[dict[str, Any]]:
  """Returns the table rows of one model and vocabulary, all contestants in turns."""
  rows: list[dict[str, Any]] = []
  with Turns(
    args.rounds, args.steps_per_round, say, args.apart, args.trace
  ) as turns:
    floor: dict[str, Any] = {"contestants": {}}
    build = functools.partial(
      Contestant, config=configs[0], huge_pages=args.huge_pages, build=build_products
    )
    turns.enter(f"{model} {_FLOOR}", build(_FLOOR), floor)
    for config, named in zip(configs, entrants, strict=True):
      counts = accounting.count(config)
      row = {
        "model": model,
        "trunk": config.trunk.kind,
        "vocab": config.tokenizer.vocab_size,
        "kind": config.mtp.kind,
        "depth": config.mtp.depth,
        "parameters": counts.total,
        "flops_per_token": counts.train_flops_per_token,
        "hardware": "unknown",
        "floor": floor["contestants"][_FLOOR],
        "contestants": {},
      }
      rows.append(row)
      for name, (changed, flags) in named.items():
        label = f"{model} {row['trunk']} V={row['vocab']} D={row['depth']} {name}"
        contestant = Contestant(
          name, changed, args.huge_pages,
          functools.partial(build_train_step, xla_flags=flags),
        )
        turns.enter(label, contestant, row)
    turns.take()
  return rows


def markdown(record: dict[str, Any]) -> str:
  """Returns the tables of a benchmark record, with what is needed to read them."""
  rows, settings = record["rows"], record["settings"]
  names = list(dict.fromkeys(name for row in rows for name in row["contestants"]))
  torch = [name for name in names if name.startswith("torch")]
  others = [name for name in names if name not in ("jax", *torch)]
  no_depth = {_model(r): r for r in rows if r["depth"] == 0}
  turns = "separate" if settings["apart"] else "interleaved"
  tokens = settings["seq_len"] * settings["batch_size"]
  parts = [
    *heading(
      "Train step: JAX, its floor, PyTorch",
      record, rows[0]["hardware"], f"; {_threads(rows)} threads each",
    ),
    f"T={settings['seq_len']}, B={settings['batch_size']}, kind {settings['kind']} at "
    f"D > 0. {settings['rounds']} {turns} rounds of {settings['steps_per_round']} "
    "steps. Times in ms: median over rounds. Ratios: median over rounds [least, "
    "greatest]; below 1 the JAX step is the faster. Floor: the model's FLOPs at the "
    "rate of products of large matrices, measured in every round; floor / jax is the "
    "utilisation in these terms. MFU: the same against the maker's figure for dense "
    f"bfloat16, where it is known. {_page_note(settings['huge_pages'])}",
    "",
  ]
  parts += table(
    (*_MODEL, "floor", *names, "floor / jax", "MFU", "jax / faster torch"),
    [
      (
        *_model_cells(r),
        _median([1e3 * x for x in _floor(r, tokens)], 1),
        *(_median([1e3 * x for x in rounds_of(r, n)], 0) for n in names),
        spread(ratios(_floor(r, tokens), rounds_of(r, "jax"))),
        _mfu(r, tokens),
        spread(_against_torch(r, torch)),
      )
      for r in rows
    ],
  )
  if others:
    parts += ["", "Variants: their step time over that of `jax`.", ""]
    parts += table(
      (*_MODEL, *(f"`{n.removeprefix('jax ')}`" for n in others)),
      [
        (
          *_model_cells(r),
          *(spread(ratios(rounds_of(r, n), rounds_of(r, "jax"))) for n in others),
        )
        for r in rows
      ],
    )
  parts += ["", "Cost of depth: step time over that of D = 0, against model FLOPs.", ""]
  parts += table(
    (*_MODEL, "FLOP ratio", *(f"{n} D/0" for n in names), "jax D/0 over FLOP ratio"),
    [
      _depth_row(r, no_depth[_model(r)], names)
      for r in rows
      if r["depth"] and _model(r) in no_depth
    ],
  )
  parts += [
    "",
    "Peak memory of one warm step, model and optimizer state included, in MB: on a CPU "
    "the growth of the resident set, on a GPU the allocator's peak. Last columns: "
    "arguments and temporaries of the compiled JAX step by XLA's own analysis; weights "
    "and the optimizer's state alone (three times four bytes a parameter).",
    "",
  ]
  parts += table(
    (*_MODEL, *names, "jax (XLA)", "state"),
    [
      (
        *_model_cells(r),
        *(_megabytes(r, n, "peak_memory") for n in names),
        _megabytes(r, "jax", "xla_memory"),
        f"{12 * r['parameters'] / 1e6:.0f}",
      )
      for r in rows
    ],
  )
  failures = [
    f"- {r['model']} {r['trunk']}, vocabulary {r['vocab']}, D={r['depth']}, {name}: "
    f"{c['error']}"
    for r in rows
    for name, c in (r["contestants"] | {_FLOOR: r["floor"]}).items()
    if "error" in c
  ]
  if failures:
    parts += ["", "Failed:", "", *failures]
  return "\n".join(parts) + "\n"


_MODEL = ("model", "trunk", "vocab", "D")


def _model(row: dict[str, Any]) -> tuple[Any, ...]:
  return row["model"], row["trunk"], row["vocab"]


def _model_cells(row: dict[str, Any]) -> tuple[Any, ...]:
  return (*_model(row), row["depth"])


def _floor(row: dict[str, Any], tokens: int) -> list[float]:
  return floor_seconds(row["floor"], row["flops_per_token"] * tokens)


def _mfu(row: dict[str, Any], tokens: int) -> str:
  peak, seconds = peak_flops(row["hardware"]), rounds_of(row, "jax")
  if peak is None or not seconds:
    return "-"
  return f"{row['flops_per_token'] * tokens / statistics.median(seconds) / peak:.0%}"


def _against_torch(row: dict[str, Any], names: list[str]) -> list[float]:
  """Per round: our time over that of the torch contestant with the lower median."""
  peers = [n for n in names if rounds_of(row, n)]
  if not peers or not rounds_of(row, "jax"):
    return []
  faster = min(peers, key=lambda n: statistics.median(rounds_of(row, n)))
  return ratios(rounds_of(row, "jax"), rounds_of(row, faster))


def _depth_row(
  row: dict[str, Any], plain: dict[str, Any], names: list[str]
) -> tuple[Any, ...]:
  flops = row["flops_per_token"] / plain["flops_per_token"]
  measured = {n: ratios(rounds_of(row, n), rounds_of(plain, n)) for n in names}
  return (
    *_model_cells(row), f"{flops:.2f}", *(spread(measured[n]) for n in names),
    spread([ratio / flops for ratio in measured.get("jax", [])]),
  )


def _median(values: list[float], digits: int) -> str:
  return f"{statistics.median(values):.{digits}f}" if values else "-"


def _megabytes(row: dict[str, Any], name: str, key: str) -> str:
  size = row["contestants"].get(name, {}).get(key)
  return "-" if size is None else f"{size / 1e6:.0f}"


def _threads(rows: list[dict[str, Any]]) -> str:
  contestants = [c for row in rows for c in row["contestants"].values()]
  counts = {c["threads"] for c in contestants if "threads" in c}
  return " or ".join(map(str, sorted(counts)))


def _page_note(huge_pages: bool) -> str:
  if huge_pages:
    return f"Every contestant was started with `{'='.join(HUGE_PAGES)}`."
  return "Huge pages were left as the system has them."
