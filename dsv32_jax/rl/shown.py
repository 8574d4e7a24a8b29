"""GRPO against more supervised fine-tuning, from the same start.

A model learns from solved problems until its held-out pass@1 stops rising. From
there GRPO and further fine-tuning on the same solved problems go on, for the
same wall time. Held-out problems share no content with either's.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import time
from typing import Any

import jax
import numpy as np

from dsv32_jax.data import pipeline
from dsv32_jax.data import sources
from dsv32_jax.data import tokenizer as tokenizer_lib
from dsv32_jax.rl import loop
from dsv32_jax.rl import once
from dsv32_jax.rl import policy as policy_lib
from dsv32_jax.rl import run_config
from dsv32_jax.rl import sampling
from dsv32_jax.training import metrics as metrics_lib
from dsv32_jax.training import model_checkpoint
from dsv32_jax.training import optimizer as optimizer_lib
from dsv32_jax.training import run as run_lib
from dsv32_jax.training import run_folder
from dsv32_jax.training import stages
from dsv32_jax.verifiers import reward as reward_lib
from dsv32_jax.verifiers import tasks

SOLVED_FILE = "solved.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownConfig:
  """A comparison.

  Attributes:
    rl: the GRPO run; its tasks, model and evaluation are the fine-tuning's too,
      which starts from its `init_from` (None: fresh weights).
    sft_optimizer: of the fine-tuning.
    further_optimizer: of its continuation.
    solved: problems of each task whose solutions the fine-tuning sees.
    sequence_length: tokens a row, several solved problems in each.
    batch_size: rows a step.
    evaluate_every: fine-tuning steps between two evaluations.
    patience: evaluations in a row without a new best that end the fine-tuning.
    max_steps: of the fine-tuning at most.
    further_evaluate_every: as evaluate_every, of the further fine-tuning.
  """

  rl: run_config.RlConfig
  sft_optimizer: optimizer_lib.OptimizerConfig
  further_optimizer: optimizer_lib.OptimizerConfig
  solved: int
  sequence_length: int
  batch_size: int
  evaluate_every: int
  patience: int
  max_steps: int
  further_evaluate_every: int

  def __post_init__(self):
    if self.rl.evaluation is None:
      raise ValueError("rl.evaluation must be set: pass@1 is what is compared")
    if self.rl.reward.thinking:
      raise ValueError("rl.reward.thinking: solved problems hold no thinking")
    for name in (
      *("solved", "evaluate_every", "patience", "max_steps"),
      "further_evaluate_every",
    ):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be positive")


def solved_problems(
  rl: run_config.RlConfig, solved: int
) -> list[tasks.Problem]:
  """As many different problems of each task as a fine-tuning learns from."""
  return [
    problem
    for task in rl.tasks
    for problem in itertools.islice(
      tasks.generate(task.make(), split="train", seed=rl.seed), solved
    )
  ]


def write_solved(rl: run_config.RlConfig, solved: int, path: str) -> None:
  """Writes them as prompts and responses, a JSON object a line."""
  with open(path, "w", encoding="utf-8") as file:
    for problem in solved_problems(rl, solved):
      response = problem.messages()[-1]["content"]
      row = {"prompt": problem.question, "response": response}
      file.write(json.dumps(row) + "\n")


class FineTuning:
  """Supervised fine-tuning that is evaluated as GRPO is; use as a context.

  Attributes:
    curve: step, seconds of training so far and what an evaluation found.
    step: steps taken.
    seconds: of training, compilation included, evaluation not.
  """

  def __init__(
    self, config: ShownConfig, workdir: str, name: str, *, init_from
  ):
    """Opens data, model and engine.

    Args:
      config: of the comparison.
      workdir: folder of the comparison, with solved.jsonl and tokenizer.json.
      name: of its folder there.
      init_from: folder of checkpoints to start from, or None.
    """
    folder = os.path.join(workdir, name)
    os.makedirs(folder, exist_ok=True)
    self.curve: list[dict[str, float]] = []
    self.step, self.seconds = 0, 0.0
    self._stack = contextlib.ExitStack()
    train = train_config(config, workdir, init_from=init_from)
    self._run = run_lib.Run(train, folder)
    self._stack.callback(self._run.close)
    self._run.resume()
    rewarder = reward_lib.Rewarder(config.rl.reward)
    self._stack.enter_context(rewarder)
    self._sampler = sampling.Sampler(
      config.rl, self._run.model(), self._run.tokenizer, rewarder
    )
    self._metrics = metrics_lib.MetricsWriter(folder)
    self._stack.enter_context(self._metrics)

  def evaluate(self) -> float:
    """Adds a point to the curve and returns its pass@1."""
    with jax.set_mesh(self._run.mesh):
      self._sampler.load(self._run.model(), self.step)
      found = self._sampler.pass_at_1()
    self.curve.append({"step": self.step, "seconds": self.seconds, **found})
    self._metrics.write(self.step, found, "held_out")
    return found["pass_at_1"]

  def train(self, steps: int, *, until_seconds: float = math.inf) -> None:
    """Takes steps, fewer if the clock gets there first."""
    for _ in range(steps):
      if self.seconds >= until_seconds:
        return
      begin = time.perf_counter()
      batch = self._run.place(next(self._run.batches))
      with jax.set_mesh(self._run.mesh):
        self._run.state, metrics = self._run.step(self._run.state, batch)
      loss = float(metrics["loss"])
      self.step += 1
      self.seconds += time.perf_counter() - begin
      self._metrics.write(self.step, {"loss": loss})

  def model(self):
    """A copy of the model as it is."""
    return sampling.handed_over(self._run.model())

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._stack.close()


def train_config(config: ShownConfig, workdir: str, *, init_from):
  """The fine-tuning as a stage on solved.jsonl."""
  source = sources.SourceConfig(
    kind="jsonl",
    path=os.path.join(workdir, SOLVED_FILE),
    prompt_field="prompt",
    response_field="response",
  )
  return sft_config(
    config, source, workdir, steps=config.max_steps, init_from=init_from
  )


def sft_config(
  config, source, workdir: str, *, steps: int, init_from, stage=stages.SFT
):
  """A fine-tuning of the model of a GRPO run, by its seed and on its mesh.

  Args:
    config: has `rl`, `sft_optimizer`, `sequence_length` and `batch_size`.
    source: SourceConfig of the examples.
    workdir: folder with tokenizer.json.
    steps: of the fine-tuning.
    init_from: folder of checkpoints to start from, or None.
    stage: what trains.
  """
  tokenizer = os.path.join(workdir, run_folder.TOKENIZER_FILE)
  return run_lib.TrainConfig(
    model=config.rl.model,
    stage=stage,
    optimizer=config.sft_optimizer,
    data=pipeline.DataConfig(
      sources=(source,),
      sequence_length=config.sequence_length,
      batch_size=config.batch_size,
      packing="first_fit",
      seed=config.rl.seed,
      tokenizer=tokenizer_lib.TokenizerConfig(path=tokenizer),
    ),
    steps=steps,
    mesh=config.rl.mesh,
    seed=config.rl.seed,
    init_from=init_from,
  )


def fine_tune_until_flat(config: ShownConfig, workdir: str):
  """Fine-tunes until pass@1 has not risen for `patience` evaluations.

  The best model is saved in `start_folder`.

  Returns:
    The curve, as of FineTuning.
  """
  policy_lib.make_tokenizer(config.rl).save(
    os.path.join(workdir, run_folder.TOKENIZER_FILE)
  )
  write_solved(config.rl, config.solved, os.path.join(workdir, SOLVED_FILE))
  # Of a fine-tuning that was killed before it could say that it was done.
  shutil.rmtree(start_folder(workdir), ignore_errors=True)
  best, best_model, since = -1.0, None, 0
  with FineTuning(
    config, workdir, "sft", init_from=config.rl.init_from
  ) as tuning:
    while since < config.patience and tuning.step < config.max_steps:
      tuning.train(config.evaluate_every)
      value = tuning.evaluate()
      since += 1
      if value > best:
        best, best_model, since = value, tuning.model(), 0
  model_checkpoint.save_model(best_model, start_folder(workdir))
  return tuning.curve


def fine_tune_on(config: ShownConfig, workdir: str, seconds: float):
  """Fine-tunes the start for so many more seconds of training.

  Returns:
    The curve, whose first point is the start.
  """
  start = start_folder(workdir)
  config = dataclasses.replace(config, sft_optimizer=config.further_optimizer)
  with FineTuning(config, workdir, "further_sft", init_from=start) as tuning:
    tuning.evaluate()
    while tuning.seconds < seconds:
      tuning.train(config.further_evaluate_every, until_seconds=seconds)
      tuning.evaluate()
  return tuning.curve


def reinforce(config: ShownConfig, workdir: str) -> list[dict[str, float]]:
  """Runs GRPO from the start.

  Returns:
    The curve: rollouts learned as `step`, seconds without evaluation.
  """
  folder = os.path.join(workdir, "grpo")
  tokenizer = dataclasses.replace(
    config.rl.tokenizer, path=os.path.join(workdir, run_folder.TOKENIZER_FILE)
  )
  loop.train(
    dataclasses.replace(
      config.rl, init_from=start_folder(workdir), tokenizer=tokenizer
    ),
    folder,
    root=workdir,
  )
  times = metrics_lib.read_rows(os.path.join(folder, "timings.jsonl"))
  spent = np.cumsum([r["seconds"] - r["evaluation_seconds"] for r in times])
  spent = [0.0, *spent.tolist()]
  rows = metrics_lib.read_rows(os.path.join(folder, "metrics.jsonl"))
  return [
    {**row, "step": row["version"], "seconds": spent[row["version"]]}
    for row in rows
    if row["name"] == "held_out"
  ]


def start_folder(workdir: str) -> str:
  """Where the model lies that both continue from."""
  return os.path.join(workdir, "start", "checkpoints")


def compare(config: ShownConfig, workdir: str) -> dict[str, Any]:
  """Runs the three parts of one seed, each once; what is done stays.

  Returns:
    By part its curve, and `pass_at_1`: of the start, of GRPO's last policy, and
    of the best evaluation of the further fine-tuning.

  Raises:
    ValueError: if the folder holds another comparison.
    run.Stopped: after a SIGTERM, once GRPO's state is saved.
  """
  os.makedirs(workdir, exist_ok=True)
  run_folder.claim(config, workdir, frozenset())

  def part(name, compute):
    return once.once(os.path.join(workdir, f"{name}.json"), compute)

  sft = part("sft", lambda: fine_tune_until_flat(config, workdir))
  grpo = part("grpo", lambda: reinforce(config, workdir))
  seconds = grpo[-1]["seconds"]
  further = part("further_sft", lambda: fine_tune_on(config, workdir, seconds))
  return {
    "sft": sft,
    "grpo": grpo,
    "further_sft": further,
    "pass_at_1": {
      # Chosen by these very problems, so rather too high than too low.
      "start": max(point["pass_at_1"] for point in sft),
      "grpo": grpo[-1]["pass_at_1"],
      "further_sft": max(point["pass_at_1"] for point in further[1:]),
    },
  }
