"""What the recipe trains and measures, and how long."""

import dataclasses
import os

from dsv32_jax import sharding
from dsv32_jax.data import pipeline
from dsv32_jax.data import sources
from dsv32_jax.data import tokenizer as tokenizer_lib
from dsv32_jax.model import config as config_lib
from dsv32_jax.training import checkpoint as checkpoint_lib
from dsv32_jax.training import optimizer as optimizer_lib
from dsv32_jax.training import run as run_lib
from dsv32_jax.training import schedule as schedule_lib
from dsv32_jax.training import stages

TOKENIZER_FILE = "tokenizer.json"
# One step in so many of a stage raises the learning rate.
_WARMUP_SHARE = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureConfig:
  """What is measured on held-out text.

  Attributes:
    length: tokens a row, at least 8 times the model's index_top_k.
    rows: files at most; each gives its first `length` tokens.
    batch_size: rows at a time.
    mass_rows: rows on which the kept attention mass is measured.
    decode_positions: tokens in context at which a decoded token is timed.
    decode_tokens: tokens timed at each.
    prompt_tokens: of the held-out file that the samples continue.
    new_tokens: of a sample.
    temperature: of the samples.
    top_p: of the samples.
  """

  length: int
  rows: int
  batch_size: int = 4
  mass_rows: int = 8
  decode_positions: tuple[int, ...]
  decode_tokens: int = 16
  prompt_tokens: int = 96
  new_tokens: int = 64
  temperature: float = 0.7
  top_p: float = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeConfig:
  """The stages in order, with the controls; rates and lengths are ours.

  Attributes:
    model: shape of the model.
    measure: what is measured.
    sequence_length: tokens a training row.
    batch_size: rows a step.
    pretrain_steps: of the dense model.
    warmup_steps: of the dense warm-up, in which the indexer alone trains.
    sparse_steps: of the sparse training, and of each control's own.
    pretrain_rate: peak learning rate.
    warmup_rate: likewise.
    sparse_rate: likewise.
    mesh: devices along each axis; by default all hold a share of the batch.
    seed: of weights and data.
  """

  model: config_lib.ModelConfig
  measure: MeasureConfig
  sequence_length: int
  batch_size: int
  pretrain_steps: int
  warmup_steps: int
  sparse_steps: int
  pretrain_rate: float = 3e-3
  warmup_rate: float = 3e-3
  sparse_rate: float = 1e-3
  mesh: sharding.MeshConfig = dataclasses.field(
    default_factory=lambda: sharding.MeshConfig(data=-1)
  )
  seed: int = 0

  def __post_init__(self):
    top_k, length = self.model.index_top_k, self.measure.length
    settings = self.measure
    room = settings.decode_positions[0]
    if settings.prompt_tokens + settings.new_tokens > room:
      raise ValueError(
        f"measure.prompt_tokens={settings.prompt_tokens} and"
        f" measure.new_tokens={settings.new_tokens} exceed"
        f" measure.decode_positions[0]={room}"
      )
    if length < 8 * top_k:
      raise ValueError(
        f"measure.length={length} is below 8 * model.index_top_k={8 * top_k}:"
        " too short to tell selections apart"
      )
    for name in ("measure.length", "sequence_length"):
      value = length if name.startswith("measure") else self.sequence_length
      if value > self.model.max_length:
        raise ValueError(
          f"{name}={value} exceeds model.max_length={self.model.max_length}"
        )


# Stage -> (the stage it starts from, what the report calls it).
STAGES = {
  "pretrain": (None, "dense pretraining"),
  "dense_warmup": ("pretrain", "dense warm-up of the indexer"),
  "sparse": ("dense_warmup", "sparse training"),
  "random": ("pretrain", "control: random keys"),
  "window": ("pretrain", "control: sliding window"),
  "dense": ("pretrain", "reference: dense, trained on"),
}


def stage_config(
  config: RecipeConfig, name: str, workdir: str
) -> run_lib.TrainConfig:
  """Builds the training config of a stage in STAGES.

  The four stages of equal length see the same data in the same order.
  """
  pretrain = stages.PRETRAIN
  sparse = dataclasses.replace(stages.SPARSE, router_bias_speed=1e-3)
  long, short, middle = (
    (config.pretrain_steps, config.pretrain_rate),
    (config.warmup_steps, config.warmup_rate),
    (config.sparse_steps, config.sparse_rate),
  )
  stage, (steps, rate), data_seed = {
    "pretrain": (pretrain, long, 0),
    "dense_warmup": (stages.DENSE_WARMUP, short, 1),
    "sparse": (sparse, middle, 2),
    "random": (dataclasses.replace(pretrain, select="random"), middle, 2),
    "window": (dataclasses.replace(pretrain, select="window"), middle, 2),
    "dense": (pretrain, middle, 2),
  }[name]
  before = STAGES[name][0]
  warmup = max(1, steps // _WARMUP_SHARE)
  return run_lib.TrainConfig(
    model=config.model,
    stage=stage,
    optimizer=optimizer_lib.OptimizerConfig(
      schedule=schedule_lib.ScheduleConfig(
        peak=rate,
        warmup_steps=warmup,
        decay_steps=max(1, steps - warmup),
        final=rate / 10,
      )
    ),
    data=data_config(
      config,
      seed=3 * config.seed + data_seed,
      tokenizer_path=os.path.join(workdir, TOKENIZER_FILE),
    ),
    steps=steps,
    mesh=config.mesh,
    seed=config.seed,
    init_from=before and os.path.join(workdir, before, "checkpoints"),
    checkpoint=checkpoint_lib.CheckpointConfig(
      every_steps=max(1, steps // 2), max_to_keep=1
    ),
  )


def data_config(
  config: RecipeConfig, *, seed: int = 0, tokenizer_path: str | None = None
) -> pipeline.DataConfig:
  """The standard library's training side; without a path, a new tokenizer.

  A batch's rows come from as many streams, each in an order of its own: rows
  of one stream follow one another in the same file, and would make a batch of
  a single file's text.
  """
  streams = 1 if tokenizer_path is None else config.batch_size
  return pipeline.DataConfig(
    sources=(sources.SourceConfig(kind="stdlib_train"),) * streams,
    sequence_length=config.sequence_length,
    batch_size=config.batch_size,
    seed=seed,
    tokenizer=tokenizer_lib.TokenizerConfig(
      path=tokenizer_path, vocab_size=config.model.vocab_size
    ),
  )
