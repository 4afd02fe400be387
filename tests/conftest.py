"""What several test files share."""

import os
import shutil
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from workbench import data

# Shared machines are slow at times, and a build should not fail on luck.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture
def blobs() -> data.Task:
    """Three clouds of points in the plane, which any classifier learns in a moment."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 4.0], [4.0, 0.0], [-4.0, -4.0]])
    y = torch.randint(0, 3, (600,), generator=generator)
    x = centres[y] + torch.randn(600, 2, generator=generator)
    return data.task(train=(x[:400], y[:400]), test=(x[400:], y[400:]))


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
