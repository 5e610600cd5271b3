#!/bin/sh
# Installs what the clients need on Debian 12 or later. Needs root.
set -e
apt-get update -q
DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
  protobuf-compiler protobuf-compiler-grpc pkg-config \
  golang-go golang-google-grpc-dev golang-github-golang-protobuf-1-5-dev protoc-gen-go-1-5 protoc-gen-go-grpc \
  g++ libgrpc++-dev \
  ruby ruby-grpc \
  default-jdk-headless libgrpc-java libnetty-java libperfmark-java libprotobuf-java protobuf-compiler-grpc-java-plugin
