"""The OpenAI-compatible HTTP listener: translates to the gateway's own requests, and their answers back."""
