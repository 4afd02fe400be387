"""Generated blocks of pages: the same text goes to every page, or to none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.explore import blocks

PAGE = "Before.\n\n<!-- table -->\nold\n<!-- end of table -->\n\nAfter 中文.\n"


@pytest.fixture
def pages(tmp_path):
    paths = [tmp_path / "one.md", tmp_path / "two.md"]
    for path in paths:
        path.write_text(PAGE, "utf-8")
    return paths


def test_the_block_alone_is_replaced_on_each_page(pages):
    blocks.put("table", "| a |\n| --- |", *pages)
    for path in pages:
        assert path.read_text("utf-8") == PAGE.replace("old", "| a |\n| --- |")
        assert blocks.read(path, "table") == "| a |\n| --- |"
    blocks.put("table", "old", *pages)
    assert [path.read_text("utf-8") for path in pages] == [PAGE, PAGE]


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_what_is_put_is_read(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "page.md"
    path.write_text(PAGE, "utf-8")
    blocks.put("table", text, path)
    assert blocks.read(path, "table") == text


@pytest.mark.parametrize(
    "page",
    ["no block", "<!-- table -->", PAGE + PAGE, "<!-- end of table -->\n<!-- table -->"],
)
def test_a_page_without_the_block_stops_it_before_any_is_changed(pages, page):
    pages[1].write_text(page)
    with pytest.raises(ValueError, match=r"two\.md.*<!-- end of table -->"):
        blocks.put("table", "new", *pages)
    with pytest.raises(ValueError, match=r"<!-- table -->"):
        blocks.read(pages[1], "table")
    assert pages[0].read_text("utf-8") == PAGE
