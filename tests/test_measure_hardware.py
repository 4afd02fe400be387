"""The card of the machine: what it says, and what it keeps to itself."""

import getpass
import platform
from pathlib import Path

import psutil
import torch

from workbench.measure import hardware


def test_it_describes_this_machine():
    card = hardware()
    assert card.logical_cores == psutil.cpu_count()
    assert card.memory_bytes == psutil.virtual_memory().total
    assert card.python == platform.python_version()
    assert dict(card.libraries)["torch"] == torch.__version__
    assert bool(card.gpu) == torch.cuda.is_available()


def test_vector_extensions_agree_with_torch():
    able = torch.cpu.get_capabilities()
    names = hardware().vector_extensions
    assert ("AVX2" in names) == bool(able.get("avx2"))
    assert ("AVX-512 VNNI" in names) == bool(able.get("avx512_vnni"))
    assert ("NEON" in names) == bool(able.get("neon"))


def test_it_prints_and_shows_the_same():
    card = hardware()
    for text in card.rows().values():
        assert text in str(card)
    table = card._repr_html_()
    assert table.count("<tr>") == len(card.rows())
    assert card.processor in table


def test_it_tells_nothing_about_whose_machine_it_is():
    text = str(hardware()) + hardware()._repr_html_()
    assert platform.node() not in text or not platform.node()
    assert str(Path.home()) not in text
    assert f"/{getpass.getuser()}" not in text
