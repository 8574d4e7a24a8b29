"""A run that stops and goes on equals one that never stopped, bit for bit."""

import dataclasses
import json
import os
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
from dsv32_jax.training import held_out
from dsv32_jax.training import loop
from dsv32_jax.training import model_checkpoint
from dsv32_jax.training import optimizer
from dsv32_jax.training import profiling
from dsv32_jax.training import run
from dsv32_jax.training import schedule
from dsv32_jax.training import stages
from dsv32_jax.training import step as step_lib
from tests.support import models
from tests.support import stage_steps
from tests.support import tolerances

VOCAB = 300
RTOL, _ = tolerances.TOLERANCE["float32"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text")
  generator = np.random.default_rng(0)
  words = ["alpha", "beta", "gamma", "delta", "(x)", "return", "\n"]
  for i in range(12):
    chosen = generator.choice(words, 200)
    (folder / f"{i}.txt").write_text(" ".join(chosen))
  with (folder / "answers.jsonl").open("w") as file:
    for _ in range(40):
      prompt, response = (" ".join(generator.choice(words, 3)) for _ in "ab")
      file.write(json.dumps({"prompt": prompt, "response": response}) + "\n")
  return folder


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """Runs see one of the eight devices."""
  make_mesh = sharding.make_mesh
  monkeypatch.setattr(
    sharding, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1])
  )


def data_of(text, stage):
  """Documents, or for fine-tuning answers to prompts, packed whole."""
  if stage != "sft":
    return sources.SourceConfig(kind="text", path=f"{text}/*.txt"), {}
  source = sources.SourceConfig(
    kind="jsonl",
    path=f"{text}/answers.jsonl",
    prompt_field="prompt",
    response_field="response",
  )
  return source, {"packing": "first_fit"}


def config(text, stage="sparse", steps=6, **changes):
  source, packing = data_of(text, stage)
  return run.TrainConfig(
    model=models.tiny_config(
      vocab_size=VOCAB, num_layers=2, num_mtp_layers=0, initializer_scale=0.05
    ),
    stage=(stage_steps.STAGES | {"sft": stages.SFT})[stage],
    optimizer=optimizer.OptimizerConfig(
      schedule=schedule.ScheduleConfig(peak=1e-2, warmup_steps=2),
      max_consecutive_skips=2,
    ),
    data=pipeline.DataConfig(
      sources=(source,),
      sequence_length=64,
      **packing,
      batch_size=4,
      tokenizer=tokenizer.TokenizerConfig(vocab_size=VOCAB),
    ),
    steps=steps,
    **{"checkpoint": checkpoint.CheckpointConfig(every_steps=2)} | changes,
  )


def outcome(finished, folder):
  """Metrics, parameters, and what the last checkpoint tells of a run."""
  state = stage_steps.flat(nnx.state(finished.model()))
  step = str(finished.config.steps)
  path = folder / "checkpoints" / step / "manifest" / "metadata"
  manifest = json.loads(path.read_text())
  # Checksums of the optimiser's moments and counters too; the data position.
  saved = manifest["trees"], manifest["process_notes"]
  return (folder / "metrics.jsonl").read_bytes(), state, saved


def same(one, other):
  assert one[0] == other[0]
  assert one[2] == other[2]
  assert one[1].keys() == other[1].keys()
  for path, value in one[1].items():
    np.testing.assert_array_equal(value, other[1][path], err_msg=str(path))


def test_data_that_end_before_the_steps_are_told(text, tmp_path):
  source, packing = data_of(text, "sft")
  plan = config(text, steps=50)
  data = dataclasses.replace(
    plan.data, sources=(source,), num_epochs=1, **packing
  )
  with pytest.raises(ValueError, match="num_epochs=1 has batches") as told:
    loop.train(dataclasses.replace(plan, data=data), tmp_path)
  rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
  # Every batch was learned from.
  with pipeline.make_batches(
    data, tokenizer.load(tmp_path / "tokenizer.json")
  ) as batches:
    given = len(list(batches))
  assert 0 < given < 50 and f"for {given} of them" in str(told.value)
  assert [json.loads(row)["step"] for row in rows] == list(range(1, given + 1))


