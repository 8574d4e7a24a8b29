"""Trains the stages one after another; what is done is not done again."""

import json
import os

from dsv32_jax import config_files
from dsv32_jax.data import pipeline
from dsv32_jax.data import tokenizer as tokenizer_lib
from dsv32_jax.recipe import config as config_lib
from dsv32_jax.recipe import record
from dsv32_jax.training import loop

CONFIG_FILE = "recipe.json"


def run_stages(config: config_lib.RecipeConfig, workdir: str) -> None:
  """Trains the tokenizer and every stage, each in a folder of its name.

  Called again, it goes on where it stood.

  Raises:
    ValueError: if the folder holds another recipe.
    run.Stopped: after a SIGTERM, once the state is saved.
  """
  make_tokenizer(config, workdir)
  for name in config_lib.STAGES:
    run_stage(config, workdir, name)


def run_stage(config: config_lib.RecipeConfig, workdir: str, name: str) -> None:
  """Trains one of config.STAGES; the tokenizer and the one before are done.

  Raises:
    ValueError: if the folder holds another recipe.
    run.Stopped: after a SIGTERM, once the state is saved.
  """
  claim_folder(config, workdir)
  if record.exists(workdir, name):
    return
  stage = config_lib.stage_config(config, name, workdir)
  number = 1 + list(config_lib.STAGES).index(name)
  title = f"{number}/{len(config_lib.STAGES)} {config_lib.STAGES[name][1]}"
  with record.clock(workdir, name):
    loop.train(stage, os.path.join(workdir, name), title=title, root=workdir)
  tokens = stage.steps * config.batch_size * config.sequence_length
  record.write(workdir, name, {"steps": stage.steps, "tokens": tokens})


def claim_folder(config: config_lib.RecipeConfig, workdir: str) -> None:
  """Writes the recipe into its folder, or checks that it is the same.

  Raises:
    ValueError: naming the part of the config that is another.
  """
  path = os.path.join(workdir, CONFIG_FILE)
  now = config_files.dump(config)
  os.makedirs(workdir, exist_ok=True)
  if not os.path.exists(path):
    with open(path, "w", encoding="utf-8") as file:
      json.dump(now, file, indent=2, sort_keys=True)
      file.write("\n")
    return
  with open(path, encoding="utf-8") as file:
    before = json.load(file)
  for name in now:
    if before.get(name) != now[name]:
      raise ValueError(
        f"{workdir} holds a recipe with another config.{name}; give a new"
        " --workdir or the config of that run"
      )


def make_tokenizer(
  config: config_lib.RecipeConfig, workdir: str
) -> tokenizer_lib.Tokenizer:
  """Trains the tokenizer on the training files, unless it is there.

  Raises:
    ValueError: if the folder holds another recipe.
  """
  claim_folder(config, workdir)
  path = os.path.join(workdir, config_lib.TOKENIZER_FILE)
  if not os.path.exists(path):
    with record.clock(workdir, "tokenizer"):
      pipeline.make_tokenizer(config_lib.data_config(config)).save(path)
  return tokenizer_lib.load(path)
