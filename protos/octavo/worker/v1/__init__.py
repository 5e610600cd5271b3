"""Protobuf package octavo.worker.v1, generated from protos/octavo/worker/v1."""
