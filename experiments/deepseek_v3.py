"""DeepSeek-V3's recipe: latent attention, balanced experts and MTP in one model.

  python -m launch.train --config=experiments/deepseek_v3.py:cpu --workdir=runs/v3
  python -m launch.generate --workdir=runs/v3 --prompt="def "
  python -m launch.export --workdir=runs/v3 --layout=deepseek_v3 --output=exported/v3

Preset `cpu` (default): the three parts at a size that two CPU cores train in about five
minutes (what came of it is in `experiments/README.md`).
Eight experts, of which two and a shared one see each token, chosen within two of four
groups; the first layer is dense, the MTP module has experts like the trunk.

Preset `v3`: the sizes of the released model, as in its config.json and report (arXiv
2412.19437, section 4.2), for 2048 devices: 671 billion parameters without the MTP
module. Its shapes are tested; it has never been trained here. Name your own
prepared text with --config.data.path. Pre-training has a context of 4096 without YaRN;
the released model extends it by YaRN: --config.trunk.rope_scaling.kind=yarn with
.factor=40, .original_length=4096 and .mscale_all_dim=1.
"""

from ml_collections import ConfigDict

from experiments import base


def get_config(preset: str = "cpu") -> ConfigDict:
  config = base.get_config()
  config.name = "deepseek_v3"
  config.trunk.attention_kind = "latent"
  config.mtp.update(
    kind="sequential", depth=1, schedule="piecewise", schedule_fraction=0.67
  )
  if preset == "cpu":
    _cpu(config)
  elif preset == "v3":
    _v3(config)
  else:
    raise ValueError(f"preset must be 'cpu' or 'v3', got {preset!r}.")
  return config


def _cpu(config: ConfigDict) -> None:
  config.trunk.update(num_kv_heads=4, num_layers=4)
  config.trunk.latent.update(
    query_rank=64, kv_rank=32, nope_dim=32, rope_dim=16, value_dim=32
  )
  config.trunk.moe.update(
    num_experts=8,
    experts_per_token=2,
    expert_dim=96,
    num_groups=4,
    groups_per_token=2,
    bias_rate=0.003,  # Three times the usual one: there are few steps.
  )
  config.train.update(num_steps=600, diagnostics_every=0)
  config.eval.update(line_prompts=32, function_prompts=16)


def _v3(config: ConfigDict) -> None:
  config.tokenizer.update(kind="bpe", vocab_size=129_280)
  config.trunk.update(
    num_layers=61,
    embed_dim=7168,
    mlp_dim=18_432,
    num_heads=128,
    num_kv_heads=128,
    remat="full",
  )
  config.trunk.latent.update(
    query_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128
  )
  config.trunk.moe.update(
    num_experts=256,
    experts_per_token=8,
    expert_dim=2048,
    num_shared=1,
    dense_layers=3,
    num_groups=8,
    groups_per_token=4,
    route_scale=2.5,
    bias_rate=0.001,
    bias_until=0.966,  # 14.3 of 14.8 T tokens.
    balance_weight=1e-4,
  )
  config.data.update(
    source="array_record",
    path="prepared/deepseek_v3",
    seq_len=4096,
    batch_size=16_384,
    validation_fraction=0.001,
    test_fraction=0.001,
    num_workers=8,
  )
  config.optimizer.update(learning_rate=2.2e-4, base_width=7168, final_fraction=0.03)
  config.train.update(num_steps=220_000, log_every=10, diagnostics_every=0)
  config.train.accumulation_steps = 8
  config.mesh.update(data=1, fsdp=256, expert=8, tensor=1)
  config.checkpoint.update(every_steps=500, keep=2)
  config.eval.update(num_rows=4096, batch_size=2048, line_prompts=0, function_prompts=0)
