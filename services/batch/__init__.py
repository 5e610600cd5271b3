"""A file of requests becomes a file of results; used by `octavo batch` and by the gateway's /v1/batches."""
