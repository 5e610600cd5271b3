"""Protobuf package octavo.common.v1, generated from protos/octavo/common/v1."""
