"""experiments.convert: there and back, and mistakes told in one line."""

from absl import flags
from absl.testing import flagsaver
from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.training import checkpoint
from dsv32_jax.training import model_checkpoint
from dsv32_jax.weights import folder
from experiments import convert
from tests.support import models
from tests.support import oracle_checkpoint

CONFIG = oracle_checkpoint.tiny_config(
  num_hidden_layers=2, hidden_size=136, q_lora_rank=20
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  path = tmp_path_factory.mktemp("source")
  tensors = oracle_checkpoint.random_checkpoint(CONFIG, 0)
  oracle_checkpoint.save_checkpoint(path, CONFIG, tensors)
  return path


def run(source, target, to, **others):
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(["test"])
  with flagsaver.flagsaver(
    source=str(source), target=str(target), to=to, **others
  ):
    convert.main([])


def dequantised(path):
  return oracle_checkpoint.load_checkpoint(path)[1]


def assert_equal(path, other):
  ours, theirs = dequantised(path), dequantised(other)
  assert ours.keys() == theirs.keys()
  for name, array in ours.items():
    np.testing.assert_array_equal(array, theirs[name], name)


def test_bfloat16_through_orbax(tmp_path, source):
  run(source, tmp_path / "orbax", "orbax")
  run(tmp_path / "orbax", tmp_path / "hf", "hf", max_shard_bytes=100_000)
  assert (tmp_path / "hf" / folder.INDEX).exists()
  assert_equal(tmp_path / "hf", source)


def test_fp8_through_orbax(tmp_path, source):
  run(source, tmp_path / "first", "hf_fp8")
  run(tmp_path / "first", tmp_path / "orbax", "orbax")
  run(tmp_path / "orbax", tmp_path / "second", "hf_fp8")
  assert_equal(tmp_path / "first", tmp_path / "second")
  original, quantised = dequantised(source), dequantised(tmp_path / "first")
  assert original.keys() == quantised.keys()
  for name, array in original.items():
    error = np.abs(quantised[name] - array)
    if "proj.weight" in name and "weights_proj" not in name:
      # e4m3 rounds to 1/16 of a value, or to 2^-9 of the block's scale.
      assert error.max() <= np.abs(array).max() / 16, name


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"to": None}, "--to is missing"),
    ({"source": None}, "--source is missing"),
    ({"source": "/nowhere"}, "--source=/nowhere has no config.json"),
    ({"source": "/nowhere", "to": "hf"}, "/nowhere"),
    ({"step": "1"}, "--step=1: --source=.* is a Hugging Face one"),
  ],
)
def test_mistakes(tmp_path, source, changes, message):
  given = {"source": str(source), "target": str(tmp_path / "t"), "to": "orbax"}
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(["test"])
  with (
    flagsaver.flagsaver(**(given | changes)),
    pytest.raises((ValueError, FileNotFoundError), match=message),
  ):
    convert.main([])
  assert not (tmp_path / "t").exists()


def test_any_step_of_a_run(tmp_path):
  models_of = {step: models.tiny_model(seed=step) for step in (1, 2, 3)}
  with checkpoint.Checkpointer(tmp_path / "run") as checkpointer:
    for step, model in models_of.items():
      checkpointer.save(
        step,
        {"model": nnx.state(model), "counters": {"step": jnp.int32(step)}},
        model_checkpoint.model_notes(model),
        "a data position",
        loss={1: 3.0, 2: 1.0, 3: 2.0}[step],
      )
  for given, step in ((None, 3), ("1", 1), ("best", 2)):
    folder = tmp_path / f"hf_{given}"
    run(tmp_path / "run", folder, "hf", step=given, save_dtype="float32")
    tensors = dequantised(folder)
    want = np.asarray(models_of[step].embed.table[...])
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], want)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ("7", r"no checkpoint of step=7 in .*, which has \[1\]"),
    ("last", "--step=last must be a number or `best`"),
    ("-1", "--step=-1 must be"),
    ("best", "has a loss"),
  ],
)
def test_a_step_that_is_not_there(tmp_path, given, message):
  with checkpoint.Checkpointer(tmp_path / "run") as checkpointer:
    checkpointer.save(1, {"model": {"a": jnp.ones(3)}})
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    run(tmp_path / "run", tmp_path / "hf", "hf", step=given)
  assert not (tmp_path / "hf").exists()


def test_target_is_kept(tmp_path, source):
  (tmp_path / "kept").write_text("kept")
  with pytest.raises(ValueError, match="exists and is not empty"):
    run(source, tmp_path, "hf")
  assert [p.name for p in tmp_path.iterdir()] == ["kept"]
