"""The words of a report: every sentence follows from the numbers."""

from collections.abc import Mapping
import math

import numpy as np

from dsv32_jax.recipe import config as config_lib
from dsv32_jax.recipe import measure

# Fewer tokens of dense training teach hardly more than which are frequent.
_FEW_TOKENS = 200_000
MASS_NAMES = ("dsa", "best", "random", "window")


def text(
  config: config_lib.RecipeConfig, summary: Mapping, results: Mapping
) -> str:
  """Returns report.md.

  Args:
    config: of the recipe.
    summary: of report.summarize.
    results: of measure.run.
  """
  generation = results["generation"]
  return "\n".join(
    [
      "# DeepSeek Sparse Attention, small, on real text",
      "",
      *_setting(config, summary),
      "",
      "## Held-out loss",
      "",
      *_loss_table(summary),
      "",
      *_verdicts(summary),
      "",
      "![held-out loss](held_out.png)",
      "![loss by position](position.png)",
      "",
      "## Attention mass on the selected keys",
      "",
      *_mass_table(summary),
      "",
      "![attention mass](mass.png)",
      "",
      "## Training",
      "",
      *_training_table(config, results),
      "",
      "![training loss](loss.png)",
      "![indexer](indexer.png)",
      "",
      "## Time of a decoded token",
      "",
      *_decode_table(summary),
      "",
      "![time a token](decode.png)",
      "",
      "## A held-out file, continued",
      "",
      f"Temperature {config.measure.temperature}, top-p"
      f" {config.measure.top_p}. The prompt:",
      "",
      *_quoted(generation["prompt"]),
      "",
      "With dense attention:",
      "",
      *_quoted(generation["samples"]["dense"]),
      "",
      "With DSA:",
      "",
      *_quoted(generation["samples"]["dsa"]),
      "",
    ]
  )


def _setting(config, summary):
  model, tokens = config.model, summary["training_tokens"]
  caution = [
    "",
    "**So few tokens show that everything runs, and no more: the models have"
    " hardly begun to learn, and how the selections below compare says nothing"
    " about them.**",
  ]
  return [
    f"A model of {model.num_layers} layers of width {model.width}"
    f" ({model.num_experts} experts, {model.num_heads} heads,"
    f" {model.index_heads} index heads) learns the Python standard library's"
    " sources:"
    f" {tokens['pretrain']:,} tokens dense, {tokens['dense_warmup']:,} of dense"
    " warm-up in which the indexer alone trains, then"
    f" {tokens['sparse']:,} of sparse training.",
    *(caution if tokens["pretrain"] < _FEW_TOKENS else ()),
    "",
    f"- top-k: {summary['top_k']} keys a query",
    f"- evaluation length: {summary['sequence_length']} tokens,"
    f" {summary['sequence_length'] / summary['top_k']:g} times top-k",
    f"- held-out tokens: {summary['tokens']:,}, from {summary['files']} files"
    " that training never saw, one row a file",
    f"- time: {summary['seconds']:.0f} seconds, compilation included",
  ]


def _loss_table(summary):
  rows = [
    "Nats a token. Each selection is put on the dense model as it is (its"
    " indexer warmed up), and measured again after training with it for equal"
    " steps on equal data; `dense` there is the dense model trained on for as"
    " long.",
    "",
    "| selection | on the dense model | after training with it | accuracy |",
    "|---|---|---|---|",
  ]
  for name in measure.SELECTIONS:
    cells = [
      f"{summary[key][name]:.4f} +- {summary['intervals'][when][name][1]:.4f}"
      for key, when in (
        ("held_out_loss_before", "before"),
        ("held_out_loss", "after"),
      )
    ]
    accuracy = summary["held_out_accuracy"][name]
    rows.append(f"| {name} | {cells[0]} | {cells[1]} | {accuracy:.1%} |")
  rows += [
    "",
    "+- is 95% over files. Files differ more than selections do, so selections"
    " are compared file by file below.",
  ]
  return rows


def _verdicts(summary):
  """One sentence for each comparison, by the sign and size of its interval."""
  sentences = []
  for when, words in (
    ("after", "After training, DSA"),
    ("before", "Put on the dense model, DSA"),
  ):
    for name, (mean, half) in summary["differences"][when].items():
      other = name.removeprefix("dsa - ")
      sentences.append(f"- {words} {verdict(mean, half)} {other}.")
  return sentences


def verdict(mean: float, half: float) -> str:
  """Says which way a difference of losses goes, if it is beyond chance.

  Args:
    mean: of the paired differences; negative is better.
    half: of the 95% interval, NaN where there is none.
  """
  size = f"({mean:+.4f} +- {half:.4f} nats a token)"
  if math.isnan(half):
    return f"cannot be told apart {size} on a single file from"
  if mean < -half:
    return f"is better {size} than"
  if mean > half:
    return f"is worse {size} than"
  return f"is not measurably different {size} from"


def _mass_table(summary):
  rows = [
    "Share of a query's dense attention, averaged over heads, that the selected"
    f" keys hold; mean over layers and positions past {summary['top_k']}."
    " `best` is what the best choice of as many keys would hold.",
    "",
    "| selection | dense model, indexer warmed up | after sparse training |",
    "|---|---|---|",
  ]
  before, after = summary["attention_mass"], summary["attention_mass_after"]
  for name in MASS_NAMES:
    rows.append(f"| {name} | {before[name]:.3f} | {after[name]:.3f} |")
  share = before["dsa"] / before["best"]
  rows += ["", f"The indexer holds {share:.1%} of what the best choice holds."]
  for name in ("random", "window"):
    word = "more" if before["dsa"] > before[name] else "no more"
    rows.append(f"It holds {word} than {name} does.")
  return rows


def _training_table(config, results):
  rows = [
    "| stage | steps | loss, first to last tenth | seconds |",
    "|---|---|---|---|",
  ]
  for name, (_, title) in config_lib.STAGES.items():
    curve = results["training"][name]
    key = "lm_loss" if "lm_loss" in curve else "indexer_kl"
    tenth = max(1, len(curve[key]) // 10)
    first, last = np.mean(curve[key][:tenth]), np.mean(curve[key][-tenth:])
    unit = "nats" if key == "lm_loss" else "nats of KL"
    rows.append(
      f"| {title} | {curve['step'][-1]} | {first:.3f} to {last:.3f} {unit} |"
      f" {results['seconds'][name]:.0f} |"
    )
  return rows


def _decode_table(summary):
  decode = summary["seconds_per_token"]
  rows = [
    "Milliseconds, median, batch of one, through the cache.",
    "",
    "| tokens in context | dense | DSA | faster |",
    "|---|---|---|---|",
  ]
  for position, dense, dsa in zip(
    decode["positions"], decode["dense"], decode["dsa"]
  ):
    winner = "DSA" if dsa < dense else "dense"
    rows.append(
      f"| {position} | {1e3 * dense:.2f} | {1e3 * dsa:.2f} | {winner} |"
    )
  if decode["dsa"][-1] >= decode["dense"][-1]:
    rows += [
      "",
      "At these lengths a model this small gains no time from DSA: choosing"
      " keys costs as much as attending to all of them.",
    ]
  return rows


def _quoted(passage: str) -> list[str]:
  return [f"    {line}" for line in passage.splitlines() or [""]]
