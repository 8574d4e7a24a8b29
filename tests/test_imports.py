"""The rules of the source tree: one-way imports, short files, no leftovers."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
MAX_LINES = 400
# The tokenizer's own symbols.
SYMBOLS = {"\uff5c", "\u2581"}

# What each part may import of this project; what these import, it may as well.
# A part that is not named here may not exist.
MAY_IMPORT = {
  "pallas_kernels": (),
  "dsv32_jax.config_files": (),
  "dsv32_jax.sharding": (),
  "dsv32_jax.model": ("dsv32_jax.sharding", "pallas_kernels"),
  "dsv32_jax.ahead": ("pallas_kernels",),
  "dsv32_jax.weights": ("dsv32_jax.model", "dsv32_jax.config_files"),
  "dsv32_jax.data": ("dsv32_jax.config_files",),
  "dsv32_jax.generation": (
    "dsv32_jax.ahead",
    "dsv32_jax.model",
    "dsv32_jax.agents",
    "dsv32_jax.config_files",
  ),
  "dsv32_jax.training": (
    "dsv32_jax.ahead",
    "dsv32_jax.model",
    "dsv32_jax.data",
    "dsv32_jax.config_files",
  ),
  "dsv32_jax.agents": ("dsv32_jax.data.tokenizer", "dsv32_jax.config_files"),
  "dsv32_jax.verifiers": ("dsv32_jax.agents",),
  "dsv32_jax.rl": (
    "dsv32_jax.training",
    "dsv32_jax.generation",
    "dsv32_jax.agents",
    "dsv32_jax.verifiers",
  ),
  "dsv32_jax.distillation": (
    "dsv32_jax.generation",
    "dsv32_jax.agents",
    "dsv32_jax.rl",
    "dsv32_jax.verifiers",
  ),
  "dsv32_jax.evals": (
    "dsv32_jax.data",
    "dsv32_jax.generation",
    "dsv32_jax.agents",
    "dsv32_jax.verifiers",
  ),
  "dsv32_jax.recipe": (
    "dsv32_jax.training",
    "dsv32_jax.evals",
    "dsv32_jax.rl",
    "dsv32_jax.distillation",
  ),
}
WITHOUT_JAX = ("dsv32_jax.agents", "dsv32_jax.verifiers")
# Reading with these may run what the file says.
IMPORTS_LATER = {"pallas_kernels.implementations"}
RUN_WHAT_THEY_READ = {
  *("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"),
  *("jinja2", "torch"),
}
KERNEL_LIBRARIES = {"jax", "numpy"}
# Runs on any machine with an accelerator and jax.
KERNEL_PROGRAM = ROOT / "experiments" / "kernels.py"
KERNEL_PROGRAM_MAY = {"absl", "jax", "pallas_kernels"}

# Split, so that this file does not hold them itself.
LEFTOVERS = (
  "TO" + "DO",
  "FIX" + "ME",
  "XX" + "X",
  "NotImplemented" + "Error",
  "except Import" + "Error",
  "/wo" + "rk/",
  "/ro" + "ot/",
)


def source_files(*folders):
  return sorted(
    path
    for folder in folders
    for path in (ROOT / folder).rglob("*.py")
    if ".ipynb_checkpoints" not in path.parts
  )


LIBRARY = source_files("dsv32_jax", "pallas_kernels")
EVERYTHING = LIBRARY + source_files("experiments", "configs", "tests")


def name_of(path: pathlib.Path) -> str:
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: pathlib.Path) -> list[tuple[int, str]]:
  """Returns (line, module) of each import, at the top or inside a function."""
  found = []
  for node in ast.walk(ast.parse(path.read_text(), str(path))):
    if isinstance(node, ast.Import):
      found += [(node.lineno, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: relative import"
      found += [
        (node.lineno, f"{node.module}.{alias.name}") for alias in node.names
      ]
  return found


def is_within(module: str, part: str) -> bool:
  return module == part or module.startswith(part + ".")


def allowed(part: str) -> set[str]:
  """Returns the part itself and all that it reaches by MAY_IMPORT."""
  reached, waiting = set(), [part]
  while waiting:
    current = waiting.pop()
    if current not in reached:
      reached.add(current)
      waiting += MAY_IMPORT.get(current, ())
  return reached


def part_of(module: str) -> str | None:
  return next((p for p in MAY_IMPORT if is_within(module, p)), None)


def ids(path):
  return str(path.relative_to(ROOT)) if isinstance(path, pathlib.Path) else None


@pytest.mark.parametrize("path", LIBRARY, ids=ids)
def test_imports_go_one_way(path):
  module = name_of(path)
  if module == "dsv32_jax":
    assert imports_of(path) == []
    return
  part = part_of(module)
  assert part is not None, f"{path} belongs to no part that MAY_IMPORT names"
  for line, target in imports_of(path):
    where = f"{path}:{line}: {target}"
    assert not is_within(target, "experiments"), where
    assert not is_within(target, "tests"), where
    if is_within(target, "dsv32_jax") or is_within(target, "pallas_kernels"):
      assert any(is_within(target, other) for other in allowed(part)), where


@pytest.mark.parametrize("path", LIBRARY, ids=ids)
def test_third_party_imports(path):
  module = name_of(path)
  for line, target in imports_of(path):
    where, package = f"{path}:{line}: {target}", target.split(".")[0]
    # The library reads neither flags nor the environment.
    assert not is_within(target, "absl.flags"), where
    assert target not in ("os.environ", "os.getenv"), where
    # What names a module in a string is not seen here: kernels of GPUs alone.
    assert target != "importlib" or module in IMPORTS_LATER, where
    if any(is_within(module, part) for part in WITHOUT_JAX):
      assert package not in ("jax", "flax", "optax", "orbax"), where
    if is_within(module, "pallas_kernels"):
      assert (
        package in KERNEL_LIBRARIES | {"pallas_kernels"}
        or package in sys.stdlib_module_names
      ), where


@pytest.mark.parametrize("path", LIBRARY, ids=ids)
def test_nothing_runs_what_it_reads(path):
  for line, target in imports_of(path):
    assert target.split(".")[0] not in RUN_WHAT_THEY_READ, f"{path}:{line}"
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
      assert ast.unparse(node.value) == "False", f"{path}:{node.value.lineno}"


@pytest.mark.skipif(
  not KERNEL_PROGRAM.exists(), reason="experiments.kernels is not there"
)
def test_the_kernel_program_needs_little():
  for line, target in imports_of(KERNEL_PROGRAM):
    package = target.split(".")[0]
    assert package in KERNEL_PROGRAM_MAY | sys.stdlib_module_names, line


@pytest.mark.parametrize("path", EVERYTHING, ids=ids)
def test_source_is_plain_and_short(path):
  text = path.read_text(encoding="utf-8")
  assert text.count("\n") <= MAX_LINES
  strange = {c for c in text if ord(c) > 127} - SYMBOLS
  assert not strange, f"not ASCII: {strange}"
  for leftover in LEFTOVERS:
    assert leftover not in text, f"{leftover!r} in {path}"


@pytest.mark.parametrize("path", LIBRARY, ids=ids)
def test_the_environment_is_not_read(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Attribute):
      assert node.attr not in ("environ", "getenv"), f"{path}:{node.lineno}"


def test_names_of_test_files_are_unique():
  names = [path.name for path in source_files("tests")]
  repeated = {n for n in names if names.count(n) > 1} - {"conftest.py"}
  assert not repeated
