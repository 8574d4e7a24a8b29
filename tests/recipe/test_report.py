"""The report says what the numbers say, also when they are bad."""

import dataclasses
import json
import math

import numpy as np
import pytest

from dsv32_jax.evals import held_out
from dsv32_jax.recipe import config as config_lib
from dsv32_jax.recipe import measure
from dsv32_jax.recipe import record
from dsv32_jax.recipe import report
from dsv32_jax.recipe import report_text
from dsv32_jax.recipe import sizes
from dsv32_jax.training import stages


def made_up(dsa: float, seconds=(1e-3, 2e-3)) -> dict:
  """Results in which DSA's loss is `dsa` and the others' 2, 3 and 4."""
  noise_R = np.random.default_rng(0).normal(size=9) * 1e-3

  def scores(loss):
    return {
      "loss": loss,
      "accuracy": 0.25,
      "tokens": 900,
      "rows": 9,
      "row_losses": (loss + noise_R * loss).tolist(),
      "position_edges": [0, 50, 100],
      "position_losses": [loss, loss],
    }

  losses = {"dense": 2.0, "dsa": dsa, "random": 4.0, "window": 3.0}
  mass = {"dsa": 0.8, "best": 0.9, "random": 0.2, "window": 0.5}
  curve = {"step": [1, 2, 3], "lm_loss": [3.0, 2.5, 2.0]}
  return {
    "held_out": {
      when: {name: scores(loss) for name, loss in losses.items()}
      for when in ("before", "after")
    },
    "mass": {
      when: {name: [[m] * 4] * 2 for name, m in mass.items()}
      for when in ("before", "after")
    },
    "generation": {
      "positions": [128, 512],
      "seconds": {"dense": list(seconds), "dsa": [3e-3, 1e-3]},
      "prompt": "import os\n",
      "samples": {"dense": "x = 1", "dsa": "y = 2\nz = 3"},
    },
    "training": dict.fromkeys(config_lib.STAGES, curve)
    | {
      "dense_warmup": {"step": [1, 2], "indexer_kl": [0.2, 0.1]},
      "sparse": curve | {"indexer_kl": [0.1] * 3},
    },
    "seconds": dict.fromkeys(config_lib.STAGES, 10.0) | {"mass": 5.0},
  }


def test_report_files(tmp_path):
  summary = report.write(sizes.smoke(), str(tmp_path), made_up(2.1))
  assert json.loads((tmp_path / "report.json").read_text()) == json.loads(
    json.dumps(summary)
  )
  assert summary["held_out_loss"] == {
    "dense": 2.0,
    "dsa": 2.1,
    "random": 4.0,
    "window": 3.0,
  }
  assert summary["attention_mass"]["dsa"] == pytest.approx(0.8)
  assert summary["tokens"] == 900 and summary["top_k"] == 16
  assert summary["sequence_length"] == 128 and summary["seconds"] == 65
  text = (tmp_path / "report.md").read_text()
  assert "128 tokens, 8 times top-k" in text
  assert "After training, DSA is worse (+0.1000" in text
  assert text.count("DSA is better") == 4
  assert "    z = 3" in text
  assert "gains no time" not in text
  images = sorted(path.name for path in tmp_path.glob("*.png"))
  assert len(images) == 6 and all(f"({name})" in text for name in images)


def test_a_negative_result_is_told():
  results = made_up(5.0, seconds=(1e-4, 1e-4))
  config = sizes.smoke()
  text = report_text.text(config, report.summarize(config, results), results)
  assert text.count("DSA is worse") == 6 and "DSA is better" not in text
  assert "gains no time from DSA" in text


@pytest.mark.parametrize(
  ("config", "cautions"), [(sizes.smoke(), 1), (sizes.full(), 0)]
)
def test_too_little_training_is_told(config, cautions):
  results = made_up(2.1)
  text = report_text.text(config, report.summarize(config, results), results)
  assert text.count("hardly begun to learn") == cautions


@pytest.mark.parametrize(
  "mean, half, words",
  [
    (-0.2, 0.1, "is better"),
    (0.2, 0.1, "is worse"),
    (-0.05, 0.1, "is not measurably different"),
    (-0.2, math.nan, "cannot be told apart"),
  ],
)
def test_verdict(mean, half, words):
  assert report_text.verdict(mean, half).startswith(words)


def test_records_are_found_once(tmp_path):
  calls = []

  def find():
    calls.append(1)
    return {"x": [1.5]}

  assert record.once(str(tmp_path), "part", find) == {"x": [1.5]}
  assert record.once(str(tmp_path), "part", find) == {"x": [1.5]}
  assert len(calls) == 1
  before = record.all_seconds(str(tmp_path))["part"]
  with pytest.raises(KeyError), record.clock(str(tmp_path), "part"):
    raise KeyError
  assert record.all_seconds(str(tmp_path))["part"] > before
  assert record.all_seconds(str(tmp_path)).keys() == {"part"}


def test_stages_of_equal_length_see_the_same_data():
  config = sizes.full()
  made = {
    name: config_lib.stage_config(config, name, "folder")
    for name in config_lib.STAGES
  }
  equal = [made[name] for name in ("sparse", "random", "window", "dense")]
  assert len({stage.data.seed for stage in equal}) == 1
  assert len({stage.steps for stage in equal}) == 1
  assert len({stage.optimizer for stage in equal}) == 1
  assert made["pretrain"].data.seed != equal[0].data.seed
  assert made["sparse"].init_from == "folder/dense_warmup/checkpoints"
  for name in ("dense_warmup", "random", "window", "dense"):
    assert made[name].init_from == "folder/pretrain/checkpoints"
  assert made["dense_warmup"].stage == stages.DENSE_WARMUP


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(length=64), "below 8 [*] model.index_top_k"),
    (dict(length=8192), "exceeds model.max_length"),
    (dict(prompt_tokens=120), "exceed measure.decode_positions"),
  ],
)
def test_bad_measurements(changes, message):
  config = sizes.smoke()
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(
      config, measure=dataclasses.replace(config.measure, **changes)
    )


def test_row_numbers_for_json():
  generator = np.random.default_rng(0)
  scores = held_out.Scores(
    loss_RT=generator.random((3, 40), np.float32),
    correct_RT=np.ones((3, 40), bool),
    mask_RT=np.pad(np.ones((3, 39), np.float32), ((0, 0), (0, 1))),
  )
  found = json.loads(json.dumps(measure.describe(scores, 8)))
  assert found["tokens"] == 117 and found["accuracy"] == 1.0
  assert len(found["position_losses"]) == 16
  np.testing.assert_allclose(
    found["late_row_losses"], scores.loss_RT[:, 8:39].mean(axis=1), rtol=1e-5
  )