@pytest.mark.parametrize(
  "stage",
  [
    "sparse",
    pytest.param("pretrain", marks=pytest.mark.slow),
    pytest.param("dense_warmup", marks=pytest.mark.slow),
    pytest.param("sft", marks=pytest.mark.slow),
  ],
)
def test_sigterm_saves_and_the_run_goes_on_bitwise(
  text, tmp_path, stage, monkeypatch
):
  steps, stopped = 12, 5
  whole = loop.train(config(text, stage, steps), tmp_path / "whole")
  place, calls = run.Run.place, []

  def place_and_ask_to_stop(self, batch):
    calls.append(None)
    if len(calls) == stopped:
      os.kill(os.getpid(), signal.SIGTERM)
    return place(self, batch)

  monkeypatch.setattr(run.Run, "place", place_and_ask_to_stop)
  with pytest.raises(run.Stopped, match=f"step {stopped} of {steps}"):
    loop.train(config(text, stage, steps), tmp_path / "parts")
  assert len(calls) == stopped
  again = loop.train(config(text, stage, steps), tmp_path / "parts")
  assert len(calls) == steps
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
  # What stopped it can be looked at; the parameters saved before are good.
  with np.load(tmp_path / "not_finite_step2_process0.npz") as left:
    assert left["tokens_BT"].shape == (4, 64)
    assert not np.isfinite(left["gradient_norm"])


def test_held_out_text_is_measured_and_chooses_the_best(text, tmp_path):
  held_out_config = held_out.HeldOutConfig(
    sources=(data_of(text, "sft")[0],), batches=2
  )
  measured = config(
    text,
    steps=4,
    microbatches=2,
    held_out=held_out_config,
    checkpoint=checkpoint.CheckpointConfig(
      every_steps=2, max_to_keep=1, keep_best=1
    ),
  )
  finished = loop.train(measured, tmp_path)
  rows = [
    row
    for row in loop.metrics_lib.read_rows(tmp_path / "metrics.jsonl")
    if row["name"] == "held_out"
  ]
  assert [row["step"] for row in rows] == [2, 4]
  # Once more, by the step's own loss on the same rows.
  batches = held_out.read_batches(
    held_out_config, measured.data, finished.tokenizer
  )

  @jax.jit
  def whole_batch(model, batch):
    per = step_lib.denominators(batch, 1)
    return step_lib.stage_loss(model, batch, measured.stage, per)[0]

  losses = [whole_batch(finished.model(), batch) for batch in batches]
  np.testing.assert_allclose(rows[-1]["loss"], np.mean(losses), rtol=RTOL)
  best = min(rows, key=lambda row: row["loss"])["step"]
  with checkpoint.Checkpointer(
    tmp_path / "checkpoints", read_only=True
  ) as saved:
    assert saved.best_step() == best
    assert saved.steps() == sorted({best, 4})
  chosen = model_checkpoint.load_model(tmp_path / "checkpoints", step="best")
  again = model_checkpoint.load_model(tmp_path / "checkpoints", step=best)
  np.testing.assert_array_equal(chosen.head.kernel[...], again.head.kernel[...])


@pytest.mark.slow
def test_a_profile_shows_every_part_of_a_step(text, tmp_path):
  plain = loop.train(config(text, steps=5), tmp_path / "plain")
  profiled = loop.train(config(text, steps=5), tmp_path / "run", profile=True)
  same(outcome(plain, tmp_path / "plain"), outcome(profiled, tmp_path / "run"))
  folder = tmp_path / "run" / "profile"
  assert list(folder.rglob("*.xplane.pb"))
  parts = json.loads((folder / "parts.json").read_text())
  assert set(parts) == {*profiling.PARTS.values(), profiling.OTHER}
  assert all(seconds > 0 for seconds in parts.values())
  assert parts[profiling.OTHER] < 0.5 * sum(parts.values())
  with pytest.raises(ValueError, match="a profile takes 4 steps, from 5 to"):
    loop.train(config(text, steps=8), tmp_path / "run", profile=True)


def test_the_best_need_something_to_compare_by(text):
  with pytest.raises(ValueError, match=r"keep_best=1 needs held_out\.batches"):
    config(text, checkpoint=checkpoint.CheckpointConfig(keep_best=1))


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
