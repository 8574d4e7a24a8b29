"""DeepSeek-V3.2 671B, continued pretraining as in paper section 2.1.1.

python -m experiments.train \
  --config=configs/deepseek_v32_671b.py:dense_warmup --workdir=DIR \
  --config.init_from=CHECKPOINT --config.data.tokenizer.path=tokenizer.json

Variants: dense_warmup (2.1B tokens: 1000 steps of 16 x 128K, lr 1e-3, the
indexer alone), sparse (943.7B tokens: 15000 steps of 480 x 128K, lr 7.3e-6,
top-k 2048, everything), sft. The data are yours: set `config.data.sources`.
prefill and decode are steps of the served model at the end of 128K tokens, for
`experiments.compile_for`.
grpo is for experiments.train_rl, whose generation engine runs in one process;
its problems are the generated ones.
"""

from dsv32_jax import sharding
from dsv32_jax.data import pipeline
from dsv32_jax.data import sources
from dsv32_jax.generation import ahead
from dsv32_jax.generation import programs
from dsv32_jax.model import presets
from dsv32_jax.rl import config as learner_config
from dsv32_jax.rl import grpo
from dsv32_jax.rl import run_config
from dsv32_jax.training import checkpoint
from dsv32_jax.training import optimizer
from dsv32_jax.training import run
from dsv32_jax.training import schedule
from dsv32_jax.training import stages
from dsv32_jax.verifiers import reward
from dsv32_jax.verifiers.tasks import mixture
from experiments import common

_LENGTH = 131072
_ROLLOUT_LENGTH = 32768


def _train(
  stage, *, peak, steps, sequences, microbatches, mesh, packing="concat"
):
  """A stage over 1024 devices; what is not the paper's is named as ours."""
  return run.TrainConfig(
    model=presets.deepseek_v32_671b(),
    stage=stage,
    optimizer=optimizer.OptimizerConfig(
      # Constant: the paper prints a rate a stage and no schedule.
      schedule=schedule.ScheduleConfig(peak=peak),
      moment_dtype="bfloat16",
    ),
    data=pipeline.DataConfig(
      sources=(sources.SourceConfig(kind="jsonl", path="data/*.jsonl"),),
      sequence_length=_LENGTH,
      batch_size=sequences,
      packing=packing,
    ),
    steps=steps,
    mesh=mesh,
    microbatches=microbatches,
    remat="save_selection",
    parameter_dtype="float32",
    compute_dtype="bfloat16",
    checkpoint=checkpoint.CheckpointConfig(every_steps=100),
  )


# Ours: the paper trains on GPUs and prints no layout. The sequences of a
# microbatch divide over fsdp x expert.
_MESH = sharding.MeshConfig(fsdp=2, expert=16, context=32)
_MESH_OF_FEW = sharding.MeshConfig(expert=16, context=64)


def _serve(new_tokens, mesh, batch_size):
  """A step of serving; every choice of it is ours."""
  return ahead.ServeConfig(
    model=presets.deepseek_v32_671b(),
    batch_size=batch_size,
    max_length=_LENGTH,
    new_tokens=new_tokens,
    mesh=mesh,
  )


def _grpo():
  """R1's numbers where V3.2 prints none; R1 names no delta and no top-p."""
  return run_config.RlConfig(
    model=presets.deepseek_v32_671b(),
    tasks=tuple(
      mixture.TaskConfig(kind=kind, size=size, largest=largest)
      for kind, size, largest in (
        ("arithmetic", 8, 999),
        ("sorting", 32, 999),
        ("brackets", 64, 0),
        ("knights", 6, 0),
      )
    ),
    learner=learner_config.LearnerConfig(
      grpo=grpo.GrpoConfig(
        clip_low=0.2, clip_high=0.28, kl_weight=0.001, off_policy_threshold=0.1
      ),
      drop_equal_groups=True,
      minibatches=16,
      reference_every=400,
    ),
    optimizer=optimizer.OptimizerConfig(
      schedule=schedule.ScheduleConfig(peak=3e-6), moment_dtype="bfloat16"
    ),
    sampler=run_config.SamplerConfig(
      engine=programs.EngineConfig(
        max_batch=512,
        num_pages=512 * _ROLLOUT_LENGTH // 64,
        prefill_chunk=1024,
        max_length=_ROLLOUT_LENGTH + 1,
      ),
      max_tokens=_ROLLOUT_LENGTH - 2048,
      top_p=0.95,
    ),
    rollouts=10400,
    prompts=32,
    group_size=16,
    row_lengths=(8192, _ROLLOUT_LENGTH),
    max_staleness=1,
    reward=reward.RewardConfig(thinking=True, format_weight=1.0),
    mesh=_MESH,
    remat="save_selection",
    compute_dtype="bfloat16",
    checkpoint=checkpoint.CheckpointConfig(every_steps=25),
  )


def get_config(variant: str = "sparse"):
  variants = {
    "dense_warmup": lambda: _train(
      stages.DENSE_WARMUP,
      peak=1e-3,
      steps=1000,
      sequences=16,
      microbatches=1,
      mesh=_MESH_OF_FEW,
    ),
    "sparse": lambda: _train(
      stages.SPARSE,
      peak=7.3e-6,
      steps=15000,
      sequences=480,
      microbatches=15,
      mesh=_MESH,
    ),
    # Ours: the paper says nothing of the fine-tuning's size.
    "sft": lambda: _train(
      stages.SFT,
      peak=5e-6,
      steps=1000,
      sequences=64,
      microbatches=2,
      mesh=_MESH,
      packing="first_fit",
    ),
    # For 64 devices: of each expert layer four experts a device.
    "prefill": lambda: _serve(
      8192, sharding.MeshConfig(expert=16, tensor=4), batch_size=16
    ),
    "decode": lambda: _serve(1, sharding.MeshConfig(expert=64), batch_size=64),
    "grpo": _grpo,
  }
  return common.config_variant(variants, variant)
