"""A folder of several runs that is moved holds the same runs as before."""

import dataclasses
import json

import pytest

from dsv32_jax.training import run_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Of a run that begins with what others of its experiment left."""

  init_from: str | None
  sources: tuple[str, ...]
  steps: int = 3


def config(folder, outside, **changes):
  return dataclasses.replace(
    Config(
      init_from=str(folder / "start" / "checkpoints"),
      sources=(str(folder / "solved.jsonl"), str(outside / "*.txt")),
    ),
    **changes,
  )


@pytest.fixture
def claimed(tmp_path):
  """Folder of an experiment with a run in it, and one outside."""
  before, outside = tmp_path / "before", tmp_path / "outside"
  (before / "part").mkdir(parents=True)
  run_folder.claim(
    config(before, outside), str(before / "part"), frozenset(), str(before)
  )
  return before, outside


def test_a_moved_experiment_goes_on(claimed, tmp_path):
  before, outside = claimed
  after = before.rename(tmp_path / "after")
  part, root = str(after / "part"), str(after)
  run_folder.claim(config(after, outside), part, frozenset(), root)
  for field, value in (
    ("init_from", str(after / "other" / "checkpoints")),
    ("init_from", None),
    # The folder that it was moved away from, and one that only looks like it.
    ("init_from", str(before / "start" / "checkpoints")),
    ("init_from", f"{after}_too/start/checkpoints"),
    ("sources", (str(after / "solved.jsonl"), str(before / "*.txt"))),
    ("steps", 4),
  ):
    other = config(after, outside, **{field: value})
    with pytest.raises(ValueError, match=rf"another config\.{field};"):
      run_folder.check(other, part, frozenset(), root)
  run_folder.check(
    config(after, outside, steps=4), part, frozenset({"steps"}), root
  )


def test_a_run_of_its_own_keeps_its_paths(tmp_path):
  folder = tmp_path / "run"
  folder.mkdir()
  one = config(tmp_path, tmp_path)
  run_folder.claim(one, str(folder), frozenset())
  written = json.loads((folder / "config.json").read_text())
  assert written["init_from"] == one.init_from
  # Moved alone it still begins with what stayed.
  moved = folder.rename(tmp_path / "moved")
  run_folder.check(one, str(moved), frozenset())


def test_a_folder_that_holds_absolute_paths_goes_on(claimed):
  before, outside = claimed
  path = before / "part" / "config.json"
  assert str(before) not in path.read_text()
  path.write_text(json.dumps(dataclasses.asdict(config(before, outside))))
  run_folder.check(
    config(before, outside), str(before / "part"), frozenset(), str(before)
  )
