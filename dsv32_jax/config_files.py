"""From a config file's nested values to frozen dataclasses and back, strictly.

`build` stands at the edge: a program gives it the `ConfigDict` of `--config`
and gets a checked dataclass. `dump` writes the same as JSON-able values, for
checkpoints and run manifests; `build(type(x), dump(x)) == x` holds.

Field types that may occur: bool, int, float, str, other dataclasses, tuples
(`tuple[X, ...]` or `tuple[X, Y]`), `dict[str, X]`, `Literal` and `X | None`.
"""

import collections.abc
import dataclasses
import math
import types
import typing
from typing import Any, TypeVar

from ml_collections import config_dict

Config = TypeVar("Config")

_SCALARS = (bool, int, float, str)


def build(cls: type[Config], config: Any, name: str = "config") -> Config:
  """Makes a dataclass of type `cls` from a mapping with the same field names.

  Args:
    cls: frozen keyword-only dataclass.
    config: ConfigDict, other mapping, or a finished instance of `cls`. A field
      with a default may be missing; one of a dataclass type takes a mapping.
    name: what an error calls `config`.

  Raises:
    ValueError: naming the dotted field, if a field is unknown or missing, has
      the wrong type, or the dataclass itself refuses its values.
  """
  if isinstance(config, cls):
    return config
  if not isinstance(config, (collections.abc.Mapping, config_dict.ConfigDict)):
    raise ValueError(
      f"{name} must hold the fields of {cls.__name__}, not {config!r}"
    )
  fields = {field.name: field for field in dataclasses.fields(cls)}
  given = _items(config, name)
  for key in given:
    if key not in fields:
      raise ValueError(
        f"{name}.{key} is not a field of {cls.__name__}, which has "
        f"{', '.join(fields)}"
      )
  annotations = typing.get_type_hints(cls)
  values = {}
  for key, field in fields.items():
    if key in given:
      values[key] = _convert(annotations[key], given[key], f"{name}.{key}")
    elif (
      field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    ):
      raise ValueError(f"{name}.{key} of {cls.__name__} is missing")
  try:
    return cls(**values)
  except ValueError as error:
    raise ValueError(f"{name}: {error}") from error


def dump(config: Any) -> dict[str, Any]:
  """Writes a dataclass as nested dicts, lists and scalars that JSON can hold.

  Raises:
    ValueError: naming the field whose value JSON cannot hold.
  """
  if not dataclasses.is_dataclass(config) or isinstance(config, type):
    raise ValueError(f"{config=} must be an instance of a dataclass")
  return _dump(config, type(config).__name__)


def editable(config: Any) -> config_dict.ConfigDict:
  """Turns a dataclass into the ConfigDict that `build` takes it back from.

  What may be None or a number is a reference of any type, so that both
  `--config.field=None` and `--config.field=2` are parsed; None where text is
  allowed becomes a placeholder of text. `build` checks the types.
  """
  annotations = typing.get_type_hints(type(config))
  editable_config = config_dict.ConfigDict(dump(config))
  for field in dataclasses.fields(config):
    if not field.init:
      continue
    value = getattr(config, field.name)
    members = typing.get_args(annotations[field.name])
    if dataclasses.is_dataclass(value):
      editable_config[field.name] = editable(value)
    elif types.NoneType in members and {bool, int, float} & set(members):
      # Put over a number, it would take the number's type.
      del editable_config[field.name]
      editable_config[field.name] = config_dict.FieldReference(
        value, field_type=object
      )
    elif value is None and str in members:
      editable_config[field.name] = config_dict.placeholder(str)
    elif isinstance(value, tuple):
      # Put over the list that `dump` makes, it would become a list itself,
      # and flags can only override tuples.
      del editable_config[field.name]
      editable_config[field.name] = tuple(
        editable(item) if dataclasses.is_dataclass(item) else item
        for item in value
      )
  return editable_config


