"""Protobuf package octavo.scheduler.v1, generated from protos/octavo/scheduler/v1."""
