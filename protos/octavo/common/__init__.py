"""Protobuf package octavo.common, generated from protos/octavo/common."""
