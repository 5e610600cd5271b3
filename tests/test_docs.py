"""The pages are what their readers need: links lead somewhere, files exist, pictures are current, lines are short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "docs/runbooks/*.md", "helm/**/*.md", "examples/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)
GENERATED = {DOCS / "api.md", ROOT / "helm" / "octavo" / "README.md"}
MAX_LINE = 110
MAX_README_LINES = 110
MAX_WORDS = 18_000  # but for what is generated
MAX_RUNBOOK_WORDS = 1_500  # beside that: nobody reads them in an evening, but one at a time, at night
MAX_WORDS_OF_A_RUNBOOK = 90

CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
MADE = re.compile(r"<!-- (?:metrics: )?made by .*?<!-- end -->", re.DOTALL)
OPENAI_TABLES = re.compile(r"^### POST .*", re.DOTALL | re.MULTILINE)


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text())):
        if re.match(r"\w+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        assert page.parent != DOCS or path.is_relative_to(DOCS), f"{link}: the site has docs/ only"
        assert not anchor or anchor in anchors(path), link


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_files_that_pages_name_exist(page: Path) -> None:
    folders = "tests|services|gpu_worker|kernels|protos|benchmarks|deploy|docs|tools|helm"
    for path in re.findall(rf"`((?:{folders})/[\w/.-]+)`", page.read_text()):
        assert (ROOT / path).exists() or "NAME" in path, path


@pytest.mark.parametrize("page", [page for page in PAGES if page not in GENERATED], ids=ids)
def test_lines_are_short(page: Path) -> None:
    text = MADE.sub("", CODE.sub("", page.read_text()))
    lines = [line for line in text.splitlines() if not line.startswith(("|", "#", "    "))]
    # Neither a link nor a piece of code is broken: a line of one alone may be longer.
    long = [re.sub(r"`[^`]*`|\]\([^)]*\)", "", line.strip()) for line in lines if len(line) > MAX_LINE]
    assert not [line for line in long if " " in line]


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= MAX_README_LINES
    assert max(map(len, lines)) <= MAX_LINE


def test_the_guides_can_be_read_in_an_evening() -> None:
    pages = [page for page in PAGES if page.parent == DOCS and page not in GENERATED]
    assert sum(len(OPENAI_TABLES.sub("", MADE.sub("", page.read_text())).split()) for page in pages) <= MAX_WORDS


def test_a_runbook_is_read_in_a_minute() -> None:
    words = [len(page.read_text().split()) for page in (DOCS / "runbooks").glob("*.md")]
    assert max(words) <= MAX_WORDS_OF_A_RUNBOOK
    assert sum(words) <= MAX_RUNBOOK_WORDS


def test_pictures_and_tables_are_current() -> None:
    subprocess.run([sys.executable, DOCS / "figures.py", "--check"], check=True)
