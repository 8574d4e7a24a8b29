"""Two sizes of the recipe."""

import dataclasses

from dsv32_jax.model import presets
from dsv32_jax.recipe import config


def full() -> config.RecipeConfig:
  """About ten minutes on two CPU cores."""
  return config.RecipeConfig(
    model=dataclasses.replace(
      presets.tiny(),
      vocab_size=1024,
      index_top_k=32,
      num_mtp_layers=0,
      initializer_scale=0.04,
    ),
    sequence_length=512,
    batch_size=8,
    pretrain_steps=240,
    warmup_steps=60,
    sparse_steps=48,
    measure=config.MeasureConfig(
      length=512, rows=96, decode_positions=(256, 1024, 4096)
    ),
  )


def smoke() -> config.RecipeConfig:
  """Two or three minutes, most of them compilation: shows that it runs.

  Its models have hardly begun to learn, so that its selections say nothing.
  """
  return dataclasses.replace(
    full(),
    # Layers of one kind: half the compilation.
    model=dataclasses.replace(
      full().model, num_layers=2, num_dense_layers=0, index_top_k=16
    ),
    sequence_length=128,
    batch_size=4,
    pretrain_steps=40,
    warmup_steps=20,
    sparse_steps=20,
    measure=config.MeasureConfig(
      length=128,
      rows=32,
      batch_size=8,
      mass_rows=4,
      decode_positions=(128,),
      decode_tokens=8,
      prompt_tokens=48,
      new_tokens=24,
    ),
  )
