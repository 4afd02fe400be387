"""Panels in a real JupyterLab and a real Chromium: that of the first notebook, and every kind.

Set ``WORKBENCH_SCREENSHOT`` to a folder to keep the pictures that are taken on the way.
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
START, PANELS = "00_start_here.ipynb", "panels.ipynb"
# One of each kind. Among thousands of made-up candidates, none of which is small or good, a few are
# real and can be opened.
CELLS = (
    """
import warnings
from dataclasses import replace
import numpy as np, pandas as pd
from workbench import compress, data, models
from workbench.compress import QuantizeWeights, Recipe
from workbench.explore import panels
warnings.simplefilter("ignore")
task, model = data.fashion_mnist(), models.pretrained("lenet-300-100")
few = replace(task, validation=task.validation.subset(200))
rows = [panels.attempt(model, few, None)]
for bits in (2, 4, 8):
    step = QuantizeWeights(bits=bits)
    rows.append(panels.attempt(model, few, step) | {"recipe": Recipe(step).to_json()})
draw, count = np.random.default_rng(0), 5000
crowd = pd.DataFrame({
    "name": [f"candidate {i}" for i in range(count)], "technique": "made up",
    "simulated": False, "size_bytes": draw.uniform(2e5, 1e6, count),
    "score": draw.uniform(0.5, 0.8, count), "latency_ms": draw.uniform(0.1, 0.3, count),
})
frame = pd.concat([pd.DataFrame(rows), crowd], ignore_index=True)
lost = compress.sensitivity(model, few, QuantizeWeights, [2, 4, 8], progress=False)
table = panels.layer_table(model, task, lost)
""",
    "panels.Tradeoff(frame, models={'as it is': model}, task=few)",
    "panels.layer_view(model, table, lost)",
    "panels.playground(model, task, examples=200)",
)
IDLE = "Python 3 (ipykernel) | Idle"  # in the status bar
WITHIN_MS = 180_000  # the machine may be busy with the other tests


@pytest.fixture
def lab(tmp_path) -> Iterator[str]:
    """JupyterLab on a copy of the notebooks and one of panels; gives the address of notebooks."""
    root = shutil.copytree(NOTEBOOKS, tmp_path / "notebooks")
    notebook = nbformat.read(root / START, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":  # what is to be seen then was made by this run
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, root / START)
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in CELLS]
    kernel = {"kernelspec": notebook.metadata.kernelspec}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), root / PANELS)
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
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}"
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


def run_all(page, count: int = 1) -> None:
    """Run every cell in a fresh kernel, until ``count`` panels are there.

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
            panel_of(page).nth(count - 1).get_by_role("status").first.wait_for()
            page.get_by_text(IDLE).wait_for()
            return
        except TimeoutError:
            continue
    pytest.fail(f"no panel; the notebook shows:\n{page.locator('.jp-Notebook').inner_text()}")


def panel_of(page):
    return page.locator(".jp-OutputArea-output").filter(has=page.get_by_role("status"))


def opened(browser, address: str, width: int, panels: int):
    """The page of a notebook, with every cell run."""
    from playwright.sync_api import expect

    page = browser.new_page(viewport={"width": width, "height": 1000})
    page.set_default_timeout(WITHIN_MS)
    page.on("dialog", lambda dialog: dialog.accept())  # yes, leave a changed notebook
    expect.set_options(timeout=30_000)
    page.goto(address)
    run_all(page, panels)
    return page


