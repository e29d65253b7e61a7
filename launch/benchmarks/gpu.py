"""Measures on one GPU, in a given time, all that no compilation can prove.

  make gpu                                   # 15 minutes; the same command continues
  python -m launch.benchmark gpu --seconds=840
  python -m launch.benchmark gpu --preset=quick    # on a CPU, shows that it works

Parts are commands of their own, the most valuable first; `PARTS` has them. After every
part the page is written anew: what is measured, and the time of every step beside the
time that the roofline of `launch.plan` predicts for its kernels. What is done is not
done again. At the end of the given seconds the part that runs is stopped; a sweep saves
first.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from launch import tables
from launch.benchmarks import harness, pages
from launch.benchmarks.harness import NAME, OUTPUT
from mtp_jax.config import ConfigError
from mtp_jax.files import read_json, write_json

_BENCHMARK = ("launch.benchmark",)
_LADDER = "--only=embed_dim=(128|256|384),kind=(none|sequential),arm=added,seed=0"
# A part that is stopped has so many seconds to end by itself.
_GRACE = 20


class Part(NamedTuple):
  """One command; `shows` is what it measures that no compilation can prove."""

  name: str
  shows: str
  command: tuple[str, ...]


def _train(name: str, shows: str, *words: str) -> Part:
  return Part(name, shows, (*_BENCHMARK, "train", "--preset=gpu", *words))


PARTS = {
  "gpu": (
    Part(
      "sanity", "kernels compute what XLA and a CPU compute",
      (*_BENCHMARK, "sanity", "--preset=gpu"),
    ),
    _train(
      "layouts", "unrolled layers, cuDNN and tuned products are as fast as modelled",
      "--models=350M", "--depths=0", "--contestants=ours",
      "--variants=trunk.scan_layers=on", "--variants=trunk.attention=xla",
      "--variants=trunk.attention=tokamax", "--variants=trunk.attention=cudnn_packed",
    ),
    _train(
      "depths", "utilisation at D = 0, 1, 3; PyTorch (compiled, causal without a mask)",
      "--models=350M",
    ),
    Part(
      "decode", "decoding against bandwidth; loops run without a pause of the host",
      (*_BENCHMARK, "decode", "--preset=gpu", "--models=350M", "--notorch"),
    ),
    Part(
      "pack", "trials side by side use an idle GPU",
      (*_BENCHMARK, "pack", "--preset=gpu", "--models=1M", "--packs=8,32", "--notorch"),
    ),
    _train(
      "experts", "experts and latent attention",
      "--models=350M", "--depths=0", "--contestants=ours",
      "--variants=trunk.attention_kind=latent,trunk.num_kv_heads=16,"
      "trunk.latent.query_rank=384,trunk.latent.kv_rank=128,trunk.latent.nope_dim=64,"
      "trunk.latent.rope_dim=32,trunk.latent.value_dim=64",
      "--variants=trunk.moe.num_experts=16,trunk.moe.experts_per_token=4,"
      "trunk.moe.expert_dim=704",
      "--variants=trunk.moe.num_experts=16,trunk.moe.experts_per_token=4,"
      "trunk.moe.expert_dim=704,trunk.moe.grouped_matmul=blocked",
    ),
    _train(
      "bytes", "small vocabularies; larger blocks of the loss",
      "--models=350M", "--depths=1", "--vocabs=264", "--contestants=ours",
      "--variants=loss.block_tokens=4096",
    ),
    _train(
      "1.3B", "utilisation of a larger model",
      "--models=1.3B", "--depths=1", "--batch_size=8", "--seq_len=2048",
      "--contestants=ours",
    ),
    Part(
      "ladder", "a sweep of small models in packs trains; more of it in every start",
      ("launch.sweep", "--config=experiments/gains_with_scale.py:gpu", "--pack=auto",
       _LADDER),
    ),
  ),
  "quick": (
    Part(
      "sanity", "kernels compute what XLA and a CPU compute",
      (*_BENCHMARK, "sanity", "--preset=quick"),
    ),
    Part(
      "layouts", "unrolled layers", (
        *_BENCHMARK, "train", "--preset=quick", "--depths=0", "--contestants=ours",
        "--variants=trunk.scan_layers=off,trunk.remat=none",
      ),
    ),
    Part(
      "pack", "trials side by side",
      (*_BENCHMARK, "pack", "--preset=quick", "--notorch"),
    ),
  ),
}
PARTS["cpu"] = PARTS["quick"]
PRESETS = {"cpu": {"seconds": 840}, "gpu": {"seconds": 840}, "quick": {"seconds": 840}}
harness.define_settings(PRESETS, seconds="after which it stops")


def main() -> int:
  """Runs the parts that are not done; returns 1 while some are left."""
  settings = harness.read_settings(PRESETS)
  # So that the part that runs is ended with this process.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  end = time.monotonic() + settings.seconds
  folder, name = Path(OUTPUT.value), NAME.value or f"gpu-{settings.preset}"
  state = folder / f"{name}-parts.json"
  done: dict[str, Any] = read_json(state) if state.exists() else {}
  parts = PARTS[settings.preset]
  unknown = [part for part in done if part not in {x.name for x in parts}]
  if unknown:
    raise ConfigError(
      f"--name must be new, or of earlier starts with --preset={settings.preset}: "
      f"{state} has {', '.join(unknown)}."
    )
  for part in parts:
    if done.get(part.name, {}).get("ended") == "done":
      continue
    start = time.monotonic()
    left = end - start
    if left <= 0:
      break
    print(f"\n{part.name}: {part.shows}; {left:.0f} s left", flush=True)
    ended = _run(part, folder, f"{name}-{part.name}", left)
    before = done.get(part.name, {}).get("seconds", 0)
    done[part.name] = {"ended": ended, "seconds": before + time.monotonic() - start}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(state, done)
    _write(parts, done, folder, name, settings)
  return int(any(done.get(x.name, {}).get("ended") != "done" for x in parts))


def _run(part: Part, folder: Path, name: str, seconds: float) -> str:
  """Runs a part for so many seconds at most; returns `done` or why it is not."""
  module, *words = part.command
  is_sweep = module == "launch.sweep"
  words += [f"--workdir={folder / name}"] if is_sweep else [
    f"--output={folder}", f"--name={name}"
  ]
  # A group of its own, which ends with its contestants.
  process = subprocess.Popen([sys.executable, "-m", module, *words], process_group=0)
  try:
    code = process.wait(seconds)
    return "done" if code == 0 else f"failed: exit code {code}"
  except subprocess.TimeoutExpired:
    return "stopped: no time left"
  finally:
    for number in (signal.SIGTERM, signal.SIGKILL):
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)


def _write(
  parts: tuple[Part, ...], done: dict[str, Any], folder: Path, name: str, settings: Any
) -> None:
  """Prints and writes the page of all parts so far."""
  lines = [
    {
      "part": part.name, "shows": part.shows,
      "ended": done.get(part.name, {}).get("ended", "not begun"),
      "seconds": f"{done.get(part.name, {}).get('seconds', 0):.0f}",
      "page": f"{name}-{part.name}.md" if part.command[0] == _BENCHMARK[0] else "-",
    }
    for part in parts
  ]
  record = tables.facts(["launch.benchmark", "gpu"], ("jax", "torch")) | {
    "settings": vars(settings), "parts": lines,
  }
  compared = [
    line
    for part in parts
    if (file := folder / f"{name}-{part.name}.json").exists()
    for line in predictions(part.name, read_json(file)["rows"])
  ]
  tables.write_page(
    folder / name, "`launch.benchmark gpu`", record,
    [
      __doc__.strip(), tables.markdown(lines),
      *(["## Predicted and measured", tables.markdown(compared)] if compared else []),
    ],
  )


def predictions(part: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns a line for each contestant of a part whose kernels were modelled."""
  lines = []
  for row in rows:
    for contestant, facts in row.get("contestants", {}).items():
      predicted, rounds = facts.get("roofline_seconds"), facts.get("seconds")
      if predicted and rounds:
        share = 1 / facts.get("trials", 1)
        measured = pages.rounds_of(row, contestant)
        sizes = {k: row[k] for k in ("model", "V", "D") if k in row}
        lines.append({"part": part} | sizes | {
          "contestant": contestant,
          "predicted ms": f"{1e3 * share * predicted:.4g}",
          "measured ms": pages.milliseconds(measured),
          "measured / predicted": pages.spread(
            [x / (share * predicted) for x in measured]
          ),
        })
  return lines
