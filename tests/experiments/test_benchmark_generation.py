"""The generation benchmark's bookkeeping, and what it runs, on a tiny model."""

import collections
import json

import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.evals import engine_time
from dsv32_jax.generation import engine as engine_lib
from experiments import benchmark_generation_gap
from experiments import benchmark_generation_plots
from experiments import benchmark_generation_prompts
from experiments import benchmark_generation_rows
from experiments import benchmark_generation_speculation
from tests.support import models


def all_rows():
  return list(benchmark_generation_rows.rows([1024, 4096], [1, 4, 16], 8192, 2))


def results():
  """Made-up results: transformers takes 10 times as long, 20 of CPU time."""
  for row in all_rows():
    slow = row["side"] == "transformers"
    seconds = row["length"] * row["batch"] * 1e-6
    yield row | dict(
      seconds=seconds * (10 if slow else 1),
      cpu_seconds=seconds * (20 if slow else 1),
    )


def test_rows_are_not_repeated():
  rows = [json.dumps(row) for row in all_rows()]
  assert len(set(rows)) == len(rows) == 6 + 3 + 4 + 2 + 3 + 3


def test_plots_and_ratios_take_the_last_result_of_a_row(tmp_path):
  recorded = tmp_path / "generation.jsonl"
  rows = list(results())
  throughput = next(r for r in rows if r["job"] == "throughput")
  rows = [throughput | dict(seconds=1e-9), *rows]
  recorded.write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert len(benchmark_generation_plots.load(recorded)) == len(all_rows())
  assert benchmark_generation_plots.write(recorded, tmp_path) == [
    f"batch {batch}, 8192 tokens: 10.0x faster than transformers"
    " (20.0x by CPU time)"
    for batch in (1, 16)
  ]
  for name in ("position.png", "throughput.png"):
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_list_that_is_no_list_of_numbers():
  assert benchmark_generation_rows.integers("batches", ["1", "16"]) == [1, 16]
  with pytest.raises(ValueError, match="--batches=1,x must be"):
    benchmark_generation_rows.integers("batches", ["1", "x"])


@pytest.fixture(scope="module")
def model():
  return models.tiny_model(num_layers=2, num_dense_layers=1, num_mtp_layers=0)


def test_an_engine_in_the_middle_of_long_answers(model):
  config = engine_lib.EngineConfig(
    max_batch=3, page_size=4, num_pages=40, prefill_chunk=8, max_length=48
  )
  engine = engine_time.LongRunning(model, config)
  engine.start(3, 37, num_tokens=4)
  events = [engine.step() for _ in range(4)]
  assert [len(step) for step in events] == [3] * 4
  logprobs = [event.logprob for step in events for event in step]
  assert np.all(np.isfinite(logprobs)) and len(set(logprobs)) == 12
  assert engine.stats()["prompt_tokens"] == 0
  assert {event.finish_reason for event in events[-1]} == {"length"}
  with pytest.raises(ValueError, match="rows or pages"):
    engine.start(4, 9, num_tokens=2)


def test_many_short_prompts(model):
  found = benchmark_generation_prompts.measure(model, 6, 9, rows=2)
  assert 6 * 4 <= found["tokens"] <= 6 * 9
  # Two prompts a step.
  assert found["steps"] == 3
  assert 0 < found["first_token_seconds"] < max(found["runs"])


@pytest.mark.parametrize(
  "dtype,mean,largest", [("float32", 1e-5, 1e-4), ("bfloat16", 0.1, 1.0)]
)
def test_the_gap_between_engine_and_trainer(dtype, mean, largest):
  """Bounds as the RL recipe asks for in float32, and of its order in bf16."""
  model = models.tiny_model(num_layers=2, dtype=jnp.dtype(dtype))
  found = benchmark_generation_gap.compare(model, 2, 19, 8)
  assert found["tokens"] == 16
  assert 0 < found["mean"] < mean and found["largest"] < largest
  assert 0 <= found["kl"] < largest
  assert 0.5 < found["entropy"] < np.log(61)
  if dtype == "bfloat16":
    assert found["mean"] > 1e-4


def test_steps_with_a_draft_and_without():
  model = models.tiny_model(num_layers=2, num_dense_layers=1)
  found = benchmark_generation_speculation.measure_steps(model, 40, steps=2)
  assert found["plain_cpu_seconds"] > 0 and found["cpu_seconds"] > 0
  assert found["ratio"] == found["cpu_seconds"] / found["plain_cpu_seconds"]
  row = next(r for r in all_rows() if r["variant"] == "steps")
  assert f"{found['ratio']:.2f}x" in benchmark_generation_rows.line(row | found)


def test_chains_have_two_successors():
  tokens_BT = benchmark_generation_speculation.texts(50, 200, seed=3)
  pairs = collections.Counter(
    zip(tokens_BT[:, :-1].ravel().tolist(), tokens_BT[:, 1:].ravel().tolist())
  )
  followers = collections.defaultdict(list)
  for (token, _), count in pairs.items():
    followers[token].append(count)
  assert max(map(len, followers.values())) == 2
  often = sum(max(counts) for counts in followers.values())
  assert 0.88 < often / sum(pairs.values()) < 0.93


@pytest.mark.slow
def test_drafts_of_a_trained_module():
  model = models.tiny_model(vocab_size=64, num_layers=2, num_dense_layers=1)
  found = benchmark_generation_speculation.measure_trained(model, 30)
  assert found["parameters"] > 10_000
  for name in ("greedy", "sampled"):
    one = found[name]
    # By chance one draft in 64 would be right.
    assert 0.3 < one["acceptance"] <= 1 and one["tokens_per_step"] > 1.2
    assert one["speedup"] == pytest.approx(
      one["plain_cpu_seconds"] / one["cpu_seconds"]
    )
  row = all_rows()[-1]
  assert "greedy" in benchmark_generation_rows.line(row | found)
