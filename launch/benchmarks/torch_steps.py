"""The steps of the PyTorch peers, in processes of their own that start no JAX backend.

PyTorch is optional, and only these processes import it.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from launch.benchmarks.harness import Built, one_document_batch
from launch.benchmarks.limits import peak_memory, resident
from mtp_jax.config import Config


def start() -> tuple[Any, Any, dict[str, Any]]:
  """Returns PyTorch, the device to use, and the facts that every step has.

  PyTorch uses all cores that it may, and a GPU if there is one.
  """
  import torch

  torch.set_float32_matmul_precision("high")
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  torch.nn.functional.linear(torch.ones(1, 1), torch.ones(1, 1))  # Loads its libraries.
  torch.manual_seed(0)
  cuda = torch.cuda.is_available()
  hardware = torch.cuda.get_device_name() if cuda else "cpu"
  facts = {"hardware": hardware, "threads": torch.get_num_threads()}
  return torch, torch.device("cuda" if cuda else "cpu"), facts


def build_train(config: Config, name: str) -> Built:
  """Builds forward, backward, clipping and AdamW; `name` is one of `harness.TORCH`."""
  torch, device, facts = start()
  from launch.benchmarks import torch_peer

  cuda, before = device.type == "cuda", resident()
  model = torch_peer.Peer(config).to(device)
  optimizer = torch_peer.make_optimizer(model, config)
  fields = one_document_batch(config).arrays()
  batch = {k: torch.tensor(v, dtype=torch.int64).to(device) for k, v in fields.items()}
  forward = torch.compile(model) if name == "torch.compile" else model

  def step() -> None:
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
      losses_M = forward(**batch, one_document=True)
    torch_peer.total_loss(losses_M, config.mtp.weight).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
    optimizer.step()
    if cuda:
      torch.cuda.synchronize()

  step()
  return step, facts | {"peak_memory": peak_memory(step, before, torch)}


def build_loss(inputs: Callable[[], Any], name: str) -> Built:
  """Builds the loss and its gradient from what `inputs` returns (`loss.Inputs`)."""
  torch, device, facts = start()
  functional, cuda, before = torch.nn.functional, device.type == "cuda", resident()
  dtype = torch.bfloat16 if cuda else torch.float32
  given = inputs()

  def leaf(x: np.ndarray) -> Any:
    return torch.tensor(x).to(device, dtype).requires_grad_()

  hidden = [leaf(h_BTD) for h_BTD in given.hidden_MBTD]
  unembed_VD = leaf(given.unembed_DV.T)
  targets = torch.tensor(given.targets_MBT, dtype=torch.int64).to(device)
  coefficients = [float(c) for c in given.coefficients_M]
  del given

  def loss() -> Any:
    total = 0.0
    for h_BTD, t_BT, coefficient in zip(hidden, targets, coefficients, strict=True):
      logits_BTV = functional.linear(h_BTD, unembed_VD).float()
      total = total + coefficient * functional.cross_entropy(
        logits_BTV.flatten(0, 1), t_BT.flatten(), reduction="sum"
      )
    return total

  forward = torch.compile(loss) if name == "torch.compile" else loss

  def step() -> Any:
    for x in (*hidden, unembed_VD):
      x.grad = None
    total = forward()
    total.backward()
    if cuda:
      torch.cuda.synchronize()
    return total.detach(), ([h_BTD.grad for h_BTD in hidden], unembed_VD.grad.T)

  step()
  least = 2 * sum(x.nbytes for x in (*hidden, unembed_VD))
  return step, facts | {
    "least_memory": least, "peak_memory": peak_memory(step, before, torch)
  }


def build_decode(
  config: Config, name: str, rows: int, prompt_tokens: int, max_new_tokens: int
) -> Built:
  """Builds plain decoding with a KV cache: as many tokens as ours decodes in rounds."""
  torch, device, facts = start()
  from launch.benchmarks import torch_peer

  model = torch_peer.Peer(config).eval().to(device)
  cuda = device.type == "cuda"
  if cuda:  # Our weights are in the compute dtype of a GPU, too.
    model = model.to(torch.bfloat16)
  slots = prompt_tokens + max_new_tokens
  cache = model.empty_cache(rows, slots)
  shape = (rows, prompt_tokens)
  prompts = torch.randint(config.tokenizer.vocab_size, shape, device=device)

  def next_token(tokens: Any, position: int) -> Any:
    return model.decode_step(tokens, position, cache)[:, -1:].argmax(-1)

  with torch.inference_mode():
    first = next_token(prompts, 0)
  if name == "torch.compile":
    # Positions differ from step to step: one program serves all of them.
    next_token = torch.compile(next_token, dynamic=True)

  @torch.inference_mode()
  def step() -> None:
    tokens = first
    for position in range(prompt_tokens, slots - 1):
      tokens = next_token(tokens, position)
    if cuda:
      torch.cuda.synchronize()

  step()
  return step, facts
