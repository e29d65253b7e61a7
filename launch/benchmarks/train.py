"""`launch.benchmark train`: our train step against a plain PyTorch one.

A step is forward, backward, clipping and AdamW, on random tokens, one document per row.
The contestants of one trunk and vocabulary, all depths together, take turns for several
rounds; every ratio is formed within a round, so that a machine that is busy for a while
slows both of its sides.
"""

import argparse
import statistics
from typing import Any

from launch.benchmarks.contestants import NAMES, Contestant, Turns
from launch.benchmarks.records import (
  Progress,
  add_huge_pages,
  add_output,
  header,
  make_config,
  ratios,
  slug,
  spread,
  table,
  write,
)
from launch.huge_pages import HUGE_PAGES
from mtp_jax.accounting import train_flops_per_token
from mtp_jax.config import Config
from mtp_jax.config_rules import validate

_QUICK = {
  "trunks": ["llama"], "vocabs": [264], "depths": [0, 1], "embed_dim": 64,
  "num_layers": 2, "seq_len": 64, "batch_size": 4, "rounds": 2,
  "contestants": ["jax", "torch eager"],
}


def add_parser(commands: Any) -> None:
  """Adds the `train` subcommand to the subparsers of `launch.benchmark`."""
  parser = commands.add_parser(
    "train",
    help="our train step against PyTorch: time, cost of depth, memory",
    description=__doc__,
    epilog=(
      "Examples:\n"
      "  python -m launch.benchmark train --quick        a check that takes seconds\n"
      "  python -m launch.benchmark train                the published table\n"
      "  python -m launch.benchmark train --trunks gpt2 --vocabs 264 --depths 0 1\n"
    ),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--trunks", nargs="+", default=["gpt2", "llama"], choices=["gpt2", "llama"])
  add("--vocabs", nargs="+", type=int, default=[264, 50304], metavar="V")
  add("--depths", nargs="+", type=int, default=[0, 1, 3], metavar="D")
  add(
    "--kind", default="sequential",
    choices=["sequential", "parallel", "linear", "medusa"],
    help="predictors at D > 0; D = 0 is plain next-token prediction",
  )
  add("--embed_dim", type=int, default=256)
  add("--num_layers", type=int, default=6)
  add("--num_heads", type=int, default=4, help="Llama has half as many kv heads")
  add("--seq_len", type=int, default=256)
  add("--batch_size", type=int, default=16)
  add("--rounds", type=int, default=7, help="turns of every contestant")
  add("--steps_per_round", type=int, default=2)
  add(
    "--contestants", nargs="+", default=list(NAMES), choices=NAMES, metavar="NAME",
    help=f"of {', '.join(map(repr, NAMES))}",
  )
  add_huge_pages(parser)
  add_output(parser, "tiny sizes, two rounds, no torch.compile")
  parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
  """Measures, prints the table, writes it and its figures."""
  if args.quick:
    vars(args).update(_QUICK)
  groups = [(trunk, vocab) for trunk in args.trunks for vocab in args.vocabs]
  cases = {
    group: [(d, make_config(args, *group, depth=d)) for d in args.depths]
    for group in groups
  }
  for configs in cases.values():
    for _, config in configs:
      validate(config)
  say = Progress(len(groups) * (len(args.depths) * len(args.contestants)), args.rounds)
  rows = [row for group in groups for row in _measure_group(args, cases[group], say)]
  record = header(args) | {"rows": rows}
  name = "train-quick" if args.quick else f"train-{slug(rows[0]['hardware'])}"
  write(args.output, name, record, markdown(record))


def _measure_group(
  args: argparse.Namespace, configs: list[tuple[int, Config]], say: Progress
) -> list[dict[str, Any]]:
  """Returns the table rows of one trunk and vocabulary, all contestants in turns."""
  rows = []
  with Turns(args.rounds, args.steps_per_round, say) as turns:
    for _, config in configs:
      row = {
        "trunk": config.trunk.kind,
        "vocab": config.tokenizer.vocab_size,
        "kind": config.mtp.kind,
        "depth": config.mtp.depth,
        "flops_per_token": train_flops_per_token(config),
        "hardware": "unknown",
        "contestants": {},
      }
      rows.append(row)
      for name in args.contestants:
        label = f"{row['trunk']} V={row['vocab']} D={row['depth']} {name}"
        turns.enter(label, Contestant(name, config, args.huge_pages), row)
    turns.take()
  return rows


def markdown(record: dict[str, Any]) -> str:
  """Returns the tables of a benchmark record, with what is needed to read them."""
  rows, settings = record["rows"], record["settings"]
  no_depth = {(r["trunk"], r["vocab"]): r for r in rows if r["depth"] == 0}
  parts = [
    "# Train step: JAX against PyTorch",
    "",
    f"`{record['command']}`",
    "",
    f"{record['date']}, commit {record['commit']}, {record['hardware']}; "
    + ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    + f"; {_threads(rows)} threads each.",
    "",
    f"d={settings['embed_dim']}, {settings['num_layers']} layers, "
    f"{settings['num_heads']} heads, T={settings['seq_len']}, "
    f"B={settings['batch_size']}, kind {settings['kind']} at D > 0. "
    f"{settings['rounds']} interleaved rounds of {settings['steps_per_round']} steps. "
    "Times: median over rounds. Ratios: median over rounds [least, greatest]; "
    "below 1 the JAX step is the faster. "
    + _page_note(settings["huge_pages"]),
    "",
  ]
  parts += table(
    ("trunk", "vocab", "D", *(f"{n} ms" for n in NAMES), "jax / faster torch"),
    [
      (
        r["trunk"], r["vocab"], r["depth"],
        *(_milliseconds(r, n) for n in NAMES),
        spread(_against_torch(r)),
      )
      for r in rows
    ],
  )
  parts += ["", "Cost of depth: step time over that of D = 0, against model FLOPs.", ""]
  parts += table(
    (
      "trunk", "vocab", "D", "FLOP ratio", *(f"{n} D/0" for n in NAMES),
      "jax D/0 over FLOP ratio",
    ),
    [
      _depth_row(r, no_depth[r["trunk"], r["vocab"]])
      for r in rows
      if r["depth"] and (r["trunk"], r["vocab"]) in no_depth
    ],
  )
  parts += [
    "",
    "Peak memory of one warm step, model and optimizer state included, in MB: on a CPU "
    "the growth of the resident set, on a GPU the allocator's peak. Last column: "
    "arguments and temporaries of the compiled JAX step by XLA's own analysis.",
    "",
  ]
  parts += table(
    ("trunk", "vocab", "D", *NAMES, "jax (XLA)"),
    [
      (
        r["trunk"], r["vocab"], r["depth"],
        *(_megabytes(r, n, "peak_memory") for n in NAMES),
        _megabytes(r, "jax", "xla_memory"),
      )
      for r in rows
    ],
  )
  failures = [
    f"- {r['trunk']}, vocabulary {r['vocab']}, D={r['depth']}, {name}: {c['error']}"
    for r in rows
    for name, c in r["contestants"].items()
    if "error" in c
  ]
  if failures:
    parts += ["", "Failed:", "", *failures]
  return "\n".join(parts) + "\n"


def _against_torch(row: dict[str, Any]) -> list[float]:
  """Per round: our time over that of the torch contestant with the lower median."""
  peers = [n for n in NAMES if n != "jax" and _rounds(row, n)]
  if not peers or not _rounds(row, "jax"):
    return []
  faster = min(peers, key=lambda n: statistics.median(_rounds(row, n)))
  return ratios(_rounds(row, "jax"), _rounds(row, faster))


def _depth_row(row: dict[str, Any], plain: dict[str, Any]) -> tuple[Any, ...]:
  floor = row["flops_per_token"] / plain["flops_per_token"]
  measured = {n: ratios(_rounds(row, n), _rounds(plain, n)) for n in NAMES}
  return (
    row["trunk"], row["vocab"], row["depth"], f"{floor:.2f}",
    *(spread(measured[n]) for n in NAMES),
    spread([ratio / floor for ratio in measured["jax"]]),
  )


def _rounds(row: dict[str, Any], name: str) -> list[float]:
  """The median step time of every round; empty if the contestant has none."""
  seconds = row["contestants"].get(name, {}).get("seconds", [])
  return [statistics.median(steps) for steps in seconds]


def _milliseconds(row: dict[str, Any], name: str) -> str:
  rounds = _rounds(row, name)
  return f"{statistics.median(rounds) * 1e3:.0f}" if rounds else "-"


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
