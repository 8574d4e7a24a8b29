"""The paper's post-training in small (section 3): from solved problems to one
model that has learned from specialists.

A start is fine-tuned on few solved problems of every domain, with thinking and
without. From it GRPO makes a specialist of each domain and mode; what they get
verified is distilled into one data set, the start is fine-tuned on it, and one
mixed GRPO stage over reasoning, agent and alignment data ends it. In its place,
or beside it from the same model, these groups may be stages one after the
other, which shows what mixing is for: what a stage forgets of the others.
Every model is evaluated in every domain and mode on the same held-out problems.
"""

import contextlib
import dataclasses
import functools
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
from dsv32_jax.distillation import episodes as distill_episodes
from dsv32_jax.distillation import sampling as distill_sampling
from dsv32_jax.recipe import post_training_config as config_lib
from dsv32_jax.recipe import side_by_side
from dsv32_jax.recipe import solved
from dsv32_jax.rl import loop as rl_loop
from dsv32_jax.rl import once
from dsv32_jax.rl import policy as policy_lib
from dsv32_jax.rl import shown
from dsv32_jax.training import loop
from dsv32_jax.training import metrics
from dsv32_jax.training import model_checkpoint
from dsv32_jax.training import run_folder
from dsv32_jax.verifiers import reward as reward_lib

PostTrainingConfig = config_lib.PostTrainingConfig

# What a run may be continued with: it changes no number of the result.
_MAY_CHANGE = frozenset({"specialist_processes"})


def run(config: PostTrainingConfig, workdir: str, tell=print) -> dict:
  """Runs every part that is not done, each in a folder of its name.

  Args:
    config: of all of it.
    workdir: folder of it alone.
    tell: is told what begins.

  Returns:
    `pass_at_1` by model and domain in its mode, `distilled` counts by
    specialist, `orders` with the models of each order of RL, the distilled one
    first, and `seconds` by part.

  Raises:
    ValueError: if the folder holds another config, a domain has not as many
      problems as its specialists are asked, or no specialist solved anything.
    training.run.Stopped: after a SIGTERM, once the state is saved.
  """
  os.makedirs(workdir, exist_ok=True)
  run_folder.claim(config, workdir, _MAY_CHANGE)
  found, seconds = {}, {}

  def part(name, compute):
    tell(f"{name}:")
    done = _timed_once(workdir, name, compute)
    seconds[name] = done["seconds"]
    return done["result"]

  def reinforced(name, start, rl):
    found[name] = part(
      name, lambda: _reinforce(config, workdir, name, start, rl)
    )

  found["start"] = part("start", lambda: _start(config, workdir))
  # One process holds an accelerator.
  if config.specialist_processes > 1 and jax.default_backend() == "cpu":
    _train_specialists(config, workdir)
  for one in config.specialists:
    reinforced(one.name, "start", config.specialist_rl(one))
  distilled = part("distillation", lambda: _distill(config, workdir))
  found["distilled"] = part("distilled", lambda: _distilled(config, workdir))
  orders = _orders(config)
  for stages in orders.values():
    start = "distilled"
    for name, parts, rollouts in stages:
      reinforced(name, start, config.stage_rl(parts, rollouts))
      start = name
  report = {
    "pass_at_1": found,
    "distilled": distilled,
    "orders": {
      order: ["distilled", *(name for name, *_ in stages)]
      for order, stages in orders.items()
    },
    "seconds": seconds,
  }
  path = pathlib.Path(workdir, "report.json")
  path.write_text(json.dumps(report, indent=2) + "\n")
  return report


def _timed_once(workdir, name, compute):
  """The result of a part and its seconds, from its file once it is done."""

  def timed():
    begin = time.perf_counter()
    result = compute()
    return {"result": result, "seconds": time.perf_counter() - begin}

  return once.once(_result_path(workdir, name), timed)


def _train_specialists(config, workdir) -> None:
  """Trains side by side those that are not done."""
  names = [one.name for one in config.specialists]
  missing = [
    name for name in names if not os.path.exists(_result_path(workdir, name))
  ]
  with metrics.progress(
    len(names), initial=len(names) - len(missing), title="specialists"
  ) as bar:
    side_by_side.run(
      functools.partial(_train_specialist, config, workdir),
      missing,
      processes=config.specialist_processes,
      log=os.path.join(workdir, "specialists"),
      done=lambda name: bar.update(1),
    )


def _train_specialist(config, workdir, name) -> None:
  (rl,) = [
    config.specialist_rl(one) for one in config.specialists if one.name == name
  ]
  _timed_once(
    workdir, name, lambda: _reinforce(config, workdir, name, "start", rl)
  )


def forgotten(report: dict, order: str) -> dict[str, float]:
  """What an order of RL forgot of each domain in its mode.

  Args:
    report: of `run`.
    order: one of its `orders`.

  Returns:
    By domain and mode how far pass@1 in the end is below its best, after
    distillation or any stage of that order.
  """
  models = [report["pass_at_1"][name] for name in report["orders"][order]]
  return {
    name: max(model[name] for model in models) - models[-1][name]
    for name in models[0]
    if name != "all"
  }


