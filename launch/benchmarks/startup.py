"""`launch.benchmark startup`: from the command to the first step; what a save costs.

The start is that of the real command, `python -m launch.train` on the Python standard
library's source, with an empty compilation cache and with the one that this filled.
Beside it a floor, JAX, its devices and the program alone, and PyTorch's first step.
Every start is a new process; all take turns, and ratios are formed within a round.
Saves are looked at in a real run: windows of steps that begin with one, against those
without, alternating.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments import base
from launch.benchmarks.contestants import Failed
from launch.benchmarks.records import (
  MODELS,
  Progress,
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
from mtp_jax.config import (
  Config,
  ConfigError,
  difference,
  from_config_dict,
  to_dict,
  with_overrides,
)
from mtp_jax.config_rules import validate

TABLES = ("start", "saves")
PEERS = ("torch eager", "torch.compile")
_PRESETS = {
  "cpu": {
    "models": ["0.3M", "10M"], "save_models": ["1M", "10M"], "depths": [0, 1],
    "vocab": 264, "seq_len": 128, "batch_size": 16, "rounds": 3,
    "window": 100, "saves": 2,
  },
  "gpu": {
    "models": ["124M", "350M"], "save_models": ["350M"], "depths": [0, 1],
    "vocab": 50304, "seq_len": 1024, "batch_size": 8, "rounds": 5,
    "window": 100, "saves": 3,
  },
}
_QUICK = {
  "models": ["0.3M"], "save_models": ["0.3M"], "depths": [0], "vocab": 264,
  "seq_len": 32, "batch_size": 2, "rounds": 1, "window": 10,
  "saves": 2, "peers": ["torch eager"],
}
# Returns what it measured; raises Failed if it cannot.
Turn = Callable[[], dict[str, Any]]

_ROOT = Path(__file__).parents[2]
_OURS_ENDS, _PART_ENDS = ": first step after ", '{"'
# What comes after the first step is not looked at; it shall be short.
_SHORT_END = {
  "eval.num_rows": 1, "eval.rows_per_document": 1, "eval.line_prompts": 0,
  "eval.function_prompts": 0,
}


def add_parser(commands: Any) -> None:
  """Adds the `startup` subcommand to the subparsers of `launch.benchmark`."""
  parser = new_parser(
    commands, "startup", _PRESETS, __doc__,
    "time from the command to the first step, and what saving costs",
    (
      "  python -m launch.benchmark startup --quick        a check of half a minute\n"
      "  python -m launch.benchmark startup                the published tables\n"
      "  python -m launch.benchmark startup --preset gpu   those of a GPU\n"
      "  python -m launch.benchmark startup --tables saves --save_models 3M\n"
    ),
  )
  add = parser.add_argument
  add("--tables", nargs="+", default=list(TABLES), choices=TABLES)
  for name, what in (("--models", "that are started"), ("--save_models", "that save")):
    add(
      name, nargs="+", choices=list(MODELS), metavar="MODEL",
      help=f"{what}: {', '.join(MODELS)}",
    )
  add(
    "--depths", nargs="+", type=int, metavar="D",
    help="sequential modules; what saves has the most of these",
  )
  add("--vocab", type=int, help="size of the vocabulary; the text is bytes")
  add("--seq_len", type=int)
  add("--batch_size", type=int)
  add("--rounds", type=int, help="starts of every kind, and runs that save")
  add("--window", type=int, metavar="STEPS", help="of those with and without a save")
  add("--saves", type=int, help="of a run")
  add(
    "--peers", nargs="*", default=list(PEERS), choices=PEERS, metavar="NAME",
    help=f"of {', '.join(map(repr, PEERS))}",
  )
  add_output(parser, "one tiny size, one round, no torch.compile")
  parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
  """Measures, prints the tables, writes them and their figures.

  Raises:
    ConfigError: nothing to measure, or sizes that no model has.
  """
  apply_preset(args, _PRESETS, _QUICK)
  for key in ("window", "saves"):
    if getattr(args, key) < 1:
      raise ConfigError(f"--{key} must be at least 1, got {getattr(args, key)}.")
  starts, savers = [], []
  if "start" in args.tables:
    starts = [_config(args, size, D) for size in args.models for D in args.depths]
  if "saves" in args.tables:
    savers = [_config(args, size, max(args.depths)) for size in args.save_models]
  for config in (*starts, *savers):
    validate(config, 1)
  say = Progress(len(starts) + len(savers), args.rounds)
  record = header(args) | {
    "starts": [_measure_starts(args, config, say) for config in starts],
    "saves": [_measure_saves(args, config, say) for config in savers],
  }
  first = (record["starts"] + record["saves"])[0]
  name = "startup-quick" if args.quick else f"startup-{slug(first['hardware'])}"
  write(args.output, name, record, markdown(record))


def _config(args: argparse.Namespace, size: str, depth: int) -> Config:
  values = argparse.Namespace(**vars(args), kind="sequential")
  config = make_config(values, size, "llama", args.vocab, depth)
  return with_overrides(config, _SHORT_END)


def _row(config: Config) -> dict[str, Any]:
  return {
    "parameters": accounting.count(config).total,
    "depth": config.mtp.depth,
    "hardware": "unknown",
    "figures": {},
    "errors": {},
  }


def _label(row: dict[str, Any]) -> str:
  return f"{row['parameters']:,} parameters, D={row['depth']}"


def _measure_starts(
  args: argparse.Namespace, config: Config, say: Progress
) -> dict[str, Any]:
  """Returns the figures of one config: all its starts, in turns."""
  row = _row(config)
  say(f"{_label(row)}: starts")
  for number in range(args.rounds):
    with tempfile.TemporaryDirectory() as folder:
      ours, peers = _our_starts(config, Path(folder)), {}
      for name in args.peers:
        peers |= _torch_starts(config, Path(folder), name)
      # Every other round the peers come first.
      for name, start in (ours | peers if number % 2 == 0 else peers | ours).items():
        _note(row, name, start)
    say(f"{_label(row)}: round {number + 1}")
  return row


def _our_starts(config: Config, folder: Path) -> dict[str, Turn]:
  """Returns the starts of a round, which begins with an empty compilation cache.

  The order counts: the cold start fills the cache of the warm ones.
  """
  cache = folder / "xla"

  def start(name: str) -> dict[str, Any]:
    workdir = folder / name
    command = train_command(config, workdir, cache)
    seconds, _ = seconds_to_line(command, lambda line: _OURS_ENDS in line)
    said = json.loads((workdir / "startup.json").read_text())
    return {"total": seconds, "seconds": said["seconds"]}

  return {
    "ours cold": lambda: start("cold"),
    "ours warm": lambda: start("warm"),
    "floor cold": lambda: _part("floor", config, folder, ""),
    "floor warm": lambda: _part("floor", config, folder, str(cache)),
  }


def _torch_starts(config: Config, folder: Path, name: str) -> dict[str, Turn]:
  """Returns the starts of a peer in a round; inductor's cache begins empty."""
  if name == "torch eager":
    return {name: lambda: _part("torch", config, folder, "False")}
  cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
  start = lambda: _part("torch", config, folder, "True", **cache)  # noqa: E731
  return {f"{name} cold": start, f"{name} warm": start}


