"""The processes that need no torch: gateway, scheduler, commands and client."""
