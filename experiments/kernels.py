"""Checks, times and schedules the kernels; needs jax and absl alone.

python -m experiments.kernels --mode=check --platform=cpu
python -m experiments.kernels --mode=bench --platform=gpu --workdir=DIR
python -m experiments.kernels --mode=schedule --platform=tpu:v5p:2x2x1
python -m experiments.kernels --mode=schedule --platform=gpu:h200
python -m experiments.kernels --workdir=DIR --readme=README.md

check: every implementation that the platform runs against "ref", forward and
backward, over the small cases of pallas_kernels/cases.py. bench: checks first,
then times each implementation beside "xla" and the floor of the device.
schedule: compiles the kernels for a device that is not there and reads the
compiler's schedule; --budget=FILE compares it, --write_budget records it, and
--noalone compiles for a TPU what XLA does around the kernels as well. Each
result is a JSON line on stdout and, with --workdir, in DIR/kernels.jsonl; exit
code 1 says that something failed. --readme prints the table of the benchmark
and measures nothing.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import app
from absl import flags
import jax

from pallas_kernels import budget
from pallas_kernels import cases
from pallas_kernels import checking
from pallas_kernels import problems
from pallas_kernels import roofline
from pallas_kernels import timing

_MODE = flags.DEFINE_enum(
  "mode", "check", ["check", "bench", "schedule"], "What to do."
)
_PLATFORM = flags.DEFINE_string(
  "platform",
  "cpu",
  "cpu, gpu or tpu; to schedule: tpu:GENERATION:TOPOLOGY, as tpu:v5p:2x2x1,"
  " or gpu:h100, gpu:h200.",
)
_OPERATIONS = flags.DEFINE_list(
  "op", list(cases.OPERATIONS), "Operations, by name."
)
_CASES = flags.DEFINE_list("case", [], "Cases, by name; none: all of them.")
_IMPLEMENTATIONS = flags.DEFINE_list(
  "implementations", [], "Implementations; none: all that the platform runs."
)
_SHAPES = flags.DEFINE_enum(
  "shapes",
  None,
  list(cases.BENCHMARKS),
  "Sizes to time or schedule; small on cpu unless given, else real.",
)
_SEEDS = flags.DEFINE_integer(
  "seeds", None, "Sets of inputs: 1 to check, 3 to time.", lower_bound=1
)
_SECONDS = flags.DEFINE_float(
  "seconds", 2.0, "Most seconds to time one set.", lower_bound=0.0
)
_COMPILE_SECONDS = flags.DEFINE_float(
  "compile_seconds",
  1800.0,
  "Most seconds to compile one schedule.",
  lower_bound=0.0,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the results.")
_README = flags.DEFINE_string("readme", None, "File to write the table to.")
_BUDGET = flags.DEFINE_string(
  "budget", None, "JSON file of bundles or instructions."
)
_ALONE = flags.DEFINE_bool("alone", True, "Compile TPU kernels alone.")
_WRITE_BUDGET = flags.DEFINE_bool("write_budget", False, "Write --budget.")

ROOT = pathlib.Path(__file__).resolve().parents[1]


def emit(result: dict) -> None:
  """Prints a result and appends it to the results of the workdir."""
  line = json.dumps(result)
  print(line, flush=True)
  if _WORKDIR.value is not None:
    folder = pathlib.Path(_WORKDIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "kernels.jsonl", "a", encoding="utf-8") as file:
      print(line, file=file)


def start(platform: str) -> jax.Device:
  """Makes JAX use a platform and returns its first device."""
  if platform not in checking.BY_BACKEND:
    raise ValueError(f"--platform={platform} is not cpu, gpu or tpu")
  if platform == "cpu":
    jax.config.update("jax_platforms", "cpu")
  if jax.default_backend() != platform:
    raise ValueError(f"--platform={platform}: JAX has {jax.devices()[:1]} here")
  return jax.devices()[0]


def wanted(table, by_name: bool = True) -> list[cases.Case]:
  """Returns the cases of a table that the flags ask for.

  Without `by_name`, all cases of the operations if none has a name asked for.
  """
  if not _OPERATIONS.value:
    raise ValueError("--op names no operation")
  for name in _OPERATIONS.value:
    if name not in cases.OPERATIONS:
      raise ValueError(f"--op has {name!r}, not in {cases.OPERATIONS}")
  table = [case for case in table if case.operation in _OPERATIONS.value]
  found = [case for case in table if case.name in _CASES.value]
  if not _CASES.value or not (found or by_name):
    return table
  if not found:
    raise ValueError(f"no case has a name of --case={_CASES.value}")
  return found


def names_for(operation: str) -> list[str]:
  """Returns the implementations to run."""
  known = checking.BY_BACKEND[_PLATFORM.value]
  for name in _IMPLEMENTATIONS.value:
    if name not in known:
      raise ValueError(f"--implementations has {name!r}, not in {known}")
  return [
    name
    for name in checking.BY_BACKEND[_PLATFORM.value]
    if name in (_IMPLEMENTATIONS.value or [name])
    and checking.offers(operation, name)
  ]


def check(table, names: dict[str, list[str]]) -> bool:
  """Checks cases by the named implementations; tells whether all passed.

  An implementation fails as well if it takes none of an operation's cases.
  """
  passed, taken = True, {}
  for case in table:
    for dtype in case.dtypes:
      for seed in range(_SEEDS.value or 1):
        for found in checking.check(case, dtype, names[case.operation], seed):
          emit({"mode": "check", "platform": _PLATFORM.value} | found)
          who = f"{found['operation']}/{found['implementation']}"
          taken[who] = taken.get(who, False) or "skipped" not in found
          passed &= found.get("passed", True)
  refused = [who for who, any_case in taken.items() if not any_case]
  if refused:
    sys.stderr.write(f"no case was taken by {', '.join(refused)}\n")
  return passed and not refused


def bench(table, names: dict[str, list[str]], device: jax.Device) -> bool:
  """Times cases by the named implementations; tells whether all ran."""
  on, ran = timing.peaks(device), True
  for case in table:
    for dtype in case.dtypes:
      inputs = [problems.draw(case, dtype, s) for s in range(_SEEDS.value or 3)]
      for direction in problems.directions(case.operation):
        baseline = None
        for name in names[case.operation]:
          found = measure(case, dtype, direction, name, inputs, on)
          if name == "xla":
            baseline = found.get("seconds")
          if baseline and "seconds" in found:
            found["ratio"] = baseline / found["seconds"]
          emit(
            {"mode": "bench", "device": device.device_kind}
            | found
            | {"baseline": "xla", "baseline_seconds": baseline}
          )
          ran &= "failed" not in found
  return ran


def measure(case, dtype, direction, name, inputs, on) -> dict:
  """Times one case by one implementation."""
  found = {
    "operation": case.operation,
    "case": case.name,
    "sizes": case.sizes,
    "dtype": dtype,
    "direction": direction,
    "implementation": name,
    "seeds": len(inputs),
    "jax": jax.__version__,
  }
  reason = checking.refusal(case, dtype, name)
  if reason is not None:
    return found | {"skipped": reason}
  run = problems.call if direction == "forward" else checking.outputs
  function = jax.jit(functools.partial(run, case, name))
  try:
    jax.block_until_ready(function(inputs[0]))
  # Whatever a compiler or a device raises is a result like others.
  except Exception as error:
    return found | {"failed": checking.describe(error)}
  taken = timing.time_calls(function, inputs, budget=_SECONDS.value)
  work = roofline.work(case, dtype, direction)
  floor = on and roofline.floor_seconds(work, dtype, on)
  return found | {
    "seconds": taken.median,
    "min_seconds": taken.least,
    "flops": work.flops,
    "bytes": work.bytes,
    "floor_seconds": floor,
    "floor_source": on and on.source,
    "share_of_floor": floor and floor / taken.median,
  }


def schedule(table) -> bool:
  """Compiles cases for a device that is not there; tells whether all did."""
  # To look for the device that is not there takes long.
  jax.config.update("jax_platforms", "cpu")
  results = []
  rows = budget.plan(table, _PLATFORM.value, _ALONE.value)
  path = _BUDGET.value and pathlib.Path(_BUDGET.value)
  if _WRITE_BUDGET.value and path is None:
    raise ValueError("--write_budget needs --budget")
  # What cannot be compared is told before anything is compiled.
  allowed = {} if path is None or _WRITE_BUDGET.value else budget.read(path)
  for row in rows:
    begun = time.monotonic()
    found = row | {"shapes": shapes()}
    found |= compiled(found)
    found["seconds"] = round(time.monotonic() - begun, 1)
    emit({"mode": "schedule"} | found)
    for line in budget.rows(found):
      emit(line)
    results.append(found)
  sys.stderr.write("\n".join(map(budget.table, results)) + "\n")
  if path is None:
    over = budget.faults(results)
  else:
    if _WRITE_BUDGET.value:
      budget.write(path, results)
      allowed = budget.read(path)
    over = budget.exceeded(allowed, results)
  sys.stderr.write("".join(f"over budget: {line}\n" for line in over))
  return not over and not any("failed" in found for found in results)


def dumping(folder: str) -> dict[str, str]:
  """Returns an environment in which a TPU's compiler dumps its schedules."""
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder}"
    " --xla_jf_dump_llo_text=true"
    " --xla_jf_dump_llo_pass_label_regex=.*final_.*",
  }
  # What comes out of a cache is not dumped.
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  return environment


