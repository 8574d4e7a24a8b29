"""A run that stops and goes on equals one that never stopped, bit for bit."""

import dataclasses
import os
import pathlib
import signal

from flax import nnx
import jax
import numpy as np
import pytest

from dsv32_jax import sharding
from dsv32_jax.data import pipeline
from dsv32_jax.data import sources
from dsv32_jax.data import tokenizer
from dsv32_jax.training import checkpoint
from dsv32_jax.training import loop
from dsv32_jax.training import optimizer
from dsv32_jax.training import run
from dsv32_jax.training import schedule
from tests.support import models
from tests.support import stage_steps

VOCAB = 300


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text")
  generator = np.random.default_rng(0)
  words = ["alpha", "beta", "gamma", "delta", "(x)", "return", "\n"]
  for i in range(12):
    chosen = generator.choice(words, 200)
    (folder / f"{i}.txt").write_text(" ".join(chosen))
  return folder


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """Runs see one of the eight devices."""
  make_mesh = sharding.make_mesh
  monkeypatch.setattr(
    sharding, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1])
  )


def config(text, stage="sparse", steps=6, **changes):
  return run.TrainConfig(
    model=models.tiny_config(
      vocab_size=VOCAB, num_layers=2, num_mtp_layers=0, initializer_scale=0.05
    ),
    stage=stage_steps.STAGES[stage],
    optimizer=optimizer.OptimizerConfig(
      schedule=schedule.ScheduleConfig(peak=1e-2, warmup_steps=2),
      max_consecutive_skips=2,
    ),
    data=pipeline.DataConfig(
      sources=(sources.SourceConfig(kind="text", path=f"{text}/*.txt"),),
      sequence_length=32,
      batch_size=4,
      tokenizer=tokenizer.TokenizerConfig(vocab_size=VOCAB),
    ),
    steps=steps,
    checkpoint=checkpoint.CheckpointConfig(every_steps=2),
    **changes,
  )


def outcome(finished, folder):
  """The metrics file and every array of a finished run."""
  state = stage_steps.flat(nnx.state(finished.model()))
  return (pathlib.Path(folder) / "metrics.jsonl").read_bytes(), state


def same(one, other):
  assert one[0] == other[0]
  assert one[1].keys() == other[1].keys()
  for path, value in one[1].items():
    np.testing.assert_array_equal(value, other[1][path], err_msg=str(path))


@pytest.mark.parametrize(
  "stage",
  [
    "sparse",
    pytest.param("pretrain", marks=pytest.mark.slow),
    pytest.param("dense_warmup", marks=pytest.mark.slow),
  ],
)
def test_sigterm_saves_and_the_run_goes_on_bitwise(
  text, tmp_path, stage, monkeypatch
):
  whole = loop.train(config(text, stage), tmp_path / "whole")
  place, calls = run.Run.place, []

  def place_and_ask_to_stop(self, batch):
    calls.append(None)
    if len(calls) == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    return place(self, batch)

  monkeypatch.setattr(run.Run, "place", place_and_ask_to_stop)
  with pytest.raises(run.Stopped, match="step 3 of 6"):
    loop.train(config(text, stage), tmp_path / "parts")
  assert len(calls) == 3
  again = loop.train(config(text, stage), tmp_path / "parts")
  assert len(calls) == 6
  same(outcome(whole, tmp_path / "whole"), outcome(again, tmp_path / "parts"))
  # It learnt something: the text has seven words.
  losses = [
    r["loss"]
    for r in loop.metrics_lib.read_rows(tmp_path / "whole" / "metrics.jsonl")
  ]
  assert losses[-1] < losses[0]


def test_another_config_in_the_same_folder_is_refused(text, tmp_path):
  loop.train(config(text, steps=1), tmp_path)
  other = dataclasses.replace(config(text, steps=2), seed=5)
  with pytest.raises(ValueError, match=r"another config\.seed"):
    loop.train(other, tmp_path)


def test_gradients_that_stay_infinite_stop_the_run(text, tmp_path, monkeypatch):
  place = run.Run.place

  def poisoned(self, batch):
    mask_BT = np.full_like(batch.loss_mask_BT, np.inf)
    return place(self, dataclasses.replace(batch, loss_mask_BT=mask_BT))

  monkeypatch.setattr(run.Run, "place", poisoned)
  with pytest.raises(ValueError, match="2 steps in a row were not finite"):
    loop.train(config(text), tmp_path)


def test_a_stage_starts_from_the_weights_of_the_one_before(text, tmp_path):
  first = loop.train(config(text, steps=1), tmp_path / "first")
  second = run.Run(
    config(text, init_from=str(tmp_path / "first" / "checkpoints")),
    tmp_path / "second",
  )
  assert second.resume() == 0
  before = stage_steps.flat(nnx.state(first.model()))
  after = stage_steps.flat(nnx.state(second.model()))
  second.close()
  for path, value in before.items():
    np.testing.assert_array_equal(after[path], value, err_msg=str(path))


def test_a_model_that_is_not_the_configs_is_refused(text, tmp_path):
  loop.train(config(text, steps=1), tmp_path / "first")
  wrong = config(text, init_from=str(tmp_path / "first" / "checkpoints"))
  wrong = dataclasses.replace(
    wrong, model=dataclasses.replace(wrong.model, routed_scale=1.0)
  )
  second = run.Run(wrong, tmp_path / "second")
  with pytest.raises(ValueError, match="routed_scale"):
    second.resume()
  second.close()
