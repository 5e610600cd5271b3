"""OpenAI's files and batches, kept in a folder that gateways may share."""
