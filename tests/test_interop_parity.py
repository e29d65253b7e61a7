"""Folders in and out give the logits of Hugging Face and of the published equations.

Legend: B batch, T sequence, V vocab, M = 1 + depth.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtp_jax import accounting, interop
from mtp_jax.lm import MtpLm, unembed_matrix
from tests import common, numpy_models
from tests.hf_folders import CASES, DEEPSEEK, one_device

T = 12
RUNS = {"data.seq_len": T, "data.batch_size": 2, "trunk.remat": "none"}
slow = pytest.mark.slow
# One draw beside a fixed one in every run of the tests, many in the slow one.
draws = pytest.mark.parametrize("examples", [1, pytest.param(25, marks=slow)])


@pytest.fixture(scope="module", autouse=True)
def shapes_are_found_once():
  with pytest.MonkeyPatch.context() as patch:
    cached = functools.cache(accounting.abstract_params)
    patch.setattr(accounting, "abstract_params", cached)
    yield


@pytest.fixture(scope="module")
def hf():
  pytest.importorskip("torch", reason="parity with transformers needs torch")
  hf = pytest.importorskip("transformers", reason="its parity test needs transformers")
  hf.logging.set_verbosity_error()
  hf.logging.disable_progress_bar()
  return hf


def our_logits(params, config, tokens):
  """Returns logits_MBTV; `tokens` [B, T + M]."""
  batch = common.batch_of(tokens, np.ones_like(tokens), T)

  @jax.jit
  def run(params, batch):
    hidden_MBTD = MtpLm(config).apply({"params": params}, batch)
    return hidden_MBTD @ unembed_matrix(params, config)

  return np.asarray(run(params, batch))


def their_logits(model, tokens):
  torch = pytest.importorskip("torch")
  with torch.no_grad():
    return model(torch.tensor(tokens[:, :T])).logits.numpy()


def random_model(cls, config, folder, seed):
  """Saves a model in which no parameter is 0 and no norm's scale 1."""
  torch = pytest.importorskip("torch")
  model = cls(config)
  torch.manual_seed(seed)
  bias = "e_score_correction_bias"
  extra = [(n, b) for n, b in model.named_buffers() if n.endswith(bias)]
  with torch.no_grad():
    for name, x in [*model.named_parameters(), *extra]:
      is_scale = x.ndim == 1 and name.endswith("weight")
      x.copy_(float(is_scale) + 0.3 * torch.randn_like(x))
  model.save_pretrained(folder)
  return cls.from_pretrained(folder, attn_implementation="eager")


def check_family(cls, config, folder, layout, seed):
  """In: our logits are theirs. Out: what they load from us gives the same again."""
  model = random_model(cls, config, folder / "theirs", seed)
  tokens = np.random.default_rng(seed).integers(0, common.VOCAB, (2, T + 1))
  expected_BTV = their_logits(model, tokens)
  assert 0.2 < expected_BTV.std() < 5

  found = interop.read_model(folder / "theirs")
  assert found.family == layout
  ours = common.tiny_config(overrides=RUNS | found.overrides)
  params = interop.load_params(found, ours, one_device())
  logits_BTV = our_logits(params, ours, tokens)[0]
  np.testing.assert_allclose(logits_BTV, expected_BTV, rtol=0, atol=1e-4)

  interop.export_params(params, ours, folder / "ours", layout, max_shard_bytes=9000)
  again = cls.from_pretrained(folder / "ours", attn_implementation="eager")
  np.testing.assert_array_equal(their_logits(again, tokens), expected_BTV)


def sweep(examples, strategy, fixed, check):
  """Runs `check(values, seed)` on `fixed` values and on so many draws."""

  @settings(max_examples=examples, deadline=None, database=None)
  @given(strategy, st.integers(0, 99))
  @example(fixed, 0)
  def run(values, seed):
    check(values, seed)

  run()


