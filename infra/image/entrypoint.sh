#!/bin/sh
# Start a command with secrets from files: every file of the secrets folder that is named like a
# variable (RAY_AUTH_TOKEN) becomes that variable. So `docker inspect` shows none of them.
set -eu

for file in "${URSA_SECRETS_DIR:-/run/secrets}"/*; do
  [ -f "$file" ] || continue
  name=$(basename "$file")
  case "$name" in
    [0-9]* | *[!A-Z0-9_]*) continue ;;
  esac
  value=$(cat "$file")
  if [ -z "$value" ]; then
    echo "the secret $file is empty" >&2
    exit 1
  fi
  export "$name=$value"
done

exec "$@"
