"""Protobuf package octavo.inference.v1, generated from protos/octavo/inference/v1."""