@st.composite
def rope_parameters(draw):
  kind = draw(st.sampled_from(["default", "linear", "llama3", "yarn"]))
  values = {"rope_type": kind, "rope_theta": draw(st.sampled_from([500.0, 1e4]))}
  if kind != "default":
    values["factor"] = draw(st.sampled_from([2.0, 8.0]))
  if kind in ("llama3", "yarn"):
    values["original_max_position_embeddings"] = draw(st.sampled_from([6, 64]))
  if kind == "llama3":
    values |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
  if kind == "yarn" and draw(st.booleans()):
    values |= {"beta_fast": 16.0, "beta_slow": 2.0}
  if kind == "yarn" and draw(st.booleans()):
    values |= {"mscale": 0.7, "mscale_all_dim": draw(st.sampled_from([0.7, 1.2]))}
  return values


LLAMA3 = {
  "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0,
  "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
}  # fmt: skip
YARN = {
  "rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0,
  "original_max_position_embeddings": 6, "mscale": 0.7, "mscale_all_dim": 1.2,
}  # fmt: skip
SIZES = {
  "vocab_size": common.VOCAB,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "max_position_embeddings": 128,
  "bos_token_id": None,
  "eos_token_id": None,
}
ANY = {
  "tie_word_embeddings": st.booleans(),
  "rms_norm_eps": st.sampled_from([1e-6, 1e-2]),
  "rope_parameters": rope_parameters(),
}


@draws
@pytest.mark.parametrize("family, name, rope", common.mostly_slow(
  [("llama", "Llama", LLAMA3), ("qwen2", "Qwen2", YARN), ("qwen3", "Qwen3", YARN)],
  ("llama", "Llama", LLAMA3),
))
def test_dense_family_equals_transformers(
  hf, tmp_path_factory, family, name, rope, examples
):
  model, config = getattr(hf, f"{name}ForCausalLM"), getattr(hf, f"{name}Config")
  drawn = ANY | {"num_key_value_heads": st.sampled_from([1, 2, 4])}
  fixed = {
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "rope_parameters": rope,
    "num_key_value_heads": 2,
  }
  if family != "qwen2":
    drawn["head_dim"] = st.sampled_from([4, 6])
    fixed["head_dim"] = 6

  def check(values, seed):
    made = config(num_attention_heads=4, **SIZES, **values)
    check_family(model, made, tmp_path_factory.mktemp(family), family, seed)

  sweep(examples, st.fixed_dictionaries(drawn), fixed, check)


@pytest.mark.parametrize(
  "tied, inner", common.mostly_slow([(True, None), (False, 24)], (True, None))
)
def test_gpt2_equals_transformers(hf, tmp_path, tied, inner):
  config = hf.GPT2Config(
    vocab_size=common.VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=T,
    n_inner=inner, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None,
  )  # fmt: skip
  check_family(hf.GPT2LMHeadModel, config, tmp_path, "gpt2", seed=1)


