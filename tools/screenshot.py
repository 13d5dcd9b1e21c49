"""Takes the picture of the page that the README opens with: python tools/screenshot.py [EXAMPLE]

It starts app.py with the export that comes with the repository, clicks one of its examples and writes docs/app.png. Needs
Playwright (requirements-dev.txt) and a chromium on the PATH.
"""

import io
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
WIDTH, HEIGHT = 1180, 850


def main(example: str = "frog") -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, ROOT / "app.py", "--export", ROOT / "exports" / "cifar10", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for _ in range(2):  # the second line says that it serves
            server.stdout.readline()
        picture = photograph(f"http://127.0.0.1:{port}/?__theme=light", example)
    finally:
        server.terminate()
        server.wait()
    picture.save(ROOT / "docs" / "app.png", optimize=True)


def photograph(address: str, example: str) -> Image.Image:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(address)
        page.locator("#examples").get_by_role("button", name=example).click()
        page.locator(".views img").nth(1).wait_for()
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)  # for what fades
        data = page.screenshot()
        browser.close()
    return Image.open(io.BytesIO(data)).convert("RGB")


if __name__ == "__main__":
    main(*sys.argv[1:])
