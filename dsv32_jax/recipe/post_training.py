"""The paper's post-training in small (section 3): from solved problems to one
model that has learned from specialists.

A start is fine-tuned on few solved problems of every domain. From it GRPO makes
a specialist of each domain; their verified answers are distilled into one data
set, the start is fine-tuned on it, and one mixed GRPO stage over all domains
ends it. Every model is evaluated in every domain on the same held-out problems.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import time

import jax

from dsv32_jax import sharding
from dsv32_jax.data import sources
from dsv32_jax.data import tokenizer as tokenizer_lib
from dsv32_jax.distillation import config as distill_config
from dsv32_jax.distillation import distill
from dsv32_jax.rl import loop as rl_loop
from dsv32_jax.rl import once
from dsv32_jax.rl import policy as policy_lib
from dsv32_jax.rl import run_config
from dsv32_jax.rl import sampling
from dsv32_jax.rl import shown
from dsv32_jax.training import loop
from dsv32_jax.training import model_checkpoint
from dsv32_jax.training import optimizer as optimizer_lib
from dsv32_jax.training import run as run_lib
from dsv32_jax.verifiers import reward as reward_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class PostTrainingConfig:
  """The whole of it; tokenizer and starts of `rl` are its own to set.

  Attributes:
    rl: GRPO of a specialist; its tasks are the domains, each one's name that of
      its kind.
    mixed_rollouts: of the mixed stage.
    sft_optimizer: of both fine-tunings.
    solved: problems of each task in the start's fine-tuning.
    start_steps: of it.
    distilled_steps: of the fine-tuning on specialists' answers.
    sequence_length: tokens a row of both.
    batch_size: rows a step of both.
    asked: problems that each specialist is asked.
    answers: to each.
  """

  rl: run_config.RlConfig
  mixed_rollouts: int
  sft_optimizer: optimizer_lib.OptimizerConfig
  solved: int
  start_steps: int
  distilled_steps: int
  sequence_length: int
  batch_size: int
  asked: int
  answers: int

  def __post_init__(self):
    if self.rl.evaluation is None:
      raise ValueError("rl.evaluation must be set: pass@1 is what is reported")
    kinds = [task.kind for task in self.rl.tasks]
    if len(set(kinds)) < len(kinds):
      raise ValueError(f"rl.tasks={kinds} must differ: each is a domain")
    if self.rl.reward.thinking:
      raise ValueError("rl.reward.thinking: solved problems hold no thinking")

  @property
  def domains(self) -> tuple[str, ...]:
    return tuple(task.kind for task in self.rl.tasks)


def run(config: PostTrainingConfig, workdir: str, tell=print) -> dict:
  """Runs every part that is not done, each in a folder of its name.

  Args:
    config: of all of it.
    workdir: folder of it alone.
    tell: is told what begins.

  Returns:
    `pass_at_1` by model and domain, `distilled` counts by specialist, and
    `seconds` by part.

  Raises:
    ValueError: if the folder holds another config, or a specialist solved
      nothing that could be distilled.
    run_lib.Stopped: after a SIGTERM, once the state is saved.
  """
  os.makedirs(workdir, exist_ok=True)
  loop.claim_folder(config, workdir, frozenset())
  found, seconds, distilled = {}, {}, {}

  def part(name, compute):
    tell(f"{name}:")

    def timed():
      begin = time.perf_counter()
      result = compute()
      return {"result": result, "seconds": time.perf_counter() - begin}

    done = once.once(os.path.join(workdir, f"{name}.json"), timed)
    seconds[name] = done["seconds"]
    return done["result"]

  found["start"] = part("start", lambda: _start(config, workdir))
  for task in config.rl.tasks:
    found[task.kind] = part(
      task.kind,
      lambda task=task: _reinforce(
        config, workdir, task.kind, "start", (task,), config.rl.rollouts
      ),
    )
  distilled = part("distillation", lambda: _distill(config, workdir))
  found["distilled"] = part(
    "distilled", lambda: _fine_tune_on_answers(config, workdir)
  )
  found["mixed"] = part(
    "mixed",
    lambda: _reinforce(
      config,
      workdir,
      "mixed",
      "distilled",
      config.rl.tasks,
      config.mixed_rollouts,
    ),
  )
  report = {"pass_at_1": found, "distilled": distilled, "seconds": seconds}
  path = pathlib.Path(workdir, "report.json")
  path.write_text(json.dumps(report, indent=2) + "\n")
  return report


def _folder(workdir, name):
  return os.path.join(workdir, name, "checkpoints")


def _tokenizer_path(workdir):
  return os.path.join(workdir, run_lib.TOKENIZER_FILE)


def _start(config, workdir):
  policy_lib.make_tokenizer(config.rl).save(_tokenizer_path(workdir))
  solved = os.path.join(workdir, "solved.jsonl")
  shown.write_solved(config.rl, config.solved, solved)
  source = sources.SourceConfig(
    kind="jsonl",
    path=solved,
    prompt_field="prompt",
    response_field="response",
  )
  _fine_tune(config, workdir, "start", source, config.start_steps, None)
  return evaluate(config, workdir, "start")


def _fine_tune_on_answers(config, workdir):
  source = sources.SourceConfig(
    kind="jsonl",
    path=os.path.join(workdir, "distillation", distill.SFT_FILE),
    pieces_field="pieces",
  )
  _fine_tune(
    config,
    workdir,
    "distilled",
    source,
    config.distilled_steps,
    _folder(workdir, "start"),
  )
  return evaluate(config, workdir, "distilled")


def _fine_tune(config, workdir, name, source, steps, init_from):
  train = shown.sft_config(
    config, source, workdir, steps=steps, init_from=init_from
  )
  loop.train(train, os.path.join(workdir, name), title=name, root=workdir)


def _reinforce(config, workdir, name, start, tasks, rollouts):
  """GRPO on tasks from another part's model; evaluated in all domains."""
  tokenizer = dataclasses.replace(
    config.rl.tokenizer, path=_tokenizer_path(workdir)
  )
  rl = dataclasses.replace(
    config.rl,
    tasks=tasks,
    rollouts=rollouts,
    init_from=_folder(workdir, start),
    tokenizer=tokenizer,
    # All domains are evaluated at its end.
    evaluation=None,
  )
  rl_loop.train(rl, os.path.join(workdir, name), title=name, root=workdir)
  return evaluate(config, workdir, name)


