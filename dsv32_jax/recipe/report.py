"""The report of a run: report.json, report.md and plots, from its numbers."""

from collections.abc import Mapping
import itertools
import json
import math
import os

import numpy as np

from dsv32_jax.evals import held_out
from dsv32_jax.evals import plots
from dsv32_jax.recipe import config as config_lib
from dsv32_jax.recipe import report_text

WHEN = {
  "before": "selection put on the dense model",
  "after": "after training with it",
}


def write(
  config: config_lib.RecipeConfig, workdir: str, results: Mapping
) -> dict:
  """Writes report.json, report.md and the plots into the folder.

  Args:
    config: of the recipe.
    workdir: of the run.
    results: of measure.run.

  Returns:
    What report.json holds.
  """
  summary = summarize(config, results)
  _write(workdir, "report.json", json.dumps(summary, indent=2) + "\n")
  draw(summary, results, workdir)
  _write(workdir, "report.md", report_text.text(config, summary, results))
  return summary


def summarize(config: config_lib.RecipeConfig, results: Mapping) -> dict:
  """Turns results into the flat numbers of report.json.

  `held_out_loss` is after training with each selection; a pair in `intervals`
  and `differences` is (mean, half of its 95% interval) over held-out files.
  """
  scores = results["held_out"]
  first = scores["after"]["dense"]
  losses = {
    when: {name: found["loss"] for name, found in scores[when].items()}
    for when in WHEN
  }
  mass = {
    when: {
      name: float(np.mean(results["mass"][when][name]))
      for name in report_text.MASS_NAMES
    }
    for when in WHEN
  }
  trained = config.batch_size * config.sequence_length
  return {
    "held_out_loss": losses["after"],
    "held_out_loss_before": losses["before"],
    "held_out_accuracy": {
      name: found["accuracy"] for name, found in scores["after"].items()
    },
    "intervals": {
      when: {
        name: held_out.mean_and_interval(found["row_losses"])
        for name, found in scores[when].items()
      }
      for when in WHEN
    },
    "differences": {
      when: {
        f"dsa - {name}": difference(scores[when], "dsa", name)
        for name in ("dense", "random", "window")
      }
      for when in WHEN
    },
    "attention_mass": mass["before"],
    "attention_mass_after": mass["after"],
    "attention_mass_by_layer": {
      name: np.mean(results["mass"]["before"][name], axis=1).tolist()
      for name in report_text.MASS_NAMES
    },
    "seconds_per_token": {
      "positions": results["generation"]["positions"],
      **results["generation"]["seconds"],
    },
    "tokens": first["tokens"],
    "files": first["rows"],
    "top_k": config.model.index_top_k,
    "sequence_length": config.measure.length,
    "training_tokens": {
      "pretrain": config.pretrain_steps * trained,
      "dense_warmup": config.warmup_steps * trained,
      "sparse": config.sparse_steps * trained,
    },
    "seconds": sum(results["seconds"].values()),
    "seconds_by_part": results["seconds"],
  }


def difference(scores: Mapping, one: str, other: str) -> tuple[float, float]:
  """Mean paired difference over files, and half of its 95% interval."""
  return held_out.mean_and_interval(
    np.subtract(scores[one]["row_losses"], scores[other]["row_losses"])
  )


def draw(summary: Mapping, results: Mapping, workdir: str) -> None:
  """Draws the plots that the text shows."""

  def path(name):
    return os.path.join(workdir, name)

  curves = results["training"]
  plots.lines(
    path("loss.png"),
    {
      config_lib.STAGES[name][1]: (
        curves[name]["step"],
        curves[name]["lm_loss"],
      )
      for name in ("pretrain", "sparse")
    },
    title="Training loss",
    x_label="step of the stage",
    y_label="next-token loss (nats)",
  )
  plots.lines(
    path("indexer.png"),
    {
      config_lib.STAGES[name][1]: (
        curves[name]["step"],
        curves[name]["indexer_kl"],
      )
      for name in ("dense_warmup", "sparse")
    },
    title="Indexer's KL divergence from the attention",
    x_label="step of the stage",
    y_label="mean over layers (nats)",
    from_zero=True,
  )
  plots.bars(
    path("held_out.png"),
    {WHEN[when]: summary["intervals"][when] for when in WHEN},
    title=(
      f"Held-out loss, {summary['top_k']} keys of up to"
      f" {summary['sequence_length']}; bars: 95% over files"
    ),
    y_label="nats a token",
  )
  after = results["held_out"]["after"]
  plots.lines(
    path("position.png"),
    {
      name: (_middles(found["position_edges"]), found["position_losses"])
      for name, found in after.items()
    },
    title="Held-out loss by position, after training with each selection",
    x_label="position in the file (tokens)",
    y_label="nats a token",
    markers=True,
  )
  by_layer = summary["attention_mass_by_layer"]
  plots.bars(
    path("mass.png"),
    {
      f"layer {i}": {
        n: (by_layer[n][i], math.nan) for n in report_text.MASS_NAMES
      }
      for i in range(len(by_layer["dsa"]))
    },
    title=f"Dense attention mass on {summary['top_k']} keys",
    y_label="share of a query's attention",
    from_zero=True,
  )
  decode = summary["seconds_per_token"]
  plots.lines(
    path("decode.png"),
    {
      name: (decode["positions"], 1e3 * np.asarray(decode[name]))
      for name in ("dense", "dsa")
    },
    title="Time of a decoded token by position",
    x_label="tokens in context",
    y_label="milliseconds",
    log_x=True,
    markers=True,
    from_zero=True,
  )


def _middles(edges):
  return [(a + b) / 2 for a, b in itertools.pairwise(edges)]


def _write(workdir: str, name: str, content: str) -> None:
  partial = os.path.join(workdir, f".{name}.partial")
  with open(partial, "w", encoding="utf-8") as file:
    file.write(content)
  os.replace(partial, os.path.join(workdir, name))
