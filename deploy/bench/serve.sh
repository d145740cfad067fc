#!/usr/bin/env bash
# Both servers, the same model, the same prompts, in turns: `make bench-serve`, or by hand
#   deploy/bench/serve.sh PYTHON [MODEL_FOLDER]      options for `offbook bench serve` in OPTIONS
# PYTHON has mlx-lm. Without a folder the demo model is served.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(command -v "$1")
[[ $python = /* ]] || python=$PWD/$python
model=${2:-$PWD/demo/model}
ours=127.0.0.1:18473
theirs=127.0.0.1:18474
logs=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; wait; rm -rf "$logs"' EXIT

target/release/offbook up --nodes 1 --model "$model" --http $ours >"$logs/offbook" 2>&1 &
# It takes the name of a model for a path.
name=$(basename "$model")
(cd "$(dirname "$model")" && exec "$python" -m mlx_lm server --model "$name" --host 127.0.0.1 --port 18474) \
  >"$logs/mlx-lm" 2>&1 &
for server in $ours $theirs; do
  for _ in $(seq 120); do
    curl --silent --fail --output /dev/null "http://$server/health" && continue 2
    sleep 1
  done
  echo "no server at $server:"; cat "$logs"/*; exit 1
done
# shellcheck disable=SC2086
target/release/offbook bench serve --model "$name" --url http://$ours --url http://$theirs ${OPTIONS:---concurrency 1,4,16}
