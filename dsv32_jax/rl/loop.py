"""The RL loop: rollouts, learning, metrics, checkpoints, an orderly stop.

Taking turns, a run that stops and goes on equals one that never stopped, bit
for bit. Side by side (asynchronous.py), it neither loses nor repeats a prompt.
"""

from collections.abc import Callable, Iterator
import contextlib
import os
import time

import jax

from dsv32_jax.rl import asynchronous
from dsv32_jax.rl import episodes
from dsv32_jax.rl import mixed
from dsv32_jax.rl import policy as policy_lib
from dsv32_jax.rl import run_config
from dsv32_jax.rl import sampling
from dsv32_jax.training import metrics as metrics_lib
from dsv32_jax.training import run as run_lib
from dsv32_jax.training import run_folder
from dsv32_jax.training import stop_signal
from dsv32_jax.verifiers import reward as reward_lib

# What a run may be continued with: it changes no number of the result.
_MAY_CHANGE = frozenset(
  {"rollouts", "mesh", "checkpoint", "scoring_workers", "scoring_seconds"}
)


def train(
  config: run_config.RlConfig,
  workdir: str,
  *,
  scorer: Callable = reward_lib.score,
  title: str = "rl",
  root: str | None = None,
) -> policy_lib.Policy:
  """Runs GRPO to its end, from the newest checkpoint if there is one.

  The folder gets `checkpoints/`, `config.json`, `tokenizer.json`,
  `metrics.jsonl` (a row a rollout named "train"; "held_out" before it, where
  that policy was evaluated) and `timings.jsonl`.

  Args:
    config: of the run.
    workdir: folder of this run alone.
    scorer: as of reward.Rewarder.
    title: of the progress bar.
    root: folder of the experiment that the run is a part of, if any; see
      `training.run_folder.check`.

  Returns:
    The policy; its checkpoint folder is closed.

  Raises:
    ValueError: for a config that does not fit its folder, or after too many
      steps in a row whose gradients were not finite.
    run_lib.Stopped: after a SIGTERM, once the state is saved.
  """
  os.makedirs(workdir, exist_ok=True)
  run_folder.check(config, workdir, _MAY_CHANGE, root)
  policy = policy_lib.Policy(config, workdir)
  with contextlib.ExitStack() as stack:
    stack.callback(policy.close)
    rewarder = stack.enter_context(
      reward_lib.Rewarder(
        config.reward,
        num_workers=config.scoring_workers,
        timeout_seconds=config.scoring_seconds,
        function=scorer,
      )
    )
    stack.enter_context(jax.set_mesh(policy.mesh))
    start = policy.resume()
    run_folder.claim(config, workdir, _MAY_CHANGE, root)
    sampler = make_sampler(
      config, policy.model(), policy.tokenizer, rewarder, policy.mesh
    )
    writer = stack.enter_context(
      metrics_lib.MetricsWriter(workdir, resume_step=start or None)
    )
    bar = metrics_lib.progress(config.rollouts, initial=start, title=title)
    stack.enter_context(bar)
    stop = stack.enter_context(stop_signal.StopSignal())
    source = asynchronous.rollouts if config.asynchronous else _in_turns
    with contextlib.closing(source(policy, sampler)) as rollouts:
      _learn(policy, rollouts, writer, bar, stop)
    if config.evaluation is not None:
      sampler.load(policy.model(), policy.version)
      # One step on, so that a run that is continued writes it anew.
      _write_held_out(
        writer, policy.version + 1, policy.version, sampler.pass_at_1()
      )
  return policy


def make_sampler(config, model, tokenizer, rewarder, mesh) -> sampling.Drawing:
  """The sampler of what a run asks and plays; arguments as of mixed.Sampler."""
  if config.tasks and config.episodes is not None:
    return mixed.Sampler(config, model, tokenizer, rewarder, mesh)
  if config.episodes is not None:
    return episodes.Sampler(config, model, tokenizer, mesh)
  return sampling.Sampler(config, model, tokenizer, rewarder)


def _in_turns(policy, sampler) -> Iterator[sampling.Rollout]:
  """Draws each rollout when the one before is learned."""
  config = policy.config
  for number in range(policy.version, config.rollouts):
    if number % config.weights_every == 0:
      sampler.load(policy.model(), number)
    yield sampler.rollout(number)


def _learn(policy, rollouts, writer, bar, stop) -> None:
  config, saved = policy.config, policy.version
  clock = time.perf_counter()
  for rollout in rollouts:
    waited = time.perf_counter() - clock
    begin = time.perf_counter()
    found = policy.learn(rollout)
    learning = time.perf_counter() - begin
    step = policy.version
    if rollout.held_out is not None:
      _write_held_out(writer, step, rollout.version, rollout.held_out)
    writer.write(step, found)
    writer.write_timings(
      step,
      {
        "seconds": time.perf_counter() - clock,
        "waiting_seconds": waited,
        "learning_seconds": learning,
        # Which pages are free to be shared depends on all that came before,
        # in this process.
        "shared_prompt_tokens": rollout.shared,
        **{f"{name}_seconds": s for name, s in rollout.seconds.items()},
      },
    )
    clock = time.perf_counter()
    bar.set_postfix(reward=f"{found['reward']:.3f}", refresh=False)
    bar.update(1)
    whole = step % config.weights_every == 0
    due = step % config.checkpoint.every_steps == 0
    stopping = stop.agreed() and whole
    if due or stopping or step == config.rollouts:
      policy.save()
      saved = step
    if stopping and step < config.rollouts:
      raise run_lib.Stopped(f"stopped at rollout {saved} of {config.rollouts}")


def _write_held_out(writer, step, version, found) -> None:
  writer.write(step, {"version": version, **found}, "held_out")
