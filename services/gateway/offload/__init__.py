"""Keeps the event loop free: threads, processes with limits, and the turns in which tenants use them."""