def keep(panel, tmp_path: Path, name: str) -> None:
    """Take a picture of the panel."""
    panel.page.wait_for_timeout(500)  # until the browser has painted the picture
    path = Path(os.environ.get("WORKBENCH_SCREENSHOT") or tmp_path, f"{name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    panel.screenshot(path=path)
    assert path.stat().st_size > 10_000


def test_panel_answers_to_keyboard_and_mouse(lab, browser, tmp_path):
    from playwright.sync_api import expect

    page = opened(browser, lab.format(START), 1280, 1)
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
    keep(panel, tmp_path, "start")

    click_at(page, size, 1.0)  # any size again
    expect(answer).to_have_text(before)


@pytest.mark.parametrize("width", [1280, 800])
def test_every_kind_of_panel_answers_to_keyboard_and_mouse(lab, browser, tmp_path, width):
    page = opened(browser, lab.format(PANELS), width, 3)
    tradeoff, layers, playground = panel_of(page).all()
    narrow_the_tradeoff(page, tradeoff, tmp_path, width)
    look_at_a_layer(page, layers, tmp_path, width)
    play(page, playground, tmp_path, width)
    for panel in (tradeoff, layers, playground):
        assert reach_out(panel) == []
    open_a_candidate(page, tradeoff, tmp_path, width)


def narrow_the_tradeoff(page, panel, tmp_path, width) -> None:
    """Fifty moves by keyboard come to few drawings; so does a click."""
    from playwright.sync_api import expect

    answer, picture = panel.get_by_role("status").first, panel.locator("img").first
    before = answer.inner_text()
    size = panel.locator(".widget-hslider").filter(has_text="Size at most")
    size.scroll_into_view_if_needed()
    drawings = watch(picture)
    size.locator(".noUi-handle").focus()
    for _ in range(25):
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowDown")
    expect(answer).not_to_have_text(before)
    expect(answer).to_contain_text("simulated candidates have no speed")
    page.wait_for_timeout(1500)  # for whatever else might be drawn
    assert 1 <= drawings() <= 15
    click_at(page, size, 0.55)
    expect(answer).to_contain_text("remain.")
    keep(panel, tmp_path, f"tradeoff-{width}")


def open_a_candidate(page, panel, tmp_path, width) -> None:
    """The smallest: another is chosen from the list, its code read, its bytes opened by keyboard.

    JupyterLab takes arrow keys away from a list that is closed, to move between cells.
    """
    from playwright.sync_api import expect

    panel.get_by_label("Find the").select_option("smallest")
    expect(panel.get_by_label("Look at")).to_have_value("QuantizeWeights(bits=2)")
    code = panel.locator("pre")
    expect(code).to_contain_text("QuantizeWeights(bits=2)")
    panel.get_by_label("Look at").select_option(index=1)
    expect(code).not_to_contain_text("bits=2")
    expect(code).to_contain_text("QuantizeWeights")
    panel.get_by_label("Look at").focus()
    page.keyboard.press("Tab")  # to the button
    page.keyboard.press("Enter")
    expect(panel).to_contain_text("answers are the same")
    expect(panel.locator("img").nth(1)).to_be_visible()
    assert reach_out(panel) == []
    keep(panel, tmp_path, f"opened-{width}")


def look_at_a_layer(page, panel, tmp_path, width) -> None:
    from playwright.sync_api import expect

    answer, picture = panel.get_by_role("status"), panel.locator("img")
    before, drawn = answer.inner_text(), picture.get_attribute("src")
    chosen = panel.get_by_label("Layer")
    chosen.scroll_into_view_if_needed()
    chosen.select_option(index=1)
    expect(answer).not_to_have_text(before)
    expect(picture).not_to_have_attribute("src", drawn)
    chosen.select_option(index=0)
    expect(answer).to_have_text(before)
    keep(panel, tmp_path, f"layer-{width}")


def play(page, panel, tmp_path, width) -> None:
    from playwright.sync_api import expect

    answer = panel.get_by_role("status")
    panel.get_by_label("Technique").select_option("prune weights")
    expect(answer).to_contain_text("Prune(sparsity=0.3)")
    setting = panel.locator(".widget-hslider").filter(has_text="Setting")
    setting.locator(".noUi-handle").focus()
    page.keyboard.press("End")
    expect(answer).to_contain_text("Prune(sparsity=0.95)")
    click_at(page, setting, 0.4)
    expect(answer).to_contain_text("Prune(sparsity=0.7)")
    keep(panel, tmp_path, f"playground-{width}")


def watch(picture):
    """A function that tells how often the picture has changed since."""
    picture.evaluate(
        """image => {
            image.drawings = 0
            const count = () => { image.drawings += 1 }
            new MutationObserver(count).observe(image, {attributeFilter: ["src"]})
        }"""
    )
    return lambda: picture.evaluate("image => image.drawings")


def reach_out(panel) -> list[str]:
    """What reaches out of the panel to the right."""
    return panel.evaluate(
        """panel => {
            const right = panel.getBoundingClientRect().right + 5  // widgets have margins
            const parts = [...panel.querySelectorAll("img, select, button, .noUi-base, pre, p")]
            const out = parts.filter(part => part.getBoundingClientRect().right > right)
            return out.map(part => part.outerHTML.slice(0, 200))
        }"""
    )


def click_at(page, slider, share: float) -> None:
    """Click with the mouse at this share of a slider's length."""
    slider.scroll_into_view_if_needed()
    bar = slider.locator(".noUi-base").bounding_box()
    page.mouse.click(bar["x"] + share * (bar["width"] - 1), bar["y"] + bar["height"] / 2)