@pytest.mark.slow
@draws
def test_deepseek_v3_equals_transformers(hf, tmp_path_factory, examples):
  drawn = ANY | {
    "groups": st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    "num_experts_per_tok": st.integers(1, 4),
    "n_shared_experts": st.integers(1, 2),
    "routed_scaling_factor": st.sampled_from([1.0, 2.5]),
    "first_k_dense_replace": st.sampled_from([0, 1, 2]),
    "q_lora_rank": st.sampled_from([None, 12]),
  }
  fixed = {
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-2,
    "rope_parameters": YARN,
    "groups": (4, 2),
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
  }

  def check(values, seed):
    groups, kept = values["groups"]
    rest = {key: value for key, value in values.items() if key != "groups"}
    config = hf.DeepseekV3Config(
      num_attention_heads=2, num_key_value_heads=2, moe_intermediate_size=8,
      n_routed_experts=8, n_group=groups, topk_group=kept, kv_lora_rank=10,
      qk_nope_head_dim=4, qk_rope_head_dim=6, v_head_dim=5, **SIZES, **rest,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("deepseek")
    check_family(hf.DeepseekV3ForCausalLM, config, folder, "deepseek_v3", seed)

  sweep(examples, st.fixed_dictionaries(drawn), fixed, check)


@draws
def test_glm4_moe_equals_transformers(hf, tmp_path_factory, examples):
  """Published GLM-4.5 rotates half of each head."""
  drawn = ANY | {
    "groups": st.sampled_from([(1, 1), (4, 2)]),
    "partial_rotary_factor": st.sampled_from([0.25, 0.5, 1.0]),
    "attention_bias": st.booleans(),
    "use_qk_norm": st.booleans(),
    "first_k_dense_replace": st.sampled_from([0, 1]),
  }
  fixed = {
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "groups": (4, 2),
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "use_qk_norm": True,
    "first_k_dense_replace": 1,
  }

  def check(values, seed):
    (groups, kept), fraction = values["groups"], values["partial_rotary_factor"]
    others = "groups", "rope_parameters", "partial_rotary_factor"
    rest = {key: value for key, value in values.items() if key not in others}
    rope = values["rope_parameters"] | {"partial_rotary_factor": fraction}
    config = hf.Glm4MoeConfig(
      num_attention_heads=2, num_key_value_heads=1, head_dim=8, n_routed_experts=8,
      moe_intermediate_size=8, num_experts_per_tok=3, n_group=groups, topk_group=kept,
      routed_scaling_factor=2.5, num_mtp_layers=0, rope_parameters=rope, **SIZES,
      **rest,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("glm")
    check_family(hf.Glm4MoeForCausalLM, config, folder, "glm4_moe", seed)

  sweep(examples, st.fixed_dictionaries(drawn), fixed, check)


def test_the_trunk_of_a_mimo_folder_is_a_qwen2_model(hf, tmp_path):
  config = common.tiny_config("sequential", 1, RUNS)  # Without biases of its own.
  params = common.random_params(config)
  interop.export_params(params, config, tmp_path / "mimo", "mimo")
  model = hf.AutoModelForCausalLM.from_pretrained(
    tmp_path / "mimo", attn_implementation="eager"
  )
  assert type(model) is hf.Qwen2ForCausalLM
  tokens = np.random.default_rng(0).integers(0, common.VOCAB, (2, T + 2))
  logits_BTV = our_logits(params, config, tokens)[0]
  np.testing.assert_allclose(their_logits(model, tokens), logits_BTV, rtol=0, atol=1e-4)


MODULES = [case for case, (_, _, depth, _) in CASES.items() if depth]


@pytest.mark.parametrize("case", common.mostly_slow(MODULES, MODULES[-1]))
def test_mtp_layers_on_disk_follow_the_published_equations(tmp_path, case):
  layout, kind, depth, overrides = CASES[case]
  config = common.tiny_config(kind, depth, RUNS | overrides)
  params = common.random_params(config)
  interop.export_params(params, config, tmp_path / "out", layout)
  tokens = np.random.default_rng(0).integers(0, common.VOCAB, (2, T + 1 + depth))
  logits_MBTV = our_logits(params, config, tokens)
  assert 0.2 < logits_MBTV.std() < 10
  for row, logits_MTV in enumerate(logits_MBTV.swapaxes(0, 1)):
    expected_MTV = numpy_models.logits(tmp_path / "out", tokens[row], T)
    np.testing.assert_allclose(logits_MTV, expected_MTV, rtol=0, atol=1e-4)


def test_shared_modules_are_written_once_per_depth(tmp_path):
  shared = RUNS | DEEPSEEK | common.SHARED
  config = common.tiny_config("sequential", 2, shared)
  params = common.random_params(config)
  interop.export_params(params, config, tmp_path / "out", "deepseek_v3")
  found = interop.read_model(tmp_path / "out")
  unshared = common.tiny_config("sequential", 2, RUNS | DEEPSEEK | found.overrides)
  loaded = interop.load_params(found, unshared, one_device())
  for name in ("projection", "out_norm"):
    for depth in range(2):
      common.assert_trees_close(
        jax.tree.map(lambda x: x[depth], loaded["mtp"]["modules"][name]),  # noqa: B023
        params["mtp"]["modules"][name], rtol=0, atol=0,
      )  # fmt: skip
  with pytest.raises(interop.InteropError, match="share_modules True"):
    interop.load_params(found, config, one_device())
  assert dataclasses.replace(unshared.mtp, share_modules=True) == config.mtp
