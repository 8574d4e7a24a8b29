"""The training loop: steps, metrics, checkpoints, an orderly stop."""

import json
import os
import time

import jax
import numpy as np

from dsv32_jax import config_files
from dsv32_jax.training import metrics as metrics_lib
from dsv32_jax.training import processes
from dsv32_jax.training import run as run_lib
from dsv32_jax.training import stop_signal


def train(
  config: run_lib.TrainConfig, workdir: str, *, title: str = "train"
) -> run_lib.Run:
  """Runs a stage to its end, from the newest checkpoint if there is one.

  The folder gets `checkpoints/`, `config.json`, `tokenizer.json`,
  `metrics.jsonl` (the same bytes for the same command) and `timings.jsonl`.

  Args:
    config: of the stage.
    workdir: folder of this stage alone.
    title: of the progress bar.

  Returns:
    The finished run; its data and checkpoint folder are closed.

  Raises:
    ValueError: for a config that does not fit its folder, or after too many
      steps in a row whose gradients were not finite.
    run_lib.Stopped: after a SIGTERM, once the state is saved.
  """
  os.makedirs(workdir, exist_ok=True)
  run = run_lib.Run(config, workdir)
  try:
    start = run.resume()
    _write_config(config, workdir)
    speaks = jax.process_index() == 0
    writer = metrics_lib.SilentWriter()
    if speaks:
      writer = metrics_lib.MetricsWriter(workdir, resume_step=start or None)
    bar = metrics_lib.progress(
      config.steps, initial=start, title=title, shown=speaks
    )
    with writer, bar, stop_signal.StopSignal() as stop:
      _loop(run, start, writer, bar, stop)
  finally:
    run.close()
  return run


def _loop(run, start, writer, bar, stop) -> None:
  config = run.config
  saved = start
  clock = time.perf_counter()
  for step in range(start + 1, config.steps + 1):
    batch = run.place(next(run.batches))
    waited = time.perf_counter() - clock
    with jax.set_mesh(run.mesh):
      run.state, metrics = run.step(run.state, batch)
    if step % config.log_every == 0 or step == config.steps:
      metrics = jax.device_get(metrics)
      writer.write(step, metrics)
      _check(run, step, metrics)
      elapsed = time.perf_counter() - clock
      writer.write_timings(
        step,
        {
          "seconds": elapsed,
          "data_seconds": waited,
          "tokens_per_second": float(metrics["tokens"]) / elapsed,
        },
      )
      bar.set_postfix(loss=f"{float(metrics['loss']):.3f}", refresh=False)
    clock = time.perf_counter()
    bar.update(1)
    stopping = stop.agreed()
    due = step % config.checkpoint.every_steps == 0 or step == config.steps
    if due or stopping:
      run.save(step)
      saved = step
    if stopping and step < config.steps:
      run.checkpointer.wait()
      raise run_lib.Stopped(f"stopped at step {saved} of {config.steps}")


def _check(run, step: int, metrics) -> None:
  """Stops a run whose gradients stay infinite or NaN."""
  limit = run.config.optimizer.max_consecutive_skips
  skipped = int(run.state.optimizer.consecutive_skips)
  if skipped >= limit:
    raise ValueError(
      f"step {step}: the gradients of {skipped} steps in a row were not finite"
      f" (loss={np.asarray(metrics['loss'])})"
    )


def _write_config(config, workdir: str) -> None:
  """Writes config.json, or checks that the run there was the same.

  Process 0 does, and all of them learn what it found.

  Raises:
    ValueError: naming a field that another run of this folder set otherwise.
  """
  path = os.path.join(workdir, "config.json")
  now, problem = config_files.dump(config), None
  if jax.process_index() == 0:
    problem = _changed_field(path, now)
    if problem is None:
      with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(now, file, indent=2, sort_keys=True)
        file.write("\n")
      os.replace(f"{path}.new", path)
  problem = processes.gather(problem)[0]
  if problem is not None:
    raise ValueError(
      f"{workdir} holds a run with another config.{problem}; give a new"
      " --workdir or the config of that run"
    )


def _changed_field(path: str, now: dict) -> str | None:
  """Names a field that differs from the file's and may not; else None."""
  if not os.path.exists(path):
    return None
  with open(path, encoding="utf-8") as file:
    before = json.load(file)
  changed = (name for name in now if before.get(name) != now[name])
  return next((name for name in changed if name not in _MAY_CHANGE), None)


# What a run may be continued with: it changes no number of the result.
_MAY_CHANGE = frozenset({"steps", "mesh", "log_every", "checkpoint"})