def _measure_saves(
  args: argparse.Namespace, config: Config, say: Progress
) -> dict[str, Any]:
  """Returns the figures of one config: runs that save, torch in turns."""
  row = _row(config)
  say(f"{_label(row)}: saves")
  for number in range(args.rounds):
    with tempfile.TemporaryDirectory() as folder:
      ours, peers = _saving_turns(args, config, Path(folder))
      for name, work in (ours | peers if number % 2 == 0 else peers | ours).items():
        _note(row, name, work)
    say(f"{_label(row)}: round {number + 1}")
  return row


def _saving_turns(
  args: argparse.Namespace, config: Config, folder: Path
) -> tuple[dict[str, Turn], dict[str, Turn]]:
  """Returns our turn of a round, and that of a peer if there are any."""
  run, saves = config_that_saves(config, args.window, args.saves), str(args.saves)
  ours = {"ours": lambda: _part("saves", run, folder, str(folder), str(args.window))}
  peers = {
    "torch.save": lambda: _part("torch_saves", config, folder, str(folder), saves)
  }
  return ours, peers if args.peers else {}


def config_that_saves(config: Config, window: int, saves: int) -> Config:
  """Returns a run with `saves` windows that begin with a save, as many without.

  They alternate. A first window and a first save are not among them.
  """
  overrides = {
    "train.num_steps": (2 * saves + 3) * window,
    "train.diagnostics_every": 0,  # They would be in some windows only.
    "checkpoint.every_steps": 2 * window,
  }
  return with_overrides(config, overrides)


