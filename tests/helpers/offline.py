"""A test without a network."""

import socket

import pytest


def forbid_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every connection, and every look for a name, fail the test."""

    def refuse(*_):
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
