"""A web server that misbehaves, and what a page must not do."""

import http.server
import threading
from pathlib import Path


class MisbehavingServer:
    """A real HTTP server on this machine. `files` maps paths to bytes; the first folder of a path says how it is served:

    /stall/… sends half and then nothing, /pause/… takes a break there, /cut/… hangs up there, /crawl/… sends very slowly,
    /lie/… announces another length, /long/… sends more than it should, /flip/… changes a byte, /noranges/… ignores
    ranges, /html/… redirects to a page, /shift/… sends another range than was asked for, /404/… and any other number
    answers with it.
    """

    def __init__(self):
        self.files, self.requests = {}, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append((self.path, self.headers.get("Range")))
                outer.serve(self)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # clients hang up on purpose
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.stopped = threading.Event()
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def serve(self, handler):
        manner, _, name = handler.path.strip("/").rpartition("/")
        if handler.path == "/page":
            return self.answer(handler, 200, b"<html>Sign in to the network</html>", {"Content-Type": "text/html"})
        if manner == "html":
            return self.answer(handler, 302, b"", {"Location": "/page"})
        if manner.isdigit():
            return self.answer(handler, int(manner), b"", {})
        body, status, headers = self.files["/" + name], 200, {"Content-Type": "application/gzip"}
        size, asked = len(body), handler.headers.get("Range")
        if manner == "flip":
            body = body[:100] + bytes([body[100] ^ 1]) + body[101:]
        if asked and manner != "noranges":
            start = int(asked.removeprefix("bytes=").removesuffix("-")) + (manner == "shift")
            body, status = body[start:], 206
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        if manner == "long":
            body += b"more"  # without a word on its length
        else:
            headers["Content-Length"] = str(len(body) + (manner == "lie"))
        self.answer(handler, status, body, headers, manner)

    def answer(self, handler, status, body, headers, manner=""):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        if manner == "crawl":
            for place in range(0, len(body), 2000):
                handler.wfile.write(body[place : place + 2000])
                if self.stopped.wait(0.1):
                    return
        elif manner in ("stall", "cut", "pause"):
            handler.wfile.write(body[: len(body) // 2])
            if manner == "stall":
                self.stopped.wait(30)
            if manner == "pause":
                self.stopped.wait(1.5)
                handler.wfile.write(body[len(body) // 2 :])
        else:
            handler.wfile.write(body)

    def close(self):
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()


def assert_opens_by_itself(browser, path: Path, n_pictures: int) -> None:
    """A page shows all its pictures, wide and narrow, with nothing over the edge, on the console or asked of a server."""
    requests, errors = [], []
    for width in (1000, 360):
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(path.as_uri())
        loaded = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 100)")
        assert len(loaded) == n_pictures and all(loaded)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing runs over the edge"
        page.close()
    assert not errors and all(url.startswith(("file:", "data:")) for url in requests)
