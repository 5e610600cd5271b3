"""Inference without a server to look after: `octavo.LLM`, and what `octavo batch` needs."""
