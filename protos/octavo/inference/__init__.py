"""Protobuf package octavo.inference, generated from protos/octavo/inference."""
