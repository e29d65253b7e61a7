"""The train step of the PyTorch peer; importing this imports torch, and no JAX."""

import os
from collections.abc import Callable
from types import ModuleType

import torch

from launch import torch_peer
from launch.benchmarks.rows import one_document_batch
from mtp_jax.config import Config


def start_torch() -> tuple[ModuleType, torch.device]:
  """Returns PyTorch and the device to use, with what any program needs loaded.

  It uses all cores that it may, and a GPU if there is one.
  """
  torch.set_float32_matmul_precision("high")
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  torch.nn.functional.linear(torch.ones(1, 1), torch.ones(1, 1))
  return torch, torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_torch_step(
  config: Config, device: torch.device, compiled: bool
) -> tuple[torch_peer.Peer, torch.optim.Optimizer, Callable[[], None]]:
  """Returns model, optimizer and their train step, which waits until it is done."""
  cuda = device.type == "cuda"
  torch.manual_seed(0)
  model = torch_peer.Peer(config).to(device)
  optimizer = torch_peer.make_optimizer(model, config)
  fields = one_document_batch(config).arrays()
  batch = {k: torch.tensor(v, dtype=torch.int64).to(device) for k, v in fields.items()}
  forward = torch.compile(model) if compiled else model

  def step() -> None:
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
      losses_M = forward(**batch, one_document=True)
    torch_peer.total_loss(losses_M, config.mtp.weight).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
    optimizer.step()
    if cuda:
      torch.cuda.synchronize()

  return model, optimizer, step
