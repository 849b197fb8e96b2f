"""A page served by a process of its own, and a browser."""

import os
import shutil
import socket
import subprocess
import sys
import time
from urllib.request import urlopen

import pytest


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def serve(tmp_path_factory):
    """Start commands that serve a page, and end them with the tests. BROWSER keeps a window from being opened."""
    pytest.importorskip("gradio", reason='the page needs Gradio: pip install "ddim-plugin[demo]"')
    running, logs = [], {}

    def start(*command, cwd=None, env=None):
        port, log = free_port(), tmp_path_factory.mktemp("served") / "log.txt"
        ours = {
            "OMP_NUM_THREADS": "1",
            "BROWSER": "true %s",
            "GRADIO_SERVER_PORT": str(port),
            "GRADIO_TEMP_DIR": str(log.parent),
        }
        command = [sys.executable, *(str(port) if each == "PORT" else str(each) for each in command)]
        with log.open("w") as file:
            child = subprocess.Popen(command, cwd=cwd, env=(env or os.environ) | ours, stdout=file, stderr=file)
        running.append(child)
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while time.monotonic() < until and child.poll() is None:
            try:
                urlopen(url, timeout=10).close()
                logs[url] = log
                return url
            except OSError:
                time.sleep(0.1)
        raise AssertionError(f"no page at {url}: {log.read_text()}")

    start.log = lambda url: logs[url].read_text()
    yield start
    for child in running:
        child.terminate()
    for child in running:
        child.wait(30)


@pytest.fixture(scope="session")
def browser():
    """A Chromium of this machine, without a window."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium is installed")
    with api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()
