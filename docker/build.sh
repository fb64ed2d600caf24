#!/usr/bin/env bash
# Builds the image dvrl-jax:  docker/build.sh
set -euo pipefail
cd "$(dirname "$0")/.."
uid=$(id -u) gid=$(id -g)
if [ "$uid" -eq 0 ]; then # Nothing runs as root inside, whoever builds.
  uid=1000 gid=1000
fi
docker build --file docker/Dockerfile --build-arg UID="$uid" --build-arg GID="$gid" --tag dvrl-jax .
