"""What several test files share."""

import pytest
import torch
from hypothesis import settings

from workbench import data

# Shared machines are slow at times, and a build should not fail on luck.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture
def blobs() -> data.Task:
    """Three clouds of points in the plane, which any classifier learns in a moment."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 4.0], [4.0, 0.0], [-4.0, -4.0]])
    y = torch.randint(0, 3, (600,), generator=generator)
    x = centres[y] + torch.randn(600, 2, generator=generator)
    return data.task(train=(x[:400], y[:400]), test=(x[400:], y[400:]))
