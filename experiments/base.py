"""Every config value that exists, once. An experiment states its difference from this.

The defaults are a small Llama-style byte model on the Python standard library's own
source: it trains in about a minute on two CPU cores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.name = "base"
  config.seed = 0  # Parameters; the order of the data has its own seed.

  config.trunk = ConfigDict(
    dict(
      kind="llama",
      num_layers=4,
      embed_dim=128,
      mlp_dim=352,
      num_heads=4,
      num_kv_heads=2,
      attention_dim=0,
      attention_kind="grouped",
      latent=dict(query_rank=96, kv_rank=32, nope_dim=32, rope_dim=16, value_dim=32),
      moe=dict(
        num_experts=0,
        experts_per_token=2,
        expert_dim=128,
        num_shared=1,
        dense_layers=1,
        num_groups=1,
        groups_per_token=1,
        route_scale=1.0,
        bias_rate=0.001,
        bias_until=0.97,
        balance_weight=1e-4,
        grouped_matmul="auto",
      ),
      qkv_bias=False,
      qk_norm=False,
      tie_embeddings=False,
      rope_theta=10_000.0,
      rope_scaling=dict(
        kind="none",
        factor=1.0,
        original_length=128,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=0.0,
      ),
      norm_eps=1e-6,
      scan_layers=True,
      remat="names",
      compute_dtype="auto",  # bfloat16 on accelerators, float32 on CPU.
      attention="auto",
    )
  )

  config.mtp = ConfigDict(
    dict(
      kind="none",
      depth=0,
      weight=0.3,
      weighting="mean",
      schedule="constant",
      schedule_fraction=0.67,
      final_weight=0.1,
      depth_weights=(),
      curriculum="none",
      share_modules=False,
      dense_blocks=False,
      mlp_dim=0,
      hidden="chained",
      hidden_norm="after",
      fed="true",
      unembed="shared",
      draft_vocab=0,
      objective="cross_entropy",
      feature_weight=0.0,
      score_from="start",
      arm="added",
    )
  )

  config.loss = ConfigDict(dict(block_tokens=0))

  config.tokenizer = ConfigDict(dict(kind="bytes", vocab_size=264, path=""))

  config.data = ConfigDict(
    dict(
      source="stdlib",
      path="",
      text_field="text",
      train_on="",
      seq_len=128,
      batch_size=16,
      seed=0,
      validation_fraction=0.05,
      test_fraction=0.05,
      num_workers=0,
    )
  )

  config.task = ConfigDict(
    dict(
      num_train=0,
      star_graph=dict(arms=3, length=3, num_labels=30, reversed=False),
      sat=dict(num_variables=7, num_clauses=30, unique=False),
      countdown=dict(num_inputs=4, largest=100, num_pauses=8),
      polynomial=dict(max_operators=5, held_out_operators=7, num_pauses=0),
      induction=dict(num_sentences=10, num_halves=50, num_names=500, fresh_share=0.0),
      siblings=dict(num_parents=5, num_children=500, prefix_length=10),
    )
  )

  config.optimizer = ConfigDict(
    dict(
      kind="adamw",
      learning_rate=3e-3,
      base_width=128,
      schedule="cosine",
      warmup_fraction=0.05,
      decay_fraction=0.2,
      final_fraction=0.03,
      weight_decay=0.1,
      beta1=0.9,
      beta2=0.95,
      eps=1e-8,
      clip_norm=1.0,
    )
  )

  config.train = ConfigDict(
    dict(
      num_steps=500,
      accumulation_steps=1,
      log_every=20,
      eval_every=0,
      evals_per_doubling=0,
      eval_test=False,
      stop_metric="",
      stop_value=0.0,
      diagnostics_every=100,
      max_nonfinite_steps=10,
      freeze_trunk=False,
      trunk_from="",
    )
  )

  config.mesh = ConfigDict(dict(data=-1, fsdp=1, expert=1, tensor=1, context=1))

  config.checkpoint = ConfigDict(dict(every_steps=250, keep=2))

  config.eval = ConfigDict(
    dict(
      split="validation",
      num_rows=256,
      rows_per_document=4,
      batch_size=32,
      line_prompts=64,
      function_prompts=32,
      middle_prompts=0,
      max_new_tokens=64,
      num_drafts=0,
      task_examples=1024,
    )
  )
  return config