def _note(row: dict[str, Any], name: str, work: Turn) -> None:
  """Adds what one turn measured; who has failed gets no more turns."""
  if name in row["errors"]:
    return
  try:
    figures = work()
  except Failed as error:
    row["errors"][name] = str(error)
    return
  row["hardware"] = figures.pop("hardware", row["hardware"])
  row["figures"].setdefault(name, []).append(figures)


def train_command(config: Config, workdir: Path, cache: Path) -> list[str]:
  """Returns the command that trains a config, as one would type it."""
  changes = difference(from_config_dict(base.get_config()), config)
  return [
    sys.executable, "-m", "launch.train", "--config=experiments/base.py",
    f"--workdir={workdir}", f"--compilation_cache={cache}",
    *(f"--config.{key}={value}" for key, (_, value) in changes.items()),
  ]


def _part(
  part: str, config: Config, folder: Path, *arguments: str, **variables: str
) -> dict[str, Any]:
  """Returns what a part says in a process of its own, and `total` seconds until then.

  Raises:
    Failed: it ended before.
  """
  file = folder / "config.json"
  file.write_text(json.dumps(to_dict(config)))
  module = "launch.benchmarks.startup_parts"
  command = [sys.executable, "-m", module, part, str(file), *arguments]
  seconds, line = seconds_to_line(
    command, lambda line: line.startswith(_PART_ENDS), **variables
  )
  return json.loads(line) | {"total": seconds}


def seconds_to_line(
  command: Sequence[str], is_wanted: Callable[[str], bool], **variables: str
) -> tuple[float, str]:
  """Returns the seconds from a command to the line wanted, and it; then kills it.

  Args:
    command: what is run, in the root of the repository.
    is_wanted: of a line of its stdout.
    variables: of its environment, besides ours.

  Raises:
    Failed: it ended before; the message is the last line of its stderr.
  """
  # The models are for one device.
  environment = {"CUDA_VISIBLE_DEVICES": "0"} | os.environ | variables
  with tempfile.TemporaryFile("w+") as errors:
    start = time.perf_counter()
    process = subprocess.Popen(
      command, cwd=_ROOT, env=environment, text=True,
      stdout=subprocess.PIPE, stderr=errors,
    )
    with process:
      for line in process.stdout:
        if is_wanted(line):
          seconds = time.perf_counter() - start
          process.kill()
          return seconds, line
    errors.seek(0)
    last = (errors.read().strip() or "no message").splitlines()[-1]
  raise Failed(f"process ended with code {process.returncode}: {last}")


def markdown(record: dict[str, Any]) -> str:
  """Returns the tables of a benchmark record, with what is needed to read them."""
  settings = record["settings"]
  rows = record["starts"] + record["saves"]
  parts = [
    *heading(
      "From the command to the first step, and what a save costs",
      record, rows[0]["hardware"],
    ),
    f"Llama with D sequential modules, T={settings['seq_len']}, "
    f"B={settings['batch_size']}, vocabulary {settings['vocab']}. "
    f"{settings['rounds']} round(s). Figures: median. Ratios: median over rounds "
    "[least, greatest], formed within a round; below 1 we are the faster.",
    "",
  ]
  if record["starts"]:
    parts += [_STARTS_NOTE, "", *_start_table(record["starts"]), ""]
  if record["saves"]:
    note = _SAVES_NOTE.format(window=settings["window"])
    parts += [note, "", *_save_table(record["saves"], settings["window"]), ""]
  failures = [
    f"- {_label(row)}, {name}: {error}"
    for row in rows
    for name, error in row["errors"].items()
  ]
  if failures:
    parts += ["Failed:", "", *failures, ""]
  return "\n".join(parts)


