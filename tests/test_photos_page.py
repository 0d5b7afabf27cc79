"""The page examples/photos.html in a real browser: it uploads by a form with progress, and shows an image and a video.

The page has another origin than the API, and than the S3 server, so that CORS is part of the tests. The browser reaches
the server that it sends files to through a slow network, and so by another address than the app reaches S3.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
from typing_extensions import override

from infra.components.bucket import DOWNLOAD_HEADERS, UPLOAD_HEADERS
from tests.chromium import browser
from tests.conftest import Server
from tests.services import BUCKET, S3Server
from tests.tcp_proxy import TcpProxy
from tests.test_browser import Site

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "examples/photos.html").read_text()
DRIVER = """<script>
const until = async (what, condition) => {
  for (let left = 400; left > 0; left--) {
    if (condition()) return;
    await new Promise(done => setTimeout(done, 50));
  }
  throw new Error(`${what} did not happen: ${window.message.value}`);
};
const pick = (name, file) => {
  const files = new DataTransfer();
  files.items.add(file);
  document.querySelector(`[name=${name}]`).files = files.files;
};

async function drawn() {
  const canvas = document.createElement("canvas");
  canvas.width = 64; canvas.height = 48;
  const context = canvas.getContext("2d"), pixels = context.createImageData(64, 48);
  crypto.getRandomValues(pixels.data);
  context.putImageData(pixels, 0, 0);
  const png = await new Promise(done => canvas.toBlob(done, "image/png"));
  const recorder = new MediaRecorder(canvas.captureStream(10), {mimeType: "video/webm"}), parts = [];
  recorder.ondataavailable = event => parts.push(event.data);
  recorder.start();
  for (let shown = 0; shown < 10; shown++) {
    context.fillRect(shown, shown, 9, 9);
    await new Promise(done => setTimeout(done, 100));
  }
  await new Promise(done => { recorder.onstop = done; recorder.stop(); });
  return [new File([png], "Sonne ☀.png", {type: "image/png"}), new File(parts, "sun.webm", {type: "video/webm"})];
}

(async () => {
  const seen = {};
  try {
    const [image, clip] = await drawn();
    // A larger file has several events of progress. What follows the frames of a WebM is ignored.
    const video = new File([clip, new Uint8Array(12_000_000)], clip.name, {type: clip.type});
    document.querySelector("[name=title]").value = "Sun";
    pick("image", image);
    pick("video", video);
    const steps = [];
    const open = XMLHttpRequest.prototype.open;
    XMLHttpRequest.prototype.open = function (method, url) {
      this.upload.addEventListener("progress", event => steps.push([method, url, event.loaded, event.total]));
      return open.call(this, method, url);
    };
    document.querySelector("button").click();
    await until("the upload", () => window.message.value);
    await until("the image", () => window.image.naturalWidth);
    await until("the video", () => window.video.videoWidth);
    const range = await fetch(window.video.src, {headers: {range: "bytes=1000-1999"}});
    const bytes = new Uint8Array(await range.arrayBuffer());
    const expected = new Uint8Array(await video.slice(1000, 2000).arrayBuffer());
    Object.assign(seen, {
      message: window.message.value, bar: window.progress.value,
      steps: steps.filter(step => step[3] >= video.size), size: video.size,
      image: [window.image.naturalWidth, window.image.naturalHeight, window.image.src],
      video: [window.video.videoWidth, window.video.videoHeight],
      range: [range.status, range.headers.get("content-range"), range.headers.get("content-type")],
      same: bytes.length === 1000 && bytes.every((byte, at) => byte === expected[at]),
    });
  } catch (error) { seen.error = String(error); }
  await fetch("/report", {method: "POST", body: JSON.stringify(seen)});
})();
</script>"""


class SlowNetwork(TcpProxy):
    """Passes on requests slowly, so that the browser reports the progress of a large one several times."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)

    @override
    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        if answers:
            super()._pump(source, sink, answers)
            return
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
                time.sleep(0.005)
            sink.shutdown(socket.SHUT_WR)


def allow_pages(server: S3Server, origin: str) -> None:
    """Give the bucket the CORS rule that a stack's bucket has for this origin."""
    client = boto3.client(
        "s3",
        endpoint_url=server.url,
        aws_access_key_id=server.access_key_id,
        aws_secret_access_key=server.secret_access_key,
        region_name="us-east-1",
    )
    rule = {
        "AllowedOrigins": [origin],
        "AllowedMethods": ["GET", "HEAD", "PUT"],
        "AllowedHeaders": UPLOAD_HEADERS,
        "ExposeHeaders": DOWNLOAD_HEADERS,
    }
    client.put_bucket_cors(Bucket=BUCKET, CORSConfiguration={"CORSRules": [rule]})


@pytest.mark.parametrize("storage", ["disk", "s3-sqlite"])
def test_the_page_uploads_and_shows_an_image_and_a_video(
    serve: Callable[..., Server], tmp_path: Path, storage: str, request: pytest.FixtureRequest
):
    with contextlib.ExitStack() as stack:
        site = stack.enter_context(Site(PAGE + DRIVER))
        origin = f"http://localhost:{site.port}"
        if storage == "disk":
            server = serve(storage, tmp_path, module="examples.photos")
            api = files = stack.enter_context(SlowNetwork(server.url)).url
        else:
            s3: S3Server = request.getfixturevalue("seaweed_s3")
            files = stack.enter_context(SlowNetwork(s3.url)).url
            allow_pages(s3, origin)
            environment = {"CRUDSTACK_S3_PUBLIC_URL": files}
            api = serve(
                storage, tmp_path, s3=s3, prefix=tmp_path.name, environment=environment, module="examples.photos"
            ).url
        said = stack.enter_context(browser(f"{origin}/?api={api}", "--autoplay-policy=no-user-gesture-required"))
        seen = site.reported()
        console = said.read_text(errors="replace")
    assert "error" not in seen, f"{seen['error']}\n{console[-3000:]}"
    assert seen["message"].startswith("Created /photo/")
    method, url = ("POST", f"{api}/photo/blobs") if storage == "disk" else ("PUT", f"{files}/{BUCKET}/")
    assert {step[0] for step in seen["steps"]} == {method}
    assert all(step[1].startswith(url) for step in seen["steps"])
    loaded = [step[2] for step in seen["steps"]]
    assert loaded == sorted(loaded)
    assert len(set(loaded)) >= 3, "the upload is reported in steps"
    assert seen["bar"] == 1
    assert seen["image"][:2] == [64, 48]
    assert seen["image"][2].startswith(f"{files}/")
    assert seen["video"] == [64, 48]
    assert seen["range"] == [206, f"bytes 1000-1999/{seen['size']}", "video/webm"]
    assert seen["same"] is True
