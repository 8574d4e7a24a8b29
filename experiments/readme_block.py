"""The part of a README that a program prints, between two markers."""

import pathlib


def split(readme: pathlib.Path, begin: str, end: str) -> tuple[str, str]:
  """Returns what stands before and after the block, markers not included.

  Raises:
    ValueError: if the file lacks a marker, or has one twice.
  """
  text = readme.read_text(encoding="utf-8")
  if text.count(begin) != 1 or text.count(end) != 1:
    raise ValueError(f"{readme} needs one {begin} and one {end}")
  before, rest = text.split(begin)
  return before, rest.split(end)[1]


def replace(readme: pathlib.Path, begin: str, end: str, body: str) -> None:
  """Replaces what is between the markers by `body`; errors as in `split`."""
  before, after = split(readme, begin, end)
  readme.write_text(f"{before}{begin}\n{body}\n{end}{after}", encoding="utf-8")
