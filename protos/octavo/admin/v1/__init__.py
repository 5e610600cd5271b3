"""Protobuf package octavo.admin.v1, generated from protos/octavo/admin/v1."""
