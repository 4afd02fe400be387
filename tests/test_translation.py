"""What the Chinese README and the glossary must share with the English README and the series."""

import re
from pathlib import Path

import nbformat
import pytest

from workbench.explore import blocks

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE, GLOSSARY = (
    ROOT / name for name in ("README.md", "README.zh-CN.md", "docs/glossary.md")
)
GENERATED = re.findall(r"<!-- end of (\w+) -->", ENGLISH.read_text("utf-8"))
BETWEEN = {"README.md", "README.zh-CN.md", "docs/glossary.md"}  # from one language to the other
HAN = r"[\u4e00-\u9fff]"


def prose(path: Path) -> str:
    """A page without what is generated, and which is the same in both languages."""
    return re.sub(r"<!-- (\w+) -->.*?<!-- end of \1 -->", "", path.read_text("utf-8"), flags=re.S)


def code(text: str) -> list[str]:
    """Fenced blocks without their comments."""
    found = re.findall(r"^```.*?^```", text, re.S | re.M)
    return [re.sub(r" +# .*", "", block) for block in found]


def sections(path: Path) -> list[str]:
    """The page from heading to heading, without fenced code."""
    return re.split(r"^## ", re.sub(r"^```.*?^```", "", prose(path), flags=re.S | re.M), flags=re.M)


def links(text: str) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)]+)\)", text) if link not in BETWEEN]


def spans(text: str) -> list[str]:
    return re.findall(r"`[^`]+`", text)


def numbers(text: str) -> list[str]:
    """Numbers as they are written, in words and names too."""
    return re.findall(r"\d[\d,.]*(?<![,.])", text)


def tables(text: str) -> list[list[list[str]]]:
    """Every table as rows of cells."""
    return [
        [
            row.strip("| ").split(" | ")
            for row in table.splitlines()
            if not re.match(r"\|[-| ]+$", row)
        ]
        for table in re.findall(r"(?:^\|.*\|$\n?)+", text, re.M)
    ]


PAIRS = list(zip(sections(ENGLISH), sections(CHINESE), strict=False))
each_section = pytest.mark.parametrize(
    ("english", "chinese"), PAIRS, ids=[pair[0].split("\n")[0].strip("# ") for pair in PAIRS]
)


def test_the_readmes_have_the_same_sections():
    assert len(sections(ENGLISH)) == len(sections(CHINESE)) > 5


def test_the_readmes_have_the_same_commands_and_code():
    assert code(prose(ENGLISH)) == code(prose(CHINESE))
    assert len(code(prose(ENGLISH))) > 5


@pytest.mark.parametrize("name", GENERATED)
def test_generated_tables_are_the_same(name):
    assert blocks.read(ENGLISH, name) == blocks.read(CHINESE, name)


def test_there_is_a_generated_table():
    assert "comparison" in GENERATED
    assert re.findall(r"<!-- end of (\w+) -->", CHINESE.read_text("utf-8")) == GENERATED


@each_section
def test_links_are_the_same(english, chinese):
    assert links(english) == links(chinese)


@each_section
def test_names_of_the_code_are_the_same(english, chinese):
    assert sorted(spans(english)) == sorted(spans(chinese))


@each_section
def test_numbers_are_the_same(english, chinese):
    assert sorted(numbers(english)) == sorted(numbers(chinese))


@each_section
def test_tables_have_the_same_rows(english, chinese):
    ours, theirs = tables(english), tables(chinese)
    assert [len(table) for table in ours] == [len(table) for table in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for row, twin in zip(one[1:], other[1:], strict=True):
            assert len(row) == len(twin), twin
            assert spans(row[0]) == spans(twin[0])
            assert [numbers(cell) for cell in row] == [numbers(cell) for cell in twin]


def test_links_of_the_chinese_readme_and_the_glossary_lead_somewhere():
    assert {"README.md", "docs/glossary.md"} <= set(
        re.findall(r"\]\(([^)]+)\)", CHINESE.read_text("utf-8"))
    )
    for link in re.findall(r"\]\((?!http)([^)#]+)", CHINESE.read_text("utf-8")):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("path", [CHINESE, GLOSSARY], ids=lambda path: path.name)
def test_chinese_has_chinese_punctuation(path):
    text = "\n".join(sections(path))
    assert not re.search(rf"{HAN}[,;:!?](\s|{HAN})|{HAN}\.(\s|$)|{HAN}\(|\){HAN}", re.sub(
        r"\[[^]]*\]\([^)]*\)", "", text))  # fmt: skip


# The glossary.

TERMS = tables(GLOSSARY.read_text("utf-8"))[0][1:]  # term, Chinese, meaning, Chinese
each_term = pytest.mark.parametrize("term", TERMS, ids=lambda row: row[0])


def occurs(term: str, text: str) -> bool:
    """Whether a term is in a text: in the plural too, and "graph parallel" for "parallelism"."""
    stem = re.escape(term.lower().removesuffix("ism")).replace(r"\ ", r"[\s-]+")
    return re.search(rf"(?<![a-z]){stem}(ism|s|es)?(?![a-z])", text.lower()) is not None


@pytest.fixture(scope="module")
def series() -> str:
    """The words of the series and of the package."""
    cells = [
        cell.source
        for path in sorted(ROOT.glob("notebooks/[0-9]*.ipynb"))
        for cell in nbformat.read(path, as_version=4).cells
    ]
    modules = [path.read_text("utf-8") for path in sorted(ROOT.glob("workbench/**/*.py"))]
    return "\n".join([*cells, *modules]).lower()


def test_terms_are_in_order_and_defined_once():
    names = [row[0].lower() for row in TERMS]
    assert names == sorted(set(names))
    assert len(names) > 60
    assert all(len(row) == 4 and all(cell.strip() for cell in row) for row in TERMS)


@each_term
def test_a_term_is_said_in_both_languages(term):
    _, chinese, meaning, chinese_meaning = term
    assert re.search(HAN, chinese)
    assert re.search(HAN, chinese_meaning)
    assert meaning.isascii()


@each_term
def test_a_term_is_used_in_the_series_or_the_package(term, series):
    assert occurs(term[0], series)


def test_one_chinese_word_is_not_two_terms():
    words = [word for row in TERMS for word in row[1].split(" / ")]
    assert len(words) == len(set(words))


NAMES = re.compile(r"`[^`]+`|(?<!!)\[[^]]*\]\([^)]*\)|ONNX Runtime")  # of code, files, products


@pytest.mark.parametrize(
    ("english", "chinese", "term"),
    [
        pytest.param(english, chinese, term, id=f"{english.split(chr(10))[0]}: {term[0]}")
        for english, chinese in PAIRS
        for term in TERMS
        if occurs(term[0], NAMES.sub("", english))
    ],
)
def test_the_chinese_readme_uses_the_words_of_the_glossary(english, chinese, term):
    assert any(word in chinese for word in term[1].split(" / ")), term