def compiled(row: dict) -> dict:
  """Compiles one problem in a process of its own, which dumps its schedule."""
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, "-m", "experiments.kernels_compile"]
    try:
      done = subprocess.run(
        [*command, json.dumps(row | {"folder": folder})],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=dumping(folder),
        timeout=_COMPILE_SECONDS.value,
      )
    except subprocess.TimeoutExpired:
      return {"failed": f"took more than {_COMPILE_SECONDS.value:.0f} s"}
  if done.returncode:
    lines = done.stderr.strip().splitlines() or [f"code {done.returncode}"]
    return {"failed": lines[-1]}
  return json.loads(done.stdout.splitlines()[-1])


def shapes() -> str:
  """Returns which sizes to time or to schedule."""
  if _SHAPES.value is not None:
    return _SHAPES.value
  return "small" if _PLATFORM.value == "cpu" else "real"


def main(argv) -> None:
  del argv
  if _README.value is not None:
    if _WORKDIR.value is None:
      raise ValueError("--readme needs --workdir, where the results are")
    # A process of its own: the plot needs more than this program may.
    program = [sys.executable, "-m", "experiments.kernels_table"]
    results = pathlib.Path(_WORKDIR.value) / "kernels.jsonl"
    sys.exit(subprocess.call([*program, str(results), _README.value]))
  if _MODE.value == "schedule":
    sys.exit(0 if schedule(wanted(cases.BENCHMARKS[shapes()])) else 1)
  device = start(_PLATFORM.value)
  timed = _MODE.value == "bench"
  table = wanted(cases.CHECKS, by_name=not timed)
  names = {c.operation: names_for(c.operation) for c in table}
  if timed:
    names = {
      o: [n for n in ns if "interpret" not in n] for o, ns in names.items()
    }
  if not any(names.values()):
    raise ValueError(
      f"--implementations={_IMPLEMENTATIONS.value} are not offered here"
    )
  passed = check(table, names)
  if timed:
    passed &= bench(wanted(cases.BENCHMARKS[shapes()]), names, device)
  sys.exit(0 if passed else 1)


def guarded(argv) -> None:
  """Runs main; a mistake of the user ends in one line and code 1."""
  try:
    main(argv)
  except (ValueError, OSError) as error:
    fail(error)


def fail(error) -> None:
  """Says what is wrong in one line and ends."""
  sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
  sys.exit(1)


def parse(argv) -> list[str]:
  """Parses the flags of this program; mistakes take one line."""
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    fail(error)
  if len(rest) > 1:
    fail(f"unexpected argument {rest[1]!r}")
  return rest


if __name__ == "__main__":
  app.run(guarded, flags_parser=parse)
