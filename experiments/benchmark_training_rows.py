"""What the training benchmark measures, a row each, and how a row reads."""

import dataclasses
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.data import batch as batch_lib
from dsv32_jax.data import pipeline
from dsv32_jax.data import sources
from dsv32_jax.data import tokenizer
from dsv32_jax.model import fresh
from dsv32_jax.model import presets
from dsv32_jax.training import optimizer
from dsv32_jax.training import profiling
from dsv32_jax.training import run
from dsv32_jax.training import schedule
from dsv32_jax.training import stages
from dsv32_jax.training import step as step_lib
from experiments import benchmark_generation_rows
from experiments import stopwatch

# B batch, T tokens

MODELS = {"small": presets.small, "tiny": presets.tiny}
REMAT = run.REMAT
STAGES = {
  "dsa": stages.SPARSE,
  "dense": dataclasses.replace(
    stages.SPARSE, select="dense", trains="model", indexer_weight=0.0
  ),
}
# Of the input pipeline.
_BATCHES, _BATCH_SIZE = 16, 8


def rows(lengths, model: str, remat: str, threads: int, single_from: int):
  """Yields the rows: job, variant, length and how to run."""

  def row(job, variant, length):
    return dict(
      job=job,
      variant=variant,
      length=length,
      model=model,
      remat=remat,
      threads=threads,
      single=length >= single_from,
    )

  yield row("input", "stdlib", lengths[0])
  for length in lengths:
    for variant in STAGES:
      yield row("step", variant, length)


def check_lengths(values, model: str) -> list[int]:
  """Reads --lengths.

  Raises:
    ValueError: naming the flag, if one is no length that the model takes.
  """
  lengths = benchmark_generation_rows.integers("lengths", values)
  longest = MODELS[model]().max_length
  if max(lengths) > longest:
    raise ValueError(f"--lengths={max(lengths)} exceeds {model}'s {longest}")
  return sorted(lengths)


def measure(row, workdir) -> dict:
  """Measures one row in this process."""
  jobs = {"step": _step, "input": _input}
  return jobs[row["job"]](row, workdir)


def _step(row, workdir):
  config, length = MODELS[row["model"]](), row["length"]
  stage = STAGES[row["variant"]]
  transformation = optimizer.make_optimizer(
    optimizer.OptimizerConfig(schedule=schedule.ScheduleConfig(peak=1e-5))
  )
  model = fresh.fresh_model(config, seed=0, dtype=jnp.float32)
  graph, state = step_lib.init_state(model, stage, transformation)
  del model
  state = jax.device_put(state, jax.devices()[0])
  tokens_BT = np.random.default_rng(0).integers(
    0, config.vocab_size, (1, length)
  )
  ones_BT = np.ones_like(tokens_BT)
  batch = batch_lib.from_packed(
    tokens_BT, ones_BT, ones_BT, np.arange(length)[None]
  )
  step = step_lib.make_step(
    graph, stage, transformation, remat=REMAT[row["remat"]]
  )
  began = time.perf_counter()
  compiled = step.lower(state, batch).compile()
  compile_seconds = time.perf_counter() - began

  def one():
    nonlocal state
    state, metrics = compiled(state, batch)
    jax.block_until_ready((state, metrics))

  if row["single"]:
    found = stopwatch.measure(one, runs=1, warm_up=False)
  else:
    found = stopwatch.measure(one, runs=3, budget=20.0)
    folder = workdir / "profiles" / f"{row['variant']}_{length}"
    with jax.profiler.trace(str(folder)):
      one()
    found["parts"] = profiling.seconds_by_part(folder, compiled.as_text())
  memory = compiled.memory_analysis()
  return found | {
    "compile_seconds": compile_seconds,
    "state_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
  }


def _input(row, workdir):
  """Batches of fresh text, each document encoded for the first time."""
  del workdir
  config = MODELS[row["model"]]()
  data = pipeline.DataConfig(
    sources=(sources.SourceConfig(kind="stdlib_train"),),
    sequence_length=row["length"],
    batch_size=_BATCH_SIZE,
    tokenizer=tokenizer.TokenizerConfig(
      vocab_size=config.vocab_size, sample_bytes=10**6
    ),
  )
  made = pipeline.make_tokenizer(data)
  with pipeline.make_batches(data, made) as batches:
    # What opens the sources is paid once.
    next(batches)
    began = time.perf_counter()
    read = list(itertools.islice(batches, _BATCHES))
    seconds = time.perf_counter() - began
  tokens = sum(batch.tokens_BT.size for batch in read)
  return {"tokens": tokens, "seconds": seconds}


def line(result: dict) -> str:
  """Describes one result on a line."""
  head = "{job} {variant} {length}".format(**result)
  if result["job"] == "input":
    rate = result["tokens"] / result["seconds"]
    return f"{head}: {rate:.0f} tokens/s"
  length = result["length"]
  return (
    f"{head}: {length / result['seconds']:.0f} tokens/s,"
    f" {result['seconds']:.1f} s a step ({result['cpu_seconds']:.1f} s of CPU),"
    f" {result['temporary_bytes'] / length / 1e3:.0f} KB a token beside"
    f" {result['state_bytes'] / 1e9:.2f} GB of state, peak"
    f" {result['peak_rss_bytes'] / 1e9:.2f} GB resident, compiled in"
    f" {result['compile_seconds']:.0f} s, {result['other_cpus']:.1f} CPUs busy"
    " elsewhere"
  )
