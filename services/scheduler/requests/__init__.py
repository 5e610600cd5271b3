"""Requests, their sequences, and what gateways are told of them."""
