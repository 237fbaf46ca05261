"""Links between the files of the repository lead somewhere; those inside the site are checked where it is built."""

import re

import pytest

from tests.docs.pages import PAGES, README, REPOSITORY, prose

OTHERS = {
    "README.md": README,
    **{name: (REPOSITORY / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "SECURITY.md")},
}


@pytest.mark.parametrize("page", [*OTHERS, *PAGES])
def test_links_lead_somewhere(page: str) -> None:
    text = prose((OTHERS | PAGES)[page])
    links = re.findall(r"\]\((?!https?://)([^)#]+)[^)]*\)", text)
    names = re.findall(r"`((?:docs|src|tests|apps|examples|benchmarks)/[\w/.-]+)`", text)
    for link in links:
        assert (REPOSITORY / page).parent.joinpath(link).exists(), link
    for name in names:
        assert REPOSITORY.joinpath(name).exists(), name


def test_texts_in_the_source_name_pages_that_exist() -> None:
    named = set()
    for path in [*(REPOSITORY / "src").rglob("*.py"), *(REPOSITORY / "apps").rglob("*.py")]:
        named |= set(re.findall(r"\bdocs/[\w/-]+\.md", path.read_text(encoding="utf-8")))
    assert len(named) > 3 and [name for name in sorted(named) if not (REPOSITORY / name).is_file()] == []
