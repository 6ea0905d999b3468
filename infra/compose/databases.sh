#!/bin/sh
# Run once by the PostgreSQL image on an empty volume: a user for each service that owns its
# databases and nothing else.
set -eu

secrets=${URSA_SECRETS_DIR:-/run/secrets}

make() { # user, file with its password, databases
  user=$1 password=$(cat "$secrets/$2")
  shift 2
  # from the standard input, not an argument: the process list shows arguments
  printf "CREATE ROLE %s LOGIN PASSWORD '%s';\n" "$user" "$password" | sql
  for database in "$@"; do
    printf 'CREATE DATABASE %s OWNER %s;\nREVOKE ALL ON DATABASE %s FROM PUBLIC;\n' \
      "$database" "$user" "$database" | sql
  done
}

sql() { psql -v ON_ERROR_STOP=1 --quiet --username "$POSTGRES_USER" --dbname postgres; }

make prefect prefect-database-password prefect
make mlflow mlflow-database-password mlflow mlflow_auth
