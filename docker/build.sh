#!/usr/bin/env bash
# Builds the image dvrl-jax:  docker/build.sh
set -euo pipefail
cd "$(dirname "$0")/.."
docker build --file docker/Dockerfile --build-arg UID="$(id -u)" --build-arg GID="$(id -g)" --tag dvrl-jax .
