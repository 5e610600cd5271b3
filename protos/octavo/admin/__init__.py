"""Protobuf package octavo.admin, generated from protos/octavo/admin."""
