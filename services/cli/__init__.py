"""The `octavo` command: what a person runs. Commands are imported when they are used, so that each starts fast."""
