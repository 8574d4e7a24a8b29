"""Many short prompts at once, by how many of them a step takes."""

import time

import numpy as np

from dsv32_jax.generation import engine as engine_lib
from dsv32_jax.generation import requests
from experiments import stopwatch

# Prompt tokens of a step, in however many rows.
CHUNK = 256
PAGE_SIZE = 16


def measure(model, num_prompts: int, longest: int, rows: int) -> dict:
  """Times random prompts up to the first token of each.

  Args:
    model: Transformer.
    num_prompts: asked for together.
    longest: tokens of a prompt, which has at least half as many.
    rows: of a step; 1: a step takes a part of one prompt.

  Returns:
    As stopwatch.measure, and the `tokens` of a run, its `steps` and the mean
    `first_token_seconds`, of the last run.
  """
  pages = -(-(longest + 1) // PAGE_SIZE)
  config = engine_lib.EngineConfig(
    max_batch=16,
    page_size=PAGE_SIZE,
    num_pages=16 * pages,
    prefill_chunk=CHUNK,
    prefill_rows=rows,
    max_length=pages * PAGE_SIZE,
  )
  engine = engine_lib.Engine(model, config)
  generator = np.random.default_rng(0)
  lengths = generator.integers(longest // 2, longest + 1, num_prompts)
  found = {"tokens": int(lengths.sum())}

  def run():
    begun, first = time.perf_counter(), []
    for length in lengths:
      # Other tokens in each run: no prompt shares anything.
      ids = generator.integers(2, model.config.vocab_size, length)
      sampling = requests.SamplingParameters(max_tokens=1, seed=0)
      engine.submit(requests.Request(prompt_ids=ids, sampling=sampling))
    found["steps"] = 0
    while engine.has_work:
      events = engine.step()
      found["steps"] += 1
      first += [time.perf_counter() - begun] * len(events)
    found["first_token_seconds"] = float(np.mean(first))

  timed = stopwatch.measure(run, runs=5)
  return timed | found
