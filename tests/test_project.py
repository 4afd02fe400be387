"""What must agree between the files that say the same thing, and what none of them may say."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import workbench

ROOT = Path(__file__).parents[1]


def text(name: str) -> str:
    return (ROOT / name).read_text()


def pins(lines: list[str]) -> dict[str, str]:
    """Package -> version, of lines such as ``torch==2.13.0``; anything else is an error."""
    found = {}
    for line in lines:
        name, version = re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups()
        found[canonicalize_name(name)] = version
    return found


def project() -> dict:
    return tomllib.loads(text("pyproject.toml"))["project"]


def direct() -> dict[str, str]:
    """What `make lab` and `make test` need, from pyproject.toml: the extra [test] names others."""
    extras = project()["optional-dependencies"]
    lines = project()["dependencies"] + extras["test"]
    own = [line for line in lines if line.startswith("workbench[")]
    names = [name for line in own for name in line[len("workbench[") : -1].split(",")]
    more = [line for name in names for line in extras[name]]
    return pins([line for line in lines if line not in own] + more)


def locked() -> dict[str, str]:
    return pins([line for line in text("requirements.lock").splitlines() if line[0] != "#"])


def conda_lines() -> list[str]:
    """The lines of environment.yml that pip installs, with their comments."""
    return re.findall(r"^ {6}- (.*)$", text("environment.yml"), re.MULTILINE)


def tracked() -> list[Path]:
    """Every file that git knows; others come and go while notebooks run beside this."""
    command = ["git", "ls-files"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in names.splitlines() if (ROOT / name).is_file()]


def test_lock_holds_every_direct_dependency_at_its_version():
    assert direct().items() <= locked().items()


def test_lock_is_sorted_and_says_how_it_is_made():
    lines = text("requirements.lock").splitlines()
    assert "make lock" in lines[0]
    packages = [line for line in lines if line[0] != "#"]
    assert packages == sorted(packages)


def test_lock_is_what_is_installed_and_complete():
    """Whatever a locked package needs is locked as well, in a version it accepts."""
    from importlib.metadata import PackageNotFoundError, requires

    versions = locked()
    for package in versions:
        try:
            needs = [Requirement(line) for line in requires(package) or []]
        except PackageNotFoundError:  # of another platform
            continue
        for need in needs:
            name = canonicalize_name(need.name)
            gpu = name.startswith(("nvidia-", "cuda-", "triton"))
            if gpu or (need.marker and not need.marker.evaluate({"extra": ""})):
                continue
            assert need.specifier.contains(versions[name], prereleases=True), f"{package}: {need}"


def test_conda_environment_has_the_same_versions():
    packages = [line.split("#")[0].strip() for line in conda_lines()]
    assert packages.pop() == "-e ."
    assert pins(packages) == direct()
    assert packages[0].startswith("torch==")  # so that nothing pulls another build of it


def test_every_dependency_says_who_needs_it():
    assert all(re.search(r" # \w", line) for line in conda_lines())
    lines = [line for line in text("pyproject.toml").splitlines() if re.match(r' +"[\w-]+==', line)]
    assert len(lines) > len(direct())  # those of the other extras too
    assert all(re.search(r", +# \w", line) for line in lines)


@pytest.mark.parametrize("name", ["requirements.lock", "environment.yml"])
def test_versions_come_from_no_named_index(name):
    assert not re.search(r"https?:|file:|--|\bindex", text(name))


def test_no_file_names_a_machine_or_an_index():
    forbidden = re.compile(r"--(extra-)?index-url|/roo[t]/|/home/\w|/Users/\w|file:///\w|proxy=")
    for path in tracked():
        if path == Path(__file__) or path.suffix in {".gz", ".xz", ".safetensors", ".png", ".jpg"}:
            continue
        content = path.read_text()
        assert not forbidden.search(content), path
        assert str(ROOT) not in content, path


def test_notebooks_are_small():
    for path in tracked():
        assert path.suffix != ".ipynb" or path.stat().st_size < 500_000, path


def test_ci_runs_the_command_of_the_readme():
    assert text(".ci/run").rstrip().endswith("\nmake test")
    assert (ROOT / ".ci/run").stat().st_mode & 0o100
    assert ".ci/run" in text(".github/workflows/test.yml")


@pytest.mark.parametrize("command", ["make lab", "make test"])
def test_readme_gives_the_commands(command):
    assert command in text("README.md")


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)", text("README.md"))
    assert len(links) > 5
    for link in links:
        assert (ROOT / link).exists(), link


def test_make_help_names_every_target():
    targets = re.search(r"^\.PHONY: (.*)$", text("Makefile"), re.MULTILINE)[1].split()
    command = ["make", "--no-print-directory", "help"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    shown = subprocess.run(command, cwd=ROOT, env=alone, check=True, capture_output=True, text=True)
    assert [line.split()[0] for line in shown.stdout.splitlines()] == targets


def test_one_version_everywhere():
    changelog = re.search(r"^## \[(\d[\w.]*)\] - (\S+)", text("CHANGELOG.md"), re.MULTILINE)
    assert changelog[1] == workbench.__version__
    assert f"version: {changelog[1]}\ndate-released: {changelog[2]}" in text("CITATION.cff")
