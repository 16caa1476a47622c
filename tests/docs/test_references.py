"""Files that the prose names exist: links of pages outside the site, and paths in code."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
SITE = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("**/*.md"))
PATH = re.compile(
    r"(?<![\w/.-])(?:moe_jax|tests|benchmarks|configs|docker|notebooks|scripts)/[\w./-]*(?:\.\w+|/)(?!\w)"
)
EXAMPLES = ("configs/mine.py",)  # the user's own


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    text = (ROOT / page).read_text()
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    assert not [t for t in targets if not (ROOT / t.partition("#")[0]).exists()]


@pytest.mark.parametrize("page", [*PAGES, *SITE])
def test_paths_in_code_exist(page):
    paths = PATH.findall((ROOT / page).read_text())
    named = [p for p in paths if p not in EXAMPLES and "NAME" not in p]
    assert not [p for p in named if not (ROOT / p).exists()]