_STARTS_NOTE = (
  "Seconds from starting the process. Ours: `python -m launch.train` on the standard "
  "library's source until it says that its first step has ended; its phases are those "
  "of startup.json (launch/README.md), diagnostics included, which base.py asks for "
  "before the first step of D > 0. Cold: with an empty compilation cache; warm: with "
  "the one that the cold start left. Files are in the system's page cache. Floor: "
  "importing JAX and finding its devices, and XLA compiling the train step (cold) or "
  "loading it from that cache (warm). Peers: importing torch, building the same model "
  "and optimizer, and the first step, on random tokens: no text is read, nothing is "
  "written; eager has no cache, that of torch.compile is inductor's."
)
_SAVES_NOTE = (
  "Saves of a real run. {window} steps that begin with a save against the {window} "
  "before them, without one. Blocked: the loop, in one save: fingerprint, copy to the "
  "host, hand-over to the thread that writes. First: the same of the process' first "
  "save, which compiles the fingerprint and counts nowhere else. Stall: blocked over "
  "the time of 100 steps without a save. Slow-down: all that a save costs, writing in "
  "the background included, over the time of 100 steps; median [least, greatest] over "
  "the saves. Written: from a save to its last byte on the file system. Floor: copying "
  "the state to the host (on a CPU it is there already). Peer: `torch.save` of the "
  "same model and optimizer, which blocks."
)


def _start_table(rows: list[dict[str, Any]]) -> list[str]:
  phases = next(iter(_figures(rows[0], "ours cold", "seconds")), {})
  return table(
    (
      "parameters", "D", "cache", "floor s", "ours s", *phases,
      *(f"{peer} s" for peer in PEERS), "ours / floor",
      *(f"ours / {peer}" for peer in PEERS),
    ),
    [
      _start_row(row, cache, list(phases)) for row in rows for cache in ("cold", "warm")
    ],
  )


def _start_row(row: dict[str, Any], cache: str, phases: list[str]) -> tuple[Any, ...]:
  ours = _figures(row, f"ours {cache}", "total")
  floor = [sum(x.values()) for x in _figures(row, f"floor {cache}", "seconds")]
  peers = [
    _figures(row, "torch eager", "total"),
    _figures(row, f"torch.compile {cache}", "total"),
  ]
  said = _figures(row, f"ours {cache}", "seconds")
  return (
    f"{row['parameters']:,}", row["depth"], cache, _median(floor), _median(ours),
    *(_median([x[phase] for x in said]) for phase in phases),
    *map(_median, peers),
    *(spread(ratios(ours, x)) for x in (floor, *peers)),
  )


def _save_table(rows: list[dict[str, Any]], window: int) -> list[str]:
  return table(
    (
      "parameters", "D", "state MB", "step ms", "floor ms", "first ms",
      "ours: blocked ms", "stall %", "slow-down %", "written s", "torch.save ms",
      "ours / floor", "ours / torch.save",
    ),
    [_save_row(row, window) for row in rows],
  )


def _save_row(row: dict[str, Any], window: int) -> tuple[Any, ...]:
  plain, slowed = _joined(row, "ours", "without"), _joined(row, "ours", "with")
  copies, blocked = _joined(row, "ours", "copy"), _joined(row, "ours", "blocked")
  peer = _joined(row, "torch.save", "blocked")
  hundred = [100 / window * x for x in plain]
  extra = [x - y for x, y in zip(slowed, plain, strict=True)]
  percent = [[100 * r for r in ratios(x, hundred)] for x in (blocked, extra)]
  sizes = [x / 1e6 for x in _figures(row, "ours", "bytes")]
  return (
    f"{row['parameters']:,}", row["depth"], _median(sizes, 1),
    _median([1e3 * x / window for x in plain]),
    *(
      _median([1e3 * x for x in values])
      for values in (copies, _figures(row, "ours", "first"), blocked)
    ),
    *map(spread, percent),
    _median(_figures(row, "ours", "written"), 2),
    _median([1e3 * x for x in peer]),
    *(spread(ratios(blocked, x)) for x in (copies, peer)),
  )


def _figures(row: dict[str, Any], name: str, key: str) -> list[Any]:
  """What a contestant measured in each round; empty if it has failed."""
  if name in row["errors"]:
    return []
  return [figures[key] for figures in row["figures"].get(name, [])]


def _joined(row: dict[str, Any], name: str, key: str) -> list[float]:
  return [x for values in _figures(row, name, key) for x in values]


def _median(values: list[float], digits: int = 1) -> str:
  return f"{statistics.median(values):,.{digits}f}" if values else "-"
