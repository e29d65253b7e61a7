"""Plain decoding in PyTorch, with a KV cache: the peer of `launch.benchmark decode`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from launch.benchmarks.contestants import Contestant, Failed
from mtp_jax.config import Config

NAMES = ("torch eager", "torch.compile")


@dataclasses.dataclass(frozen=True)
class Ready:
  """What a peer says once it is warm."""

  hardware: str


def start_peers(
  config: Config, batch_size: int, prompt_tokens: int, max_new_tokens: int
) -> dict[str, Contestant]:
  """Returns processes, by name, that decode as plain decoding does; those that can."""
  build = functools.partial(
    build_torch, batch_size=batch_size, prompt_tokens=prompt_tokens,
    max_new_tokens=max_new_tokens,
  )
  plain = dataclasses.replace(config.mtp, kind="none", depth=0)
  config = dataclasses.replace(config, mtp=plain)
  found = {}
  for name in NAMES:
    peer = Contestant(name, config, huge_pages=False, build=build)
    try:
      peer.wait_ready()
    except Failed as error:
      print(f"B={batch_size} {name}: {error}", flush=True)
      peer.close()
    else:
      found[name] = peer
  return found


def build_torch(
  config: Config, name: str, *, batch_size: int, prompt_tokens: int, max_new_tokens: int
) -> tuple[Callable[[], None], Ready]:
  """Returns a step that decodes as many tokens as plain decoding in its rounds."""
  # Torch is optional, and only this process needs it.
  from launch import torch_peer
  from launch.benchmarks.torch_step import start_torch

  torch, device = start_torch()
  cuda = device.type == "cuda"
  torch.manual_seed(0)
  model = torch_peer.Peer(config).eval().to(device)
  if cuda:  # As our weights are, in the compute dtype of a GPU.
    model = model.to(torch.bfloat16)
  slots = prompt_tokens + max_new_tokens
  cache = model.empty_cache(batch_size, slots)
  shape = (batch_size, prompt_tokens)
  prompts = torch.randint(config.tokenizer.vocab_size, shape, device=device)

  def next_token(tokens: Any, position: int) -> Any:
    return model.decode_step(tokens, position, cache)[:, -1:].argmax(-1)

  if name == "torch.compile":
    # Positions differ from step to step: one program for all of them.
    next_compiled = torch.compile(next_token, dynamic=True)
  else:
    next_compiled = next_token

  with torch.inference_mode():
    first = next_token(prompts, 0)

  @torch.inference_mode()
  def step() -> None:
    tokens = first
    for position in range(prompt_tokens, slots - 1):
      tokens = next_compiled(tokens, position)
    if cuda:
      torch.cuda.synchronize()

  step()
  return step, Ready(torch.cuda.get_device_name() if cuda else "cpu")
