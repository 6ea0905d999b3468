#!/bin/bash
# A Prefect worker that hands its work to a Ray cluster. A driver needs a Ray node beside it, so
# this container is a node without room for work. If either process ends, so does the container.
set -eu

: "${RAY_ADDRESS:?address of the Ray cluster, such as ray-head:6379}"
ray start --address="$RAY_ADDRESS" --num-cpus=0 --num-gpus=0 --disable-usage-stats --block &
prefect worker start --pool "${URSA_POOL:-ursa}" --type process --install-policy never --limit 4 &
wait -n
exit 1
