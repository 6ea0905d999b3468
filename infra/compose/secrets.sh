#!/bin/sh
# Make the secrets of compose.yaml, random ones, in the folder `secrets` beside it (or the one
# that is given). What is there stays, so that it can be run again after an upgrade.
set -eu

folder=${1:-$(dirname "$0")/secrets}
umask 077
mkdir -p "$folder"
# the folder is closed to others; the files are open to the users of the containers
chmod 700 "$folder"

random() { head -c 24 /dev/urandom | od -An -v -tx1 | tr -d ' \n'; }

put() { # name, value
  [ -s "$folder/$1" ] || printf %s "$2" >"$folder/$1"
  chmod 444 "$folder/$1"
}

for name in postgres-password prefect-database-password mlflow-database-password \
  mlflow-admin-password mlflow-password mlflow-session-key ray-token \
  s3-admin-key s3-mlflow-key s3-ursa-key; do
  put "$name" "$(random)"
done
put prefect-auth "ursa:$(random)"

# who may do what in the store: each service in its own bucket only
put s3.json "{\"identities\": [
  {\"name\": \"admin\", \"actions\": [\"Admin\", \"Read\", \"Write\", \"List\"],
   \"credentials\": [{\"accessKey\": \"admin\", \"secretKey\": \"$(cat "$folder/s3-admin-key")\"}]},
  {\"name\": \"mlflow\", \"actions\": [\"Read:mlflow\", \"Write:mlflow\", \"List:mlflow\"],
   \"credentials\": [{\"accessKey\": \"mlflow\", \"secretKey\": \"$(cat "$folder/s3-mlflow-key")\"}]},
  {\"name\": \"ursa\", \"actions\": [\"Read:ursa\", \"Write:ursa\", \"List:ursa\"],
   \"credentials\": [{\"accessKey\": \"ursa\", \"secretKey\": \"$(cat "$folder/s3-ursa-key")\"}]}
]}"
