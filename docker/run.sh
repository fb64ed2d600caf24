#!/usr/bin/env bash
# Runs a command in a container, in the background:  docker/run.sh <gpu> <name> <command>
#   docker/run.sh 0 pong python train.py --config=configs/pong_dvrl.py
# <gpu> is a GPU's number, several with commas between, or "none".
set -euo pipefail
if [ $# -lt 3 ]; then
  echo "usage: docker/run.sh <gpu> <name> <command>" >&2
  exit 2
fi
gpu=$1 name=$2
shift 2
cd "$(dirname "$0")/.."
mkdir -p saved_runs

devices=()
if [ "$gpu" != none ]; then
  # Docker splits the value at commas, unless it is in quotes that are part of it.
  devices=(--gpus "\"device=$gpu\"")
fi
# Training answers SIGTERM by saving a checkpoint; it may take a minute until it gets to it.
docker run --detach --name "$name" "${devices[@]}" --stop-signal SIGTERM --stop-timeout 60 \
  --volume "$PWD/saved_runs:/project/saved_runs" dvrl-jax "$@"
echo "follow it with: docker logs --follow $name"