def _items(config: Any, name: str) -> dict[str, Any]:
  """Returns a mapping's items; a placeholder that was never set is an error."""
  items = {}
  for key in config:
    try:
      items[key] = config[key]
    except config_dict.RequiredValueError as error:
      raise ValueError(f"{name}.{key} must be set") from error
  return items


def _convert(annotation: Any, value: Any, name: str) -> Any:
  """Returns `value` as the annotated type, or raises ValueError with `name`."""
  origin = typing.get_origin(annotation)
  if annotation in _SCALARS or annotation is types.NoneType:
    return _scalar(annotation, value, name)
  if dataclasses.is_dataclass(annotation):
    return build(annotation, value, name)
  if origin is typing.Literal:
    options = typing.get_args(annotation)
    if not any(type(value) is type(o) and value == o for o in options):
      choices = ", ".join(repr(option) for option in options)
      raise ValueError(f"{name}={value!r} must be one of {choices}")
    return value
  if origin in (types.UnionType, typing.Union):
    return _union(annotation, value, name)
  if origin is tuple:
    return _tuple(annotation, value, name)
  if origin is dict:
    key_type, value_type = typing.get_args(annotation)
    if not isinstance(value, (collections.abc.Mapping, config_dict.ConfigDict)):
      raise ValueError(f"{name}={value!r} must be a dict")
    return {
      _scalar(key_type, key, name): _convert(value_type, item, f"{name}.{key}")
      for key, item in _items(value, name).items()
    }
  raise TypeError(f"{name}: no config field can be of type {annotation}")


def _scalar(annotation: type, value: Any, name: str) -> Any:
  """Checks a scalar; an int is a float, a bool is neither."""
  if annotation is float and type(value) is int:
    value = float(value)
  if type(value) is not annotation:
    wanted = "None" if annotation is types.NoneType else annotation.__name__
    raise ValueError(f"{name}={value!r} must be {wanted}")
  if annotation is float and not math.isfinite(value):
    raise ValueError(f"{name}={value!r} must be finite")
  return value


def _union(annotation: Any, value: Any, name: str) -> Any:
  """Converts to the one member besides None; None stays None."""
  members = [
    member
    for member in typing.get_args(annotation)
    if member is not types.NoneType
  ]
  if len(members) != 1 or len(typing.get_args(annotation)) != 2:
    raise TypeError(f"{name}: a union in a config is X | None: {annotation}")
  return None if value is None else _convert(members[0], value, name)


def _tuple(annotation: Any, value: Any, name: str) -> tuple[Any, ...]:
  """Converts the items of a list or tuple one by one."""
  if not isinstance(value, (list, tuple)):
    raise ValueError(f"{name}={value!r} must be a tuple or list")
  item_types = typing.get_args(annotation)
  if len(item_types) == 2 and item_types[1] is Ellipsis:
    item_types = (item_types[0],) * len(value)
  if len(item_types) != len(value):
    raise ValueError(f"{name}={value!r} must have {len(item_types)} items")
  return tuple(
    _convert(item_type, item, f"{name}[{position}]")
    for position, (item_type, item) in enumerate(zip(item_types, value))
  )


def _dump(value: Any, name: str) -> Any:
  """Writes one value; see `dump`."""
  if dataclasses.is_dataclass(value):
    return {
      field.name: _dump(getattr(value, field.name), f"{name}.{field.name}")
      for field in dataclasses.fields(value)
      if field.init
    }
  if isinstance(value, dict):
    return {key: _dump(item, f"{name}.{key}") for key, item in value.items()}
  if isinstance(value, tuple):
    return [
      _dump(item, f"{name}[{position}]") for position, item in enumerate(value)
    ]
  if value is not None and type(value) not in _SCALARS:
    raise ValueError(f"{name}={value!r} cannot be written to JSON")
  if isinstance(value, float) and not math.isfinite(value):
    raise ValueError(f"{name}={value!r} must be finite")
  return value
