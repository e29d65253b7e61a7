"""What the benchmarks share: sizes of models, the head of a record, tables, ratios."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments import base
from launch.huge_pages import HUGE_PAGES
from mtp_jax.config import Config, ConfigError, from_config_dict, with_overrides

RESULTS = Path(__file__).parents[2] / "experiments" / "results" / "benchmarks"


# Width, layers, heads; those of 124M and more as GPT-2 and GPT-3 have them (Brown et
# al. 2020, table 2.1), the largest with heads of 128.
MODELS = {
  "tiny": (64, 2, 4),
  "0.3M": (64, 4, 4),
  "1M": (128, 4, 4),
  "3M": (192, 6, 4),
  "5M": (256, 6, 4),
  "10M": (384, 4, 4),
  "25M": (512, 8, 8),
  "124M": (768, 12, 12),
  "350M": (1024, 24, 16),
  "1.3B": (2048, 24, 16),
}

def make_config(
  args: argparse.Namespace, model: str, trunk: str, vocab: int, depth: int
) -> Config:
  """Returns the config of one of `MODELS`; Llama has half as many kv heads.

  Of `args`: kind (of predictors, for depth > 0), seq_len, batch_size.
  """
  dim, layers, heads = MODELS[model]
  shape = {
    "gpt2": {"trunk.mlp_dim": 4 * dim, "trunk.num_kv_heads": heads},
    # 8/3 of the width (Touvron et al. 2023), rounded up to a multiple of 64.
    "llama": {
      "trunk.mlp_dim": -(-8 * dim // 3 // 64) * 64,
      "trunk.num_kv_heads": max(1, heads // 2),
    },
  }[trunk]
  return with_overrides(
    from_config_dict(base.get_config()),
    {
      "trunk.kind": trunk,
      "trunk.tie_embeddings": trunk == "gpt2",
      "trunk.embed_dim": dim,
      "trunk.num_layers": layers,
      "trunk.num_heads": heads,
      **shape,
      "mtp.kind": args.kind if depth else "none",
      "mtp.depth": depth,
      "tokenizer.vocab_size": vocab,
      "data.seq_len": args.seq_len,
      "data.batch_size": args.batch_size,
      "mesh.data": 1,
      "eval.max_new_tokens": 1,  # Not measured; must be less than `seq_len`.
    },
  )


class Progress:
  """Prints what was done, and after the first turns the time that is left.

  Every contestant has one unit of work to be built and one per round.
  """

  def __init__(self, num_contestants: int, rounds: int):
    self._total = num_contestants * (rounds + 1)
    self._done = 0
    self._start = time.monotonic()

  def __call__(self, text: str, units: int = 1) -> None:
    self._done += units
    rate = (time.monotonic() - self._start) / self._done
    left = datetime.timedelta(seconds=round(rate * (self._total - self._done)))
    print(f"[{self._done}/{self._total}, about {left} left] {text}", flush=True)


def new_parser(
  commands: Any,
  name: str,
  presets: Iterable[str],
  description: str | None,
  summary: str,
  examples: str,
) -> argparse.ArgumentParser:
  """Adds a subcommand to the subparsers of `launch.benchmark`; it has --preset."""
  parser = commands.add_parser(
    name,
    help=summary,
    description=description,
    epilog=f"Examples:\n{examples}",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--preset", default="cpu", choices=list(presets), help="what is not given below"
  )
  return parser


def add_output(parser: argparse.ArgumentParser, quick: str) -> None:
  """Adds --output and --quick; `quick` says what is less then."""
  parser.add_argument(
    "--output", type=Path, default=RESULTS, metavar="FOLDER",
    help="where the tables (.md) and the figures (.json) go",
  )
  parser.add_argument(
    "--quick", action="store_true",
    help=f"{quick}; says that it works, not how fast",
  )


def apply_preset(
  args: argparse.Namespace, presets: dict[str, dict[str, Any]], quick: dict[str, Any]
) -> None:
  """Fills in what was not given: by the preset, or all of `quick` with --quick.

  Raises:
    ConfigError: no rounds, or rounds without steps.
  """
  for key, value in (quick if args.quick else presets[args.preset]).items():
    if args.quick or getattr(args, key) is None:
      setattr(args, key, value)
  for key in ("rounds", "steps_per_round"):
    if (value := getattr(args, key, 1)) < 1:
      raise ConfigError(f"--{key} must be at least 1, got {value}.")


def add_huge_pages(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--huge_pages", action=argparse.BooleanOptionalAction, default=True,
    help=f"start every contestant with {'='.join(HUGE_PAGES)} (Linux)",
  )


def add_trace(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--trace", type=Path, metavar="FOLDER",
    help="write a profile of some steps of each JAX contestant there, after its turns, "
    "for XProf (`xprof FOLDER`) or TensorBoard",
  )


# Whose versions a record has.
PACKAGES = ("jax", "torch")


def header(
  args: argparse.Namespace, packages: Iterable[str] = PACKAGES
) -> dict[str, Any]:
  """Returns the head of a results file: command, date, environment, settings.

  The environment has the versions of `packages`, or says that they are missing.
  """
  hidden = ("run", "output", "trace")
  settings = {k: v for k, v in vars(args).items() if k not in hidden}
  return {
    "command": " ".join(["python -m launch.benchmark", *sys.argv[1:]]),
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    **environment(packages),
    "settings": settings,
  }


def heading(
  title: str, record: dict[str, Any], device: str, more: str = ""
) -> list[str]:
  """Returns the first lines of a table: command, date, commit, hardware, versions."""
  versions = ", ".join(f"{name} {x}" for name, x in record["versions"].items())
  return [
    f"# {title}",
    "",
    f"`{record['command']}`",
    "",
    f"{record['date']}, commit {record['commit']}, {record['hardware']}, device "
    f"{device}; {versions}{more}.",
    "",
  ]


def write(folder: Path, name: str, record: dict[str, Any], text: str) -> None:
  """Prints the tables, and writes them and the figures."""
  print(text)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
  (folder / f"{name}.md").write_text(text)
  print(f"Written to {folder / name}.md and .json")


def environment(packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
  """Returns hardware, versions and commit, for the head of a results file."""
  command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
  found = subprocess.run(
    command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
  )
  versions = {"python": platform.python_version()}
  for package in packages:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = "missing"
  cores = len(os.sched_getaffinity(0))
  return {
    "commit": found.stdout.strip() or "unknown",
    "hardware": f"{cores} x {_cpu_model()}",
    "versions": versions,
  }


def _cpu_model() -> str:
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = []
  names = (line.split(":", 1)[1].strip() for line in lines if "model name" in line)
  return next(names, platform.machine())


def rounds(figures: dict[str, Any]) -> list[float]:
  """Returns the median step time of every round of a contestant; empty without any."""
  return [statistics.median(steps) for steps in figures.get("seconds", [])]


def rounds_of(row: dict[str, Any], name: str) -> list[float]:
  """Returns the `rounds` of the contestant of a row that has this name."""
  return rounds(row["contestants"].get(name, {}))


def floor_seconds(products: dict[str, Any], flops: float) -> list[float]:
  """Returns per round the seconds of `flops` at the rate of `limits.products`.

  Empty if those failed.
  """
  return [seconds * flops / products["flops"] for seconds in rounds(products)]


def ratios(above: list[float], below: list[float]) -> list[float]:
  return [a / b for a, b in zip(above, below, strict=True)] if above and below else []


def spread(values: list[float]) -> str:
  if not values:
    return "-"
  middle = statistics.median(values)
  return f"{middle:.2f} [{min(values):.2f}, {max(values):.2f}]"


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
  line: Callable[[Iterable[Any]], str] = lambda cells: (  # noqa: E731
    "| " + " | ".join(map(str, cells)) + " |"
  )
  header = list(header)
  return [line(header), line(["---"] * len(header)), *map(line, rows)]


def slug(name: str) -> str:
  return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")
