#!/usr/bin/env bash
# Asks a server of this machine for a path and succeeds if the answer is 200.
#
# Usage: probe.sh PATH [PORT] [KEY_FILE]     such as /ready; 8080; /run/secrets/api-key
#
# For images without an HTTP client: bash opens the socket itself. The key is sent if its file can be read, since every
# route but /health wants it; reading it here keeps it out of manifests and of process lists.
set -euo pipefail

path="$1"
port="${2:-8080}"
key_file="${3:-/run/secrets/api-key}"

authorization=
if [ -r "$key_file" ]; then
  key=
  # A file without a newline at its end makes `read` fail, and is read all the same.
  read -r key <"$key_file" || true
  authorization="Authorization: Bearer $key"$'\r\n'
fi

exec 3<>"/dev/tcp/127.0.0.1/$port"
printf 'GET %s HTTP/1.1\r\nHost: localhost:%s\r\n%sConnection: close\r\n\r\n' "$path" "$port" "$authorization" >&3
read -r -t 4 _ status _ <&3
[ "$status" = 200 ]
