"""The folder of checkpoints with known results, for tests that compare."""

import os
import pathlib

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def oracle_folder():
  """$DSV32_ORACLE, else ../shared/oracle beside the repository."""
  path = pathlib.Path(
    os.environ.get("DSV32_ORACLE", REPOSITORY.parent / "shared" / "oracle")
  )
  if not path.is_dir():
    pytest.skip(f"{path} is not there; set DSV32_ORACLE")
  return path


def pytest_ignore_collect(collection_path, config):
  """Leaves the folder alone where none of it runs: torch may not be there."""
  del collection_path
  return True if "not parity" in config.option.markexpr else None
