"""The files that docs/architecture.md walks through are there, and few."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("what", "most"), [("message", 6), ("expert", 10), ("batch", 10)])
def test_few_files_are_passed_and_all_are_there(what: str, most: int) -> None:
    walk = re.search(rf"## Following one {what}.*?\n\n(\|.*?)\n\n", PAGE, re.DOTALL)
    assert walk is not None
    rows = [row for row in walk[1].splitlines() if re.match(r"\| \d+ \|", row)]
    assert 0 < len(rows) <= most
    for row in rows:
        for file in re.findall(r"`([\w/]+\.py)`", row):
            assert (ROOT / "flwr_moe" / file).is_file(), file


def test_every_room_is_in_the_picture() -> None:
    rooms = {f.parent.name for f in (ROOT / "flwr_moe").glob("*/__init__.py")}
    assert rooms <= set(re.findall(r"(\w+)\[", PAGE))
