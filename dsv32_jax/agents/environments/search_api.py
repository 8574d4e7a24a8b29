"""A search service over HTTP as a source of the search environment.

The service takes a GET request and answers with JSON; where in it the hits
and their fields stand is configured. Pages are fetched as they are, but only
those that a search has returned, so a model cannot have this machine fetch any
address it likes. A service that fails is an observation to the model, after a
few tries.
"""

import asyncio
from collections.abc import Mapping
import dataclasses
from html import parser
from typing import Any

import httpx

from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import search_index

_SKIPPED = ("script", "style", "noscript", "template")
_BREAKS = ("p", "div", "br", "li", "tr", "section", "pre", "h1", "h2", "h3")
_TEXT_TYPES = ("text/", "application/json", "application/xhtml+xml")
_AGAIN = (429, 500, 502, 503, 504)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchApi:
  """How a service is asked and how its answers are read.

  Attributes:
    url: of the request.
    query_parameter: that holds the query.
    count_parameter, offset_parameter: of the page; "" where there is none,
      and then an offset beyond what came finds nothing.
    parameters: further ones, the same in each request.
    headers: of each request to `url`, such as a key; pages get none.
    hits_path: where the list of hits stands in the answer, "a.b" for b in a.
    name_field, title_field, snippet_field: of a hit; the name is its address.
    tries: of each request.
    max_bytes: of a page; the rest is left out.
  """

  url: str
  query_parameter: str = "q"
  count_parameter: str = "count"
  offset_parameter: str = "offset"
  parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)
  headers: Mapping[str, str] = dataclasses.field(
    default_factory=dict, repr=False
  )
  hits_path: str = "results"
  name_field: str = "url"
  title_field: str = "title"
  snippet_field: str = "snippet"
  tries: int = 3
  max_bytes: int = 2_000_000

  def __post_init__(self):
    if not self.url.startswith(("http://", "https://")):
      raise ValueError(f"url={self.url!r} must begin with http:// or https://")
    for name in ("tries", "max_bytes"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be positive")


class HttpSource:
  """See search_index.Source; an asynchronous context manager."""

  def __init__(self, api: SearchApi, *, seconds: float = 20.0, wait=0.5):
    """Makes a client.

    Args:
      api: the service.
      seconds: for one request.
      wait: seconds before a second try, doubled before each further one.
    """
    self._api, self._wait = api, wait
    self._client = httpx.AsyncClient(timeout=seconds)
    self._returned: dict[str, str] = {}  # address to title

  async def __aenter__(self):
    return self

  async def __aexit__(self, *unused):
    await self._client.aclose()

  async def search(
    self, query: str, *, offset: int, count: int
  ) -> list[search_index.Hit]:
    """See search_index.Source."""
    api = self._api
    parameters = {**api.parameters, api.query_parameter: query}
    first = offset
    if api.count_parameter:
      parameters[api.count_parameter] = str(count)
    if api.offset_parameter:
      parameters[api.offset_parameter], first = str(offset), 0
    response = await self._get(api.url, params=parameters, headers=api.headers)
    rows = _at(_json(response), api.hits_path)
    if not isinstance(rows, list):
      raise tools.ToolError("the search service gave no list of hits")
    hits = [self._hit(row) for row in rows if isinstance(row, dict)]
    hits = [hit for hit in hits if hit.name][first : first + count]
    self._returned.update({hit.name: hit.title for hit in hits})
    return hits

  async def open(self, name: str) -> search_index.Document:
    """See search_index.Source; only what a search has returned."""
    if name not in self._returned:
      raise tools.ToolError(f"no search has returned {name[:200]!r}")
    if not name.startswith(("http://", "https://")):
      raise tools.ToolError(f"{name[:200]!r} is no address of a page")
    response = await self._get(name)
    kind = response.headers.get("content-type", "text/plain")
    if not kind.startswith(_TEXT_TYPES):
      raise tools.ToolError(f"the page is {kind[:80]}, not text")
    text = response.text
    if "html" in kind:
      text = text_of_html(text)
    title = self._returned[name]
    return search_index.Document(name=name, title=title, text=text)

  def _hit(self, row: Mapping[str, Any]) -> search_index.Hit:
    api = self._api
    return search_index.Hit(
      name=str(row.get(api.name_field) or ""),
      title=str(row.get(api.title_field) or ""),
      snippet=str(row.get(api.snippet_field) or ""),
    )

  async def _get(self, url: str, **options) -> httpx.Response:
    wait = self._wait
    for last in [False] * (self._api.tries - 1) + [True]:
      try:
        response = await self._get_once(url, options)
      except (httpx.TransportError, httpx.InvalidURL) as error:
        told = type(error).__name__
      else:
        if response.status_code == 200:
          return response
        told = f"status {response.status_code}"
        last = last or response.status_code not in _AGAIN
      if last:
        break
      await asyncio.sleep(wait)
      wait *= 2
    raise tools.ToolError(f"no answer from the web: {told}")

  async def _get_once(self, url: str, options) -> httpx.Response:
    """Reads no more of a response than may be kept."""
    async with self._client.stream("GET", url, **options) as response:
      content = b""
      async for piece in response.aiter_bytes():
        content += piece
        if len(content) > self._api.max_bytes:
          content = content[: self._api.max_bytes]
          break
    headers = {
      name: value
      for name, value in response.headers.items()
      if name not in ("content-encoding", "content-length", "transfer-encoding")
    }
    return httpx.Response(
      response.status_code, headers=headers, content=content
    )


def text_of_html(html: str) -> str:
  """Returns the text that a page shows, one block a line."""
  reader = _Text()
  reader.feed(html)
  reader.close()
  lines = (" ".join(line.split()) for line in "".join(reader.parts).split("\n"))
  return "\n".join(line for line in lines if line)


class _Text(parser.HTMLParser):
  def __init__(self):
    super().__init__(convert_charrefs=True)
    self.parts: list[str] = []
    self._skipping = 0

  def handle_starttag(self, tag, attrs):
    del attrs
    self._skipping += tag in _SKIPPED
    self.parts += ["\n"] if tag in _BREAKS else []

  def handle_endtag(self, tag):
    self._skipping -= tag in _SKIPPED and self._skipping > 0
    self.parts += ["\n"] if tag in _BREAKS else []

  def handle_data(self, data):
    self.parts += [] if self._skipping else [data]


def _json(response: httpx.Response) -> Any:
  try:
    return response.json()
  except (ValueError, RecursionError) as error:
    raise tools.ToolError("the search service gave no JSON") from error


def _at(value: Any, path: str) -> Any:
  for name in path.split("."):
    value = value.get(name) if isinstance(value, dict) else None
  return value
