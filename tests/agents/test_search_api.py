"""The HTTP source against a server on this machine."""

import asyncio
import contextlib
import http.server
import json
import threading
import urllib.parse

import pytest

from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.environments import search
from dsv32_jax.agents.environments import search_api

PAGE = """<html><head><title>x</title><style>p {color: red}</style></head>
<body><h1>Bulbs</h1><script>alert(1)</script><p>A bulb &amp; more <b>glows</b>.
</p><div>Second block</div></body></html>"""


class Service(http.server.BaseHTTPRequestHandler):
  """Pages of twelve hits, and pages that misbehave."""

  def do_GET(self):
    parts = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(parts.query))
    self.server.seen.append((parts.path, query, dict(self.headers)))
    getattr(self, parts.path.strip("/").partition("/")[0])(query)

  def search(self, query):
    here = f"http://127.0.0.1:{self.server.server_port}"
    kinds = ["page", "binary", "gone", "huge"]
    rows = [
      {"url": f"{here}/{kinds[n % 4]}/{n}", "title": f"T{n}", "snippet": "s"}
      for n in range(12)
    ]
    rows = [*rows[:1], {"title": "no address"}, "no row", *rows[1:]]
    first, count = int(query["offset"]), int(query["count"])
    rows = rows[first : first + count]
    self.answer(json.dumps({"web": {"results": rows}}).encode())

  def page(self, query):
    self.answer(PAGE.encode(), "text/html; charset=utf-8")

  def binary(self, query):
    self.answer(b"\x89PNG", "image/png")

  def gone(self, query):
    self.send_error(404)

  def huge(self, query):
    self.answer(b"x" * 5_000_000, "text/plain")

  def flaky(self, query):
    if self.server.failures:
      self.server.failures -= 1
      self.send_error(503)
    else:
      self.search(query)

  def broken(self, query):
    self.answer(b"[" * 100_000)

  def list(self, query):
    self.answer(b"[1, 2]")

  def answer(self, content, kind="application/json"):
    self.send_response(200)
    self.send_header("Content-Type", kind)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    with contextlib.suppress(OSError):  # whoever asked has read enough
      self.wfile.write(content)

  def log_message(self, *unused):
    """Keeps the tests quiet."""


@pytest.fixture(scope="module")
def server():
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
    server.seen, server.failures = [], 0
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def address(server, path="search"):
  return f"http://127.0.0.1:{server.server_port}/{path}"


def use(server, run, path="search", **options):
  options = {"hits_path": "web.results", "headers": {"X-Key": "k"}} | options
  api = search_api.SearchApi(url=address(server, path), **options)

  async def within():
    async with search_api.HttpSource(api, seconds=5, wait=0.01) as source:
      return await run(source)

  return asyncio.run(within())


def test_hits_come_as_configured(server):
  hits = use(server, lambda s: s.search("a bulb", offset=0, count=5))
  assert [hit.title for hit in hits] == ["T0", "T1", "T2"]
  assert hits[0].name == address(server, "page/0")
  _, query, headers = server.seen[-1]
  assert query == {"q": "a bulb", "offset": "0", "count": "5"}
  assert headers["X-Key"] == "k"


def test_a_page_is_its_text_and_gets_no_key(server):
  async def run(source):
    hits = await source.search("x", offset=0, count=5)
    return await source.open(hits[0].name)

  document = use(server, run)
  assert document.title == "T0"
  assert document.text == "x\nBulbs\nA bulb & more glows.\nSecond block"
  path, _, headers = server.seen[-1]
  assert path == "/page/0" and "X-Key" not in headers


@pytest.mark.parametrize(
  ("number", "told"), [(1, "image/png, not text"), (2, "status 404")]
)
def test_pages_that_cannot_be_read(server, number, told):
  async def run(source):
    hits = await source.search("x", offset=0, count=8)
    await source.open(hits[number].name)

  with pytest.raises(tools.ToolError, match=told):
    use(server, run)


def test_a_huge_page_is_cut(server):
  async def run(source):
    hits = await source.search("x", offset=0, count=8)
    return await source.open(hits[3].name)

  assert len(use(server, run, max_bytes=70_000).text) == 70_000


def test_only_returned_addresses_are_fetched(server):
  before = len(server.seen)
  for name in (address(server, "page/9"), "file:///etc/passwd", "x"):
    with pytest.raises(tools.ToolError, match="no search has returned"):
      use(server, lambda s, name=name: s.open(name))
  assert len(server.seen) == before


def test_a_service_that_fails_is_asked_again(server):
  server.failures = 2
  run = lambda s: s.search("x", offset=0, count=3)
  assert len(use(server, run, "flaky")) == 1
  server.failures = 3
  with pytest.raises(tools.ToolError, match="status 503"):
    use(server, run, "flaky")
  assert server.failures == 0


@pytest.mark.parametrize(
  ("path", "told"),
  [("broken", "no JSON"), ("list", "no list of hits"), ("gone", "status 404")],
)
def test_a_service_that_answers_wrongly(server, path, told):
  with pytest.raises(tools.ToolError, match=told):
    use(server, lambda s: s.search("x", offset=0, count=3), path)


def test_nobody_there():
  api = search_api.SearchApi(url="http://127.0.0.1:9/", tries=2)

  async def run():
    async with search_api.HttpSource(api, wait=0.01) as source:
      await source.search("x", offset=0, count=1)

  with pytest.raises(tools.ToolError, match="no answer from the web"):
    asyncio.run(run())
  with pytest.raises(ValueError, match="url='ftp://x' must begin"):
    search_api.SearchApi(url="ftp://x")
  assert "k3y" not in repr(
    search_api.SearchApi(url="http://x", headers={"Key": "k3y"})
  )


def test_the_environment_over_the_service(server):
  task = {"id": "t", "question": "What glows?", "answer": "a bulb"}

  async def run(source):
    environment = search.SearchEnvironment(source, task)
    await environment.reset()
    told = []
    for name, arguments in [
      ("search", {"query": "glow", "page": 1}),
      ("find", {"document": address(server, "page/0"), "text": "glows"}),
      ("open", {"document": "http://127.0.0.1/other"}),
      ("submit_result", {"answer_text": "A bulb."}),
    ]:
      call = protocol.ToolCall(name=name, arguments=arguments)
      told.append((await environment.step(call)).observation)
    return told, await environment.verify()

  told, reward = use(server, run)
  assert reward == 1.0
  assert told[1].endswith("page 1: A bulb & more glows.")
  assert told[2].startswith("error: no search has returned")
