"""Protobuf package octavo.worker, generated from protos/octavo/worker."""
