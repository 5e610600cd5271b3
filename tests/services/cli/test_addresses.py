"""Addresses of both kinds, as users write and as they read them."""

from __future__ import annotations

import socket

import pytest

from octavo.services.cli import addresses
from octavo.services.cli.errors import CommandError


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("127.0.0.1:50051", "127.0.0.1", 50051), ("[::1]:80", "::1", 80), ("gateway.llm.svc:0", "gateway.llm.svc", 0)],
)
def test_what_is_joined_is_what_was_split(text: str, host: str, port: int) -> None:
    assert addresses.split(text) == (host, port)
    assert addresses.join(host, port) == text


@pytest.mark.parametrize("text", ["", "50051", ":50051", "host:", "host:http", "host:65536", "host:-1"])
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(CommandError, match="write HOST:PORT, such as"):
        addresses.split(text)


def test_addresses_that_are_taken_are_free_and_differ() -> None:
    found = addresses.take_free("127.0.0.1:0", 5)

    assert len(set(found)) == 5
    for host, port in map(addresses.split, found):
        with socket.create_server((host, port)):
            pass
