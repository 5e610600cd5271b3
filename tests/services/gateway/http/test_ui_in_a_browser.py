"""What the chat page promises, in a real browser, against a server that answers as each check says."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.services.gateway.http import ui_endpoints
from tests.e2e import node_client


@pytest.fixture(scope="module")
def wrong() -> dict[str, str | None]:
    files = Path(ui_endpoints.__file__).parent / "ui"
    return node_client.check_page(files, ui_endpoints.HEADERS)


@pytest.mark.parametrize("name", node_client.PAGE_NAMES)
def test_the_page_keeps_its_promise(wrong: dict[str, str | None], name: str) -> None:
    assert wrong[name] is None, wrong[name]
