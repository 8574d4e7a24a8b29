"""This project's side of the generation benchmark, one row a process."""

import jax
import jax.numpy as jnp

from dsv32_jax import weights
from dsv32_jax.evals import decode_time
from dsv32_jax.evals import engine_time
from dsv32_jax.generation import engine as engine_lib
from dsv32_jax.generation import sample
from dsv32_jax.model import attention
from dsv32_jax.model import fresh
from dsv32_jax.model import presets
from dsv32_jax.model import selection
from experiments import benchmark_generation_gap
from experiments import benchmark_generation_prompts
from experiments import benchmark_generation_speculation
from experiments import stopwatch

# B batch, T tokens

# Steps timed, after one that compiles.
STEPS = 32


def measure(row, path) -> dict:
  """Times one row of the benchmark.

  Args:
    row: mapping with `job`, `variant`, `batch` and `length`.
    path: Hugging Face folder of the 65M model, for `throughput` and `gap`.

  Returns:
    As stopwatch.measure, of a step; of `gap`, `prompts` and `speculation` as
    their modules'.
  """
  if row["job"] == "gap":
    return benchmark_generation_gap.measure(row, path)
  if row["job"] == "throughput":
    return _engine(weights.load_hf(path), row["batch"], row["length"])
  if row["variant"] == "trained":
    model = fresh.fresh_model(presets.tiny(), seed=0, dtype=jnp.float32)
    return benchmark_generation_speculation.measure_trained(
      model, row["length"]
    )
  model = fresh.fresh_model(presets.small(), seed=0, dtype=jnp.float32)
  if row["job"] == "speculation":
    return benchmark_generation_speculation.measure_steps(model, row["length"])
  if row["job"] == "prompts":
    return benchmark_generation_prompts.measure(
      model, row["batch"], row["length"], int(row["variant"].split()[0])
    )
  if row["variant"] == "engine":
    return _engine(model, row["batch"], row["length"])
  return _plain(model, row["variant"], row["length"])


def _engine(model, batch, length):
  """Steps of an engine whose programs fit any length up to twice this one."""
  page_size = 64
  config = engine_lib.EngineConfig(
    max_batch=batch,
    page_size=page_size,
    num_pages=batch * -(-(length + STEPS + 2) // page_size),
    max_length=2 * length,
  )
  engine = engine_time.LongRunning(model, config)
  engine.start(batch, length, num_tokens=STEPS + 1)

  def run():
    if len(engine.step()) != batch:
      raise ValueError(f"a step gave no token to some of {batch=} requests")

  return stopwatch.measure(run, runs=STEPS)


def _plain(model, variant, length):
  """Single tokens by the model alone, behind a cache of this length."""
  select = selection.TopK(model.config.index_top_k)
  if variant == "dense":
    select = selection.DENSE
  decoder = sample.Decoder(model, attention.AttentionOptions(select=select))
  cache = decode_time.full_cache(decoder, length + STEPS + 1, length)
  token_BT = jnp.zeros((1, 1), jnp.int32)

  def run():
    nonlocal cache
    logits_BV, cache = decoder(token_BT, cache)
    jax.block_until_ready(logits_BV)

  return stopwatch.measure(run, runs=STEPS)
