"""Config files become dataclasses strictly: errors name the dotted field."""

import dataclasses
import json
from typing import Literal

from absl import flags
from ml_collections import config_dict
from ml_collections import config_flags
import pytest

from dsv32_jax import config_files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
  rate: float
  steps: int = 3
  name: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
  inner: Inner
  many: tuple[Inner, ...] = ()
  pair: tuple[int, str] = (1, "a")
  flag: bool = False
  kind: Literal["x", "y"] = "x"
  weights: dict[str, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.pair[0] < 0:
      raise ValueError(f"{self.pair=} must not start below 0")


def test_config_dict_round_trip():
  config = config_dict.create(
    inner={"rate": 1, "name": "n"},
    many=({"rate": 0.5}, {"rate": 2.0, "steps": 7}),
    pair=[4, "b"],
    flag=True,
    kind="y",
    weights={"a": 1},
  )
  built = config_files.build(Outer, config)
  assert built == Outer(
    inner=Inner(rate=1.0, name="n"),
    many=(Inner(rate=0.5), Inner(rate=2.0, steps=7)),
    pair=(4, "b"),
    flag=True,
    kind="y",
    weights={"a": 1.0},
  )
  assert type(built.inner.rate) is float
  again = json.loads(json.dumps(config_files.dump(built), allow_nan=False))
  assert config_files.build(Outer, again) == built
  assert config_files.build(Outer, built) is built


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"nope": 1}, r"config\.nope is not a field of Outer"),
    ({"inner": {}}, r"config\.inner\.rate of Inner is missing"),
    ({"inner": 3}, r"config\.inner must hold the fields of Inner"),
    ({"inner": {"rate": "1"}}, r"config\.inner\.rate='1' must be float"),
    ({"inner": {"rate": True}}, r"config\.inner\.rate=True must be float"),
    ({"inner": {"rate": float("nan")}}, r"config\.inner\.rate=nan .*finite"),
    ({"inner": {"rate": 1.0, "steps": 1.0}}, r"config\.inner\.steps=1.0"),
    ({"inner": {"rate": 1.0, "steps": True}}, r"config\.inner\.steps=True"),
    ({"inner": {"rate": 1.0, "name": 1}}, r"config\.inner\.name=1 must be str"),
    ({"many": [{"rate": 1.0}, {"r": 1}]}, r"config\.many\[1\]\.r is not"),
    ({"many": "ab"}, r"config\.many='ab' must be a tuple"),
    ({"pair": (1, "a", 2)}, r"config\.pair=.* must have 2 items"),
    ({"pair": (-1, "a")}, r"config: self\.pair=.* below 0"),
    ({"flag": 1}, r"config\.flag=1 must be bool"),
    ({"kind": "z"}, r"config\.kind='z' must be one of 'x', 'y'"),
    ({"weights": {"a": "b"}}, r"config\.weights\.a='b' must be float"),
    (
      {"flag": config_dict.required_placeholder(bool)},
      r"config\.flag must be set",
    ),
  ],
)
def test_mistakes_name_the_field(change, message):
  values = {"inner": {"rate": 1.0}} | change
  with pytest.raises(ValueError, match=message):
    config_files.build(Outer, config_dict.ConfigDict(values))


def test_missing_field_of_the_outermost():
  with pytest.raises(ValueError, match=r"train\.inner of Outer is missing"):
    config_files.build(Outer, {}, "train")


def test_what_json_cannot_hold_is_refused():
  with pytest.raises(ValueError, match=r"Inner\.rate=inf"):
    config_files.dump(Inner(rate=float("inf")))
  with pytest.raises(ValueError, match="dataclass"):
    config_files.dump({"rate": 1.0})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optional:
  steps: int | None = 3
  rate: float | None = None
  path: str | None = None


@pytest.mark.parametrize(
  ("given", "want"),
  [
    ("--config.steps=None", Optional(steps=None)),
    ("--config.steps=5", Optional(steps=5)),
    ("--config.rate=None", Optional()),
    ("--config.rate=2", Optional(rate=2.0)),
    ("--config.rate=1e-3", Optional(rate=1e-3)),
    ("--config.path=5", Optional(path="5")),
  ],
)
def test_a_flag_gives_a_number_or_none(given, want):
  values = flags.FlagValues()
  config_flags.DEFINE_config_dict(
    "config",
    config_files.editable(Optional()),
    flag_values=values,
    sys_argv=["program", given],
  )
  values(["program", given])
  assert config_files.build(Optional, values.config) == want


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"steps": "x"}, r"config\.steps='x' must be int"),
    ({"steps": 1.5}, r"config\.steps=1\.5 must be int"),
    ({"rate": True}, r"config\.rate=True must be float"),
  ],
)
def test_an_optional_number_of_another_type_is_refused(change, message):
  made = config_files.editable(Optional())
  made.update(change)
  with pytest.raises(ValueError, match=message):
    config_files.build(Optional, made)


def test_an_editable_tuple_stays_one():
  """Flags can override a tuple, and no list."""
  outer = Outer(inner=Inner(rate=1.0), many=(Inner(rate=2.0),))
  made = config_files.editable(outer)
  assert made.pair == (1, "a") and isinstance(made.pair, tuple)
  assert isinstance(made.many, tuple)
  made.many[0].rate = 3.0
  made.pair = (2, "b")
  built = config_files.build(Outer, made)
  assert built == dataclasses.replace(
    outer, many=(Inner(rate=3.0),), pair=(2, "b")
  )
