#!/usr/bin/env bash
# Runs the container that deploy/build.sh made, as its own user, until it is stopped:
#
#     sudo deploy/run.sh MODELS [ARGUMENT...]
#
# MODELS is a folder of models, mounted for reading; arguments go to the server. Needs root and
# buildah. The network is that of this machine, so give --host 127.0.0.1.
set -euo pipefail
image=${IMAGE:-workbench-server}
models=$(realpath "${1:?give the folder of models}")
shift
buildah() { command buildah --storage-driver vfs "$@"; }

container=$(buildah from --pull-never "$image")
trap 'buildah rm "$container" >/dev/null' EXIT
# buildah run does not know the entry point of an image.
mapfile -t command < <(
  buildah inspect --format '{{range .Docker.Config.Entrypoint}}{{println .}}{{end}}' "$container" |
    sed '/^$/d'
)
# A signal would end buildah, and it the server, in the middle of an answer. So the server is told
# to end with its input, which is open until this script is stopped.
exec {input}> >(
  exec setsid buildah --storage-driver vfs run --isolation chroot --volume "$models:/models:ro" \
    "$container" -- "${command[@]}" --repository /models --attached "$@"
)
server=$!
stop() { [ -z "$input" ] || exec {input}>&-; input=; }
trap stop TERM INT
while kill -0 "$server" 2>/dev/null; do wait "$server" || true; done
