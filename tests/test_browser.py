"""The first notebook and its panel, in a real JupyterLab and a real Chromium.

Set ``WORKBENCH_SCREENSHOT`` to a path to keep the picture of the panel that is taken on the way.
"""

import os
import secrets
import shutil
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
START = "00_start_here.ipynb"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
IDLE = "Python 3 (ipykernel) | Idle"  # in the status bar
WITHIN_MS = 180_000  # the machine may be busy with the other tests


@pytest.fixture
def browser() -> Iterator:
    """A headless Chromium. Where it is missing the test is skipped, but fails on CI."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        absent('playwright is not installed: pip install -e ".[test]"')
    if CHROMIUM is None:
        absent("Chromium is not installed: apt-get install chromium, or set CHROMIUM to its path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


def absent(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def lab(tmp_path) -> Iterator[str]:
    """JupyterLab on a copy of the notebooks; gives the address that opens the first one."""
    root = shutil.copytree(NOTEBOOKS, tmp_path / "notebooks")
    notebook = nbformat.read(root / START, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":  # what is to be seen then was made by this run
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, root / START)
    # Cells out of sight are laid out too: what is not has no size, and counts as not there.
    settings = tmp_path / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
        "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        f"--LabApp.workspaces_dir={tmp_path / 'workspaces'}",
        f"--LabApp.user_settings_dir={tmp_path / 'settings'}",
    ]  # fmt: skip
    log = tmp_path / "lab.log"
    with log.open("w") as output:
        server = psutil.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, log)
        yield f"http://127.0.0.1:{port}/lab/tree/{START}?token={token}"
    finally:
        stop(server)


def wait_for(address: str, server: psutil.Popen, log: Path) -> None:
    deadline = time.monotonic() + WITHIN_MS / 1000
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


def stop(server: psutil.Popen) -> None:
    """End the server, and whatever of its kernels outlives it."""
    family = [server, *server.children(recursive=True)] if server.is_running() else [server]
    server.terminate()  # asks; the server then ends its kernels
    _, alive = psutil.wait_procs(family, timeout=15)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=5)


def run_all(page) -> None:
    """Run every cell in a fresh kernel, until the panel is there.

    While the page still loads, it has cells already, and an indicator that says idle; what is
    clicked then is lost. Only the status bar tells. Messages of the kernel can be lost as well
    while the machine is busy: loaded again, the page starts over.
    """
    from playwright.sync_api import TimeoutError

    for attempt in range(4):
        if attempt:
            page.reload()
        try:
            page.get_by_text(IDLE).wait_for()
            page.get_by_role("menuitem", name="Kernel", exact=True).click()
            page.get_by_text("Restart Kernel and Run All Cells…", exact=True).click()
            page.locator(".jp-Dialog .jp-mod-accept").click()
            prompt = page.locator(".jp-InputArea-prompt")
            prompt.get_by_text("[*]:").or_(prompt.get_by_text("[1]:")).first.wait_for(
                timeout=20_000
            )
            panel_of(page).get_by_role("status").wait_for()
            page.get_by_text(IDLE).wait_for()
            return
        except TimeoutError:
            continue
    pytest.fail(f"no panel; the notebook shows:\n{page.locator('.jp-Notebook').inner_text()}")


def panel_of(page):
    return page.locator(".jp-OutputArea-output").filter(has=page.get_by_role("status"))


def test_panel_answers_to_keyboard_and_mouse(lab, browser, tmp_path):
    from playwright.sync_api import expect

    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(WITHIN_MS)
    page.on("dialog", lambda dialog: dialog.accept())  # yes, leave a changed notebook
    expect.set_options(timeout=30_000)
    page.goto(lab)
    run_all(page)

    panel = panel_of(page)
    answer, picture = panel.get_by_role("status"), panel.locator("img")
    expect(answer).to_contain_text("remain")
    before, drawn = answer.inner_text(), picture.get_attribute("src")
    winner = panel.locator("b").inner_text()
    assert winner in before

    size = panel.locator(".widget-hslider").filter(has_text="Size at most")
    size.scroll_into_view_if_needed()
    size.locator(".noUi-handle").focus()
    page.keyboard.press("Home")  # at most the smallest size
    expect(answer).not_to_have_text(before)
    expect(picture).not_to_have_attribute("src", drawn)

    smallest, narrowed = answer.inner_text(), picture.get_attribute("src")
    click_at(page, size, 0.6)  # some candidates fit, some do not
    expect(answer).not_to_have_text(smallest)
    expect(picture).not_to_have_attribute("src", narrowed)
    page.wait_for_timeout(500)  # until the browser has painted the picture
    path = Path(os.environ.get("WORKBENCH_SCREENSHOT") or tmp_path / "panel.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    panel.screenshot(path=path)
    assert path.stat().st_size > 10_000

    click_at(page, size, 1.0)  # any size again
    expect(answer).to_have_text(before)


def click_at(page, slider, share: float) -> None:
    """Click with the mouse at this share of a slider's length."""
    slider.scroll_into_view_if_needed()
    bar = slider.locator(".noUi-base").bounding_box()
    page.mouse.click(bar["x"] + share * (bar["width"] - 1), bar["y"] + bar["height"] / 2)
