"""What a command cannot do."""


class CommandError(Exception):
    """The command cannot go on. The message is one line for people that says why and what to change."""