def _orders(config) -> dict[str, list[tuple]]:
  """Stages of each order: name, domains in their modes, rollouts."""
  found = {}
  if config.rl_order in ("mixed", "both"):
    found["mixed"] = [("mixed", config.specialists, config.mixed_rollouts)]
  if config.rl_order in ("sequential", "both"):
    each, more = divmod(config.mixed_rollouts, len(config.groups))
    found["sequential"] = [
      (
        f"sequential_{place + 1}_{group}",
        config.of_group(group),
        each + (place < more),
      )
      for place, group in enumerate(config.groups)
    ]
  return found


def _result_path(workdir, name):
  return os.path.join(workdir, f"{name}.json")


def _folder(workdir, name):
  return os.path.join(workdir, name, "checkpoints")


def _tokenizer_path(workdir):
  return os.path.join(workdir, run_folder.TOKENIZER_FILE)


def _start(config, workdir):
  check_enough(config, workdir)
  everything = config.stage_rl(config.specialists, 1)
  policy_lib.make_tokenizer(everything).save(_tokenizer_path(workdir))
  path = pathlib.Path(workdir, shown.SOLVED_FILE)
  solved.write(config, path)
  _fine_tune(config, workdir, "start", path, config.start_steps, None)
  return evaluate(config, workdir, "start")


def _distilled(config, workdir):
  path = pathlib.Path(workdir, "distillation", distill.SFT_FILE)
  start, steps = _folder(workdir, "start"), config.distilled_steps
  _fine_tune(config, workdir, "distilled", path, steps, start)
  return evaluate(config, workdir, "distilled")


def _fine_tune(config, workdir, name, path, steps, init_from):
  source = sources.SourceConfig(
    kind="jsonl", path=str(path), pieces_field="pieces"
  )
  train = shown.sft_config(
    config,
    source,
    workdir,
    steps=steps,
    init_from=init_from,
    stage=config.sft_stage,
  )
  loop.train(train, os.path.join(workdir, name), title=name, root=workdir)


def _reinforce(config, workdir, name, start, rl):
  """GRPO from another part's model; evaluated in all domains."""
  rl = dataclasses.replace(
    rl,
    init_from=_folder(workdir, start),
    tokenizer=dataclasses.replace(rl.tokenizer, path=_tokenizer_path(workdir)),
    # All domains are evaluated at its end.
    evaluation=None,
  )
  rl_loop.train(rl, os.path.join(workdir, name), title=name, root=workdir)
  return evaluate(config, workdir, name)


def check_enough(config: PostTrainingConfig, workdir: str) -> None:
  """Draws what specialists will be asked, before anything is trained.

  Raises:
    ValueError: naming a domain that has not as many problems.
  """
  settings = _distillation(config, workdir)
  for one in settings.specialists:
    if one.episodes is None:
      distill_sampling.problems_of(one, settings.seed)
    else:
      distill_episodes.tasks_of(one, settings.seed)


def _distillation(config, workdir) -> distill_config.DistillConfig:
  rl = config.rl
  return distill_config.DistillConfig(
    specialists=tuple(
      distill_config.SpecialistConfig(
        name=one.name,
        checkpoint=_folder(workdir, one.name),
        tasks=one.tasks,
        episodes=config.specialist_rl(one).episodes,
        thinking=one.thinking,
        problems=config.asked,
      )
      for one in config.specialists
    ),
    tokenizer=_tokenizer_path(workdir),
    engine=rl.sampler.engine,
    max_tokens=rl.sampler.max_tokens,
    answers=config.answers,
    everything=True,
    temperature=rl.learner.temperature,
    scoring_workers=rl.scoring_workers,
    scoring_seconds=rl.scoring_seconds,
    # Drawn apart from what the start has seen solved; where a domain has few
    # problems, some are the same.
    seed=rl.seed + 1,
  )


def _distill(config, workdir):
  folder = pathlib.Path(workdir, "distillation")
  folder.mkdir(exist_ok=True)
  load = functools.partial(
    model_checkpoint.load_model, mesh=sharding.make_mesh(config.rl.mesh)
  )
  return distill.distill(_distillation(config, workdir), folder, load)


def evaluate(
  config: PostTrainingConfig, workdir: str, name: str
) -> dict[str, float]:
  """Held-out pass@1 of a part's model by domain and mode, and of all as "all".

  A domain's mean is over as many problems in each of its modes.
  """
  rl = config.stage_rl(config.specialists, 1)
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
    sampler = rl_loop.make_sampler(rl, model, tokenizer, rewarder, mesh)
    sampler.load(model, 0)
    found = sampler.pass_at_1()
  return {
    "all": found["pass_at_1"],
    **{one.name: found[f"pass_at_1_{one.name}"] for one in config.specialists},
  }
