"""What `launch.benchmark startup` measures in processes of their own.

    python -m launch.benchmarks.startup_parts PART CONFIG.json ARGUMENTS

Each part prints one line of JSON. Importing this imports neither JAX nor torch, so that
a part's own imports are among what is measured.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from mtp_jax.config import Config, from_config_dict
from mtp_jax.startup import process_age


def floor(config: Config, cache: str) -> dict[str, Any]:
  """Returns what no start can do without, in seconds: JAX, devices and the program.

  The program is the train step, compiled by XLA or loaded from the folder `cache`
  ('' is none); tracing and lowering it are not counted.
  """
  import jax
  import numpy as np

  device = jax.devices()[0]
  seconds = {"jax": process_age()}

  from launch import cli
  from launch.benchmarks.rows import one_document_batch
  from mtp_jax.sharding import make_mesh, put_batch, replicated
  from mtp_jax.train_state import hyperparameters
  from mtp_jax.train_step import programs, shape_of

  cli.use_compilation_cache(cache)
  mesh = make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    train = programs(shape_of(config), mesh)
    state = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      jax.eval_shape(train.init, np.int32(0)),
      train.shardings,
    )
    rows = jax.tree.map(lambda x: x[None], one_document_batch(config))
    batch = put_batch(mesh, rows, ("microbatch",))
    hyper = jax.device_put(hyperparameters(config), replicated(mesh))
    lowered = train.step.lower(state, batch, hyper, np.bool_(True))
    start = time.perf_counter()
    lowered.compile()
  seconds["program"] = time.perf_counter() - start
  return {"seconds": seconds, "hardware": device.device_kind}


def torch_start(config: Config, compiled: str) -> dict[str, Any]:
  """Returns the seconds of torch's phases up to the end of its first step.

  `compiled` is 'True' for torch.compile.
  """
  from launch.benchmarks.torch_step import make_torch_step, start_torch

  ends = [process_age()]
  _, device = start_torch()
  *_, step = make_torch_step(config, device, compiled == "True")
  ends.append(process_age())
  step()
  ends.append(process_age())
  first, second, third = ends
  phases = {"imports": first, "model": second - first, "first step": third - second}
  return {"seconds": phases}


def saves(config: Config, folder: str, window: str) -> dict[str, Any]:
  """Returns what the saves of a real run cost, in seconds; one value a save.

  The config is that of `startup.config_that_saves` for windows of `window` steps.

    copy: of the state to the host, in a process that waits for it.
    first: of the first save, which compiles, as `blocked`.
    blocked: the loop, in `Checkpointer.save`.
    without, with: a window before a save, and the one that begins with it.
    written: from the last of these saves to its last byte on the file system.
  """
  import jax
  import numpy as np

  from mtp_jax.checkpoint import Checkpointer
  from mtp_jax.sharding import make_mesh
  from mtp_jax.train import Observer, fit
  from mtp_jax.train_step import programs, shape_of

  workdir, steps, every = Path(folder) / "run", int(window), 2 * int(window)
  num_saves = config.train.num_steps // every  # That of the last step does not count.
  ended: dict[int, float] = {}
  began: list[float] = []
  blocked: list[float] = []
  save = Checkpointer.save

  def timed_save(checkpointer: Checkpointer, *args: Any) -> None:
    began.append(time.time())
    start = time.perf_counter()
    save(checkpointer, *args)
    blocked.append(time.perf_counter() - start)

  class Watch(Observer):
    def stepped(self, step: int) -> None:
      ended[step] = time.perf_counter()

  mesh = make_mesh(config.mesh)
  copies = []
  with jax.set_mesh(mesh):
    init = programs(shape_of(config), mesh).init
    # New arrays every time, because they keep their host copy.
    for seed in range(num_saves - 1):
      state = jax.block_until_ready(init(np.int32(seed)))
      start = time.perf_counter()
      jax.device_get(state)
      copies.append(time.perf_counter() - start)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  del state
  Checkpointer.save = timed_save
  fit(config, workdir, progress=False, observer=Watch())
  spans = [
    ended[start + steps] - ended[start]
    for start in range(steps + every, config.train.num_steps, steps)
  ]
  last = workdir / "checkpoints" / str(num_saves * every)
  written = max(path.stat().st_mtime for path in last.rglob("*"))
  return {
    "hardware": jax.devices()[0].device_kind,
    "bytes": size,
    "copy": copies,
    "first": blocked[0],
    "blocked": blocked[1:num_saves],
    "without": spans[::2],
    "with": spans[1::2],
    "written": written - began[num_saves - 1],
  }


def torch_saves(config: Config, folder: str, num_saves: str) -> dict[str, Any]:
  """Returns the seconds of each `torch.save` of model and optimizer state."""
  from launch.benchmarks.torch_step import make_torch_step, start_torch

  torch, device = start_torch()
  model, optimizer, step = make_torch_step(config, device, compiled=False)
  step()  # The optimizer has its moments from then on.
  seconds = []
  for number in range(int(num_saves)):
    start = time.perf_counter()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, Path(folder) / f"{number}.pt")
    seconds.append(time.perf_counter() - start)
  return {"blocked": seconds}


PARTS = {
  "floor": floor, "torch": torch_start, "saves": saves, "torch_saves": torch_saves,
}


def main() -> None:
  part, file, *arguments = sys.argv[1:]
  config = from_config_dict(json.loads(Path(file).read_text()))
  print(json.dumps(PARTS[part](config, *arguments)), flush=True)


if __name__ == "__main__":
  main()
