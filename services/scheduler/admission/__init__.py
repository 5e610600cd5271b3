"""The decision to take a request or to refuse it, and the forecast that it rests on."""