def _distill(config, workdir):
  rl = config.rl
  settings = distill_config.DistillConfig(
    specialists=tuple(
      distill_config.SpecialistConfig(
        name=task.kind,
        checkpoint=_folder(workdir, task.kind),
        tasks=(task,),
        problems=config.asked,
      )
      for task in rl.tasks
    ),
    tokenizer=_tokenizer_path(workdir),
    engine=rl.sampler.engine,
    max_tokens=rl.sampler.max_tokens,
    answers=config.answers,
    temperature=rl.learner.temperature,
    scoring_workers=rl.scoring_workers,
    scoring_seconds=rl.scoring_seconds,
    # Other problems than those that the start has seen solved.
    seed=rl.seed + 1,
  )
  folder = pathlib.Path(workdir, "distillation")
  folder.mkdir(exist_ok=True)
  return distill.distill(settings, folder, model_checkpoint.load_model)


def evaluate(
  config: PostTrainingConfig, workdir: str, name: str
) -> dict[str, float]:
  """Held-out pass@1 of a part's model by domain, and of all as "all"."""
  rl = config.rl
  mesh = sharding.make_mesh(rl.mesh)
  model = model_checkpoint.load_model(_folder(workdir, name), mesh=mesh)
  tokenizer = tokenizer_lib.load(_tokenizer_path(workdir))
  with contextlib.ExitStack() as stack:
    rewarder = stack.enter_context(
      reward_lib.Rewarder(
        rl.reward,
        num_workers=rl.scoring_workers,
        timeout_seconds=rl.scoring_seconds,
      )
    )
    stack.enter_context(jax.set_mesh(mesh))
    sampler = sampling.Sampler(rl, model, tokenizer, rewarder)
    sampler.load(model, 0)
    found = sampler.pass_at_1()
  return {
    "all": found["pass_at_1"],
    **{kind: found[f"pass_at_1_{kind}"] for kind in config.domains},
  }
