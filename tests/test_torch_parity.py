"""Our model, losses and gradients equal an independent PyTorch implementation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import Config
from mtp_jax.decode.target import make_target, unstack
from mtp_jax.depth_weights import depth_weights
from mtp_jax.lm import MtpLm
from mtp_jax.predictors import num_trunk_layers
from mtp_jax.sharding import unbox
from mtp_jax.train_step import loss_and_grads
from tests import common

torch = pytest.importorskip("torch", reason="the parity test needs torch")
torch_peer = pytest.importorskip("launch.benchmarks.torch_peer")

LAMBDA = 0.375  # lambda / 3 is exact in float32, in which schedules are computed.
CASES = [
  ("llama", "none", False),
  ("llama", "parallel", False),
  ("llama", "sequential", False),
  ("llama", "sequential", True),
  ("llama", "linear", False),
  ("llama", "medusa", False),
  ("gpt2", "none", False),
  ("gpt2", "sequential", False),
]


def export_params(params: Any, config: Config) -> dict[str, np.ndarray]:
  """Returns the state dict of `Peer(config)` for our parameter tree.

  Only names and layouts change, so the same function turns our gradients into the
  gradients that the peer should have.
  """
  state: dict[str, np.ndarray] = {"embed.weight": _array(params["embed"]["embedding"])}
  if config.trunk.kind == "gpt2":
    state["position_embed.weight"] = _array(params["position_embed"]["embedding"])
  if not config.trunk.tie_embeddings:
    state["unembed.weight"] = _array(params["unembed"]["kernel"]).T
  state |= _norm("final_norm", params["final_norm"])
  blocks = params["trunk"]["blocks"]
  for i in range(num_trunk_layers(config)):
    state |= _block(f"blocks.{i}", _entry(blocks, i))
  mtp = config.mtp
  if mtp.kind == "parallel":
    for i in range(1 + mtp.depth):
      state |= _block(f"heads.{i}", _entry(params["mtp"]["heads"], i))
  elif mtp.kind == "sequential" and mtp.depth:
    modules = params["mtp"]["modules"]
    for i in range(1 if mtp.share_modules else mtp.depth):
      module = modules if mtp.share_modules else _entry(modules, i)
      name = f"modules_.{i}"
      for norm in ("hidden_norm", "embed_norm", "out_norm"):
        state |= _norm(f"{name}.{norm}", module[norm])
      state[f"{name}.projection.weight"] = _array(module["projection"]).T
      state |= _block(f"{name}.block", module["block"])
  elif mtp.kind == "linear":
    for i in range(mtp.depth):
      state[f"maps.{i}.weight"] = _array(params["mtp"]["maps"])[i].T
  elif mtp.kind == "medusa":
    for i in range(mtp.depth):
      state[f"maps.{i}.weight"] = _array(params["mtp"]["kernels"])[i].T
      state[f"maps.{i}.bias"] = _array(params["mtp"]["biases"])[i]
  return state


def load_params(model: Any, state: dict[str, np.ndarray]) -> None:
  """Fills the model; every parameter must be named, a tied one once."""
  tensors = {name: torch.tensor(value) for name, value in state.items()}
  if model.config.trunk.tie_embeddings:
    tensors["unembed.weight"] = tensors["embed.weight"]
  model.load_state_dict(tensors)


def _block(name: str, tree: Any) -> dict[str, np.ndarray]:
  attention, mlp = tree["attention"], tree["mlp"]
  names = ("query", "key", "value")
  flat = [_array(attention[n]).reshape(len(attention[n]), -1).T for n in names]
  out = _array(attention["out"])
  state = {
    f"{name}.attention.qkv.weight": np.concatenate(flat),
    f"{name}.attention.out.weight": out.reshape(-1, out.shape[-1]).T,
  }
  if "out_bias" in attention:
    biases = [_array(attention[f"{n}_bias"]).ravel() for n in names]
    state[f"{name}.attention.qkv.bias"] = np.concatenate(biases)
    state[f"{name}.attention.out.bias"] = _array(attention["out_bias"])
  for key, value in mlp.items():
    layer, is_bias = key.removesuffix("_bias"), key.endswith("_bias")
    kind = "bias" if is_bias else "weight"
    state[f"{name}.mlp.{layer}.{kind}"] = _array(value).T
  for norm in ("attention_norm", "mlp_norm"):
    state |= _norm(f"{name}.{norm}", tree[norm])
  return state


def _norm(name: str, tree: Any) -> dict[str, np.ndarray]:
  names = {"scale": "weight", "bias": "bias"}
  return {f"{name}.{names[key]}": _array(value) for key, value in tree.items()}


def _entry(tree: Any, index: int) -> Any:
  """One layer of a tree of stacked parameters."""
  if isinstance(tree, dict):
    return {key: _entry(value, index) for key, value in tree.items()}
  return tree[index]


def _array(value: Any) -> np.ndarray:
  return np.asarray(value)


def _config(trunk: str, kind: str, shared: bool):
  overrides = {
    "trunk.compute_dtype": "float64",
    "trunk.num_layers": 2,
    "mtp.share_modules": shared,
    "data.batch_size": 4,
  }
  if trunk == "gpt2":
    overrides |= common.GPT2
  return common.tiny_config(kind, 0 if kind == "none" else 3, overrides)


def _random_params(config, batch):
  """Every parameter random, norms and biases too: nothing hides behind a 0 or a 1."""
  shapes = unbox(
    jax.eval_shape(lambda: MtpLm(config).init(jax.random.key(0), batch))["params"]
  )
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape)), shapes)


@pytest.mark.parametrize("trunk, kind, shared", common.mostly_slow(
  CASES, ("llama", "sequential", False), ("llama", "parallel", False)
))
def test_losses_and_gradients_equal_torch(trunk, kind, shared):
  config = _config(trunk, kind, shared)
  batch = common.packed_batch(config, padding=True)
  with jax.enable_x64(True):
    params = _random_params(config, batch)
    weights_M = depth_weights(config.mtp, LAMBDA, 0.0)[0].astype(jnp.float64)
    step = jax.jit(
      lambda p, b: loss_and_grads(config, p, b, weights_M),
      compiler_options={"xla_backend_optimization_level": 0},  # Compiles faster.
    )
    sums, counts_M, grads = step(params, common.microbatches(batch))
    losses_M = np.asarray(sums.nll_M / counts_M)
    expected = export_params(grads, config)
    state = export_params(params, config)

  peer = torch_peer.Peer(config).double()
  load_params(peer, state)
  fields = {k: torch.tensor(v, dtype=torch.int64) for k, v in batch.arrays().items()}
  peer_losses_M = peer(**fields)
  torch_peer.total_loss(peer_losses_M, LAMBDA).backward()

  np.testing.assert_allclose(losses_M, peer_losses_M.detach().numpy(), rtol=1e-9)
  found = {name: p.grad.numpy() for name, p in peer.named_parameters()}
  assert found.keys() == expected.keys()
  for name, grad in found.items():
    scale = np.abs(grad).max()
    assert scale > 0, name
    np.testing.assert_allclose(
      expected[name], grad, rtol=0, atol=1e-9 * scale, err_msg=name
    )


@pytest.mark.parametrize("trunk, kind", common.mostly_slow(
  [("llama", "none"), ("llama", "parallel"), ("gpt2", "sequential")],
  ("llama", "parallel"),
))
def test_cached_decoding_equals_torch(trunk, kind):
  config = _config(trunk, kind, shared=False)
  batch = common.packed_batch(config)
  tokens_BT = batch.tokens
  rows, slots = tokens_BT.shape
  target = make_target(config)

  @jax.jit
  def forward(weights, tokens_BT, positions_BT, caches):
    hidden_BTD, _, caches = target.forward(weights, tokens_BT, positions_BT, caches)
    return target.unembed(weights, hidden_BTD), caches

  with jax.enable_x64(True):
    params = _random_params(config, batch)
    peer = torch_peer.Peer(config).double()
    load_params(peer, export_params(params, config))
    weights = unstack(params, config)
    cache, peer_cache = target.init(rows, slots), peer.empty_cache(rows, slots)
    # A prompt, one token, several tokens: the three shapes of a decoding loop.
    for start, end in ((0, 6), (6, 7), (7, 11)):
      new_BT = tokens_BT[:, start:end]
      positions_BT = np.broadcast_to(np.arange(start, end), new_BT.shape)
      logits_BTV, cache = forward(weights, new_BT, positions_BT, cache)
      with torch.inference_mode():
        expected_BTV = peer.decode_step(
          torch.tensor(new_BT, dtype=torch.int64), start, peer_cache
        )
      np.testing.assert_allclose(
        logits_BTV, expected_BTV.numpy(), rtol=1e-9, atol=1e-9
      )


def test_eagle_is_refused():
  with pytest.raises(ValueError, match=r"^mtp.kind must be .* PyTorch, got 'eagle3'"):
    torch_peer.Peer(common.tiny_config("eagle3", 2))


@pytest.mark.parametrize("name", ["trunk", "before", "own", "bare"])
def test_other_inputs_and_norms_of_modules_are_refused(name):
  ((key, value),) = common.INPUTS[name].items()
  config = common.tiny_config("sequential", 2, common.INPUTS[name])
  with pytest.raises(ValueError, match=rf"^{key} must be .* PyTorch, got {value!r}"):
    torch_peer.Peer(config)
