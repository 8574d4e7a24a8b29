"""A run goes on with other numbers of devices, laid out otherwise."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dsv32_jax import sharding
from dsv32_jax.data import pipeline
from dsv32_jax.data import sources
from dsv32_jax.data import tokenizer
from dsv32_jax.training import checkpoint
from dsv32_jax.training import loop
from dsv32_jax.training import metrics
from dsv32_jax.training import optimizer
from dsv32_jax.training import run
from dsv32_jax.training import schedule
from tests.support import models
from tests.support import stage_steps
from tests.support import tolerances

RTOL, _ = tolerances.TOLERANCE["float32"]
VOCAB = 300
# Each part of the run takes two steps more.
PARTS = (
  dict(data=2, fsdp=2),
  dict(fsdp=2),
  dict(data=2, expert=2, tensor=2),
)


@pytest.fixture(autouse=True)
def as_many_devices_as_needed(monkeypatch):
  make_mesh = sharding.make_mesh

  def make(config):
    sizes = list(dataclasses.asdict(config).values())
    return make_mesh(config, jax.devices()[: int(np.prod(sizes))])

  monkeypatch.setattr(sharding, "make_mesh", make)


def config(folder, steps, **mesh):
  return run.TrainConfig(
    model=models.tiny_config(
      vocab_size=VOCAB, num_layers=2, num_mtp_layers=0, initializer_scale=0.05
    ),
    stage=stage_steps.STAGES["sparse"],
    optimizer=optimizer.OptimizerConfig(
      schedule=schedule.ScheduleConfig(peak=1e-3)
    ),
    data=pipeline.DataConfig(
      sources=(sources.SourceConfig(kind="text", path=f"{folder}/*.txt"),),
      sequence_length=32,
      batch_size=4,
      tokenizer=tokenizer.TokenizerConfig(vocab_size=VOCAB),
    ),
    steps=steps,
    mesh=sharding.MeshConfig(**mesh),
    checkpoint=checkpoint.CheckpointConfig(every_steps=2, max_to_keep=None),
  )


def leaves_of(state):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(state))]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_then_two_then_eight_devices(tmp_path):
  generator = np.random.default_rng(0)
  words = ["alpha", "beta", "gamma", "delta", "(x)", "return", "\n"]
  for i in range(12):
    text = " ".join(generator.choice(words, 200))
    (tmp_path / f"{i}.txt").write_text(text)
  whole = tmp_path / "whole"
  loop.train(config(tmp_path, 2 * len(PARTS), data=1), whole)
  parts, before, layouts = tmp_path / "parts", None, set()
  for number, mesh in enumerate(PARTS, 1):
    part = config(tmp_path, 2 * number, **mesh)
    if before is not None:
      resumed = run.Run(part, parts)
      assert resumed.resume() == 2 * number - 2
      for got, want in zip(leaves_of(resumed.state), before, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
      resumed.close()
    finished = loop.train(part, parts)
    before = leaves_of(finished.state)
    layouts.add(str(finished.model().moe_layers.ffn.up[...].sharding))
  assert len(layouts) == len(PARTS)
  got, want = (
    metrics.read_rows(folder / "metrics.jsonl") for folder in (parts, whole)
  )
  assert [row["step"] for row in got] == list(range(1, 2 * len(PARTS) + 1))
  for row, expected in zip(got, want, strict=True):
    np.testing.assert_allclose(row["loss"], expected["loss"], rtol=RTOL)
  # The data went on where they stood.
  positions = [
    json.loads(
      (folder / "checkpoints" / "6" / "manifest" / "metadata").read_text()
    )["process_notes"]
    for folder in (parts, whole)
  ]
  assert positions[0] == positions[1]
