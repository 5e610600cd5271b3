"""Protobuf package octavo.scheduler, generated from protos/octavo/scheduler."""
