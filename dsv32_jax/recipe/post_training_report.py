"""What post-training reports, as Markdown."""

from collections.abc import Iterable, Sequence

from dsv32_jax.recipe import post_training
from dsv32_jax.recipe import post_training_config as config_lib

_PROOFS = (
  " Of proofs, the mean of their reward, in which a proof counts 0.76 and its"
  " self-evaluation 0.24."
)


def _proves(domain: config_lib.DomainConfig) -> bool:
  return domain.task is not None and domain.task.kind == "proofs"


def by_stage(
  config: config_lib.PostTrainingConfig, report: dict
) -> dict[str, dict[str, float]]:
  """Pass@1 of each domain and mode after each stage that all share.

  Returns:
    By domain and mode: of the start, its own specialist, the distilled model
    and the last model of each order of RL.
  """
  found = report["pass_at_1"]
  last = {order: names[-1] for order, names in report["orders"].items()}
  return {
    one.name: {
      "start": found["start"][one.name],
      "specialist": found[one.name][one.name],
      "distilled": found["distilled"][one.name],
      **{order: found[name][one.name] for order, name in last.items()},
    }
    for one in config.specialists
  }


def describe(config: config_lib.PostTrainingConfig, report: dict) -> str:
  """The report.

  Args:
    config: of the run.
    report: of post_training.run.
  """
  problems = config.stage_rl(config.specialists, 1).held_out_share
  lines = [
    "# Post-training",
    "",
    f"Held-out pass@1 in percent, of at most {problems} problems of a domain in"
    " a mode (fewer where it has no more) that no part has trained on, one try"
    " each." + _PROOFS * any(map(_proves, config.domains)),
    "",
    *_stages(config, report),
  ]
  for mode in ("thinking", "chat"):
    names = [one.name for one in config.specialists if one.mode == mode]
    if names:
      title = "with thinking" if mode == "thinking" else "without thinking"
      lines += ["", f"## Every model, asked {title}", ""]
      lines += _models(report, names, mode)
  for order in report["orders"]:
    lines += ["", f"## After each stage of RL, {order}", ""]
    lines += _forgotten(report, order)
  lines += [
    "",
    "## Distilled",
    "",
    "What each specialist was asked, and how much its verifier accepted:",
    "",
    *_distilled(report),
  ]
  return "\n".join(lines) + "\n"


def _stages(config, report) -> list[str]:
  rows = by_stage(config, report)
  columns = list(next(iter(rows.values())))
  means = {
    column: sum(row[column] for row in rows.values()) / len(rows)
    for column in columns
  }
  body = [
    [name, *(_percent(row[column]) for column in columns)]
    for name, row in (rows | {"mean": means}).items()
  ]
  return _table(["domain and mode", *columns], body)


def _models(report, names, mode) -> list[str]:
  header = ["model", *(name.removesuffix(f"_{mode}") for name in names)]
  body = [
    [
      model,
      *(_percent(found[name]) for name in names),
      f"{report['seconds'][model]:.0f}",
    ]
    for model, found in report["pass_at_1"].items()
  ]
  return _table([*header, "seconds"], body)


def _forgotten(report, order) -> list[str]:
  stages = report["orders"][order]
  lost = post_training.forgotten(report, order)
  body = [
    [
      name,
      *(_percent(report["pass_at_1"][stage][name]) for stage in stages),
      _percent(drop),
    ]
    for name, drop in lost.items()
  ]
  largest = max(lost, key=lost.get)
  return [
    *_table(["domain and mode", *stages, "forgotten"], body),
    "",
    "Forgotten: the best before less the end. Largest:"
    f" {_percent(lost[largest])} points, of {largest}; in the mean"
    f" {_percent(sum(lost.values()) / len(lost))}.",
  ]


def _distilled(report) -> list[str]:
  names = ("problems", "answers", "accepted", "mixed")
  body = [
    [specialist, *(str(counts[name]) for name in names)]
    for specialist, counts in report["distilled"].items()
  ]
  return _table(
    ["specialist", "problems", "answers", "accepted", "examples"], body
  )


def _percent(value: float) -> str:
  return f"{100 * value:.1f}"


def _table(header: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
  rows = [header, ["---"] * len(header), *body]
  return ["| " + " | ".join(row) + " |" for row in rows]
