#!/usr/bin/env bash
# Builds the container of the Dockerfile without a daemon and without a registry of images:
#
#     sudo deploy/build.sh [IMAGE]
#
# Needs root, buildah and mmdebstrap (apt-get install buildah mmdebstrap), Python 3.11 with pip, and
# Debian's and Python's packages to download from. The base image and the wheels are kept in
# build/container and not made again while they are there.
set -euo pipefail
cd "$(dirname "$0")/.."
image=${1:-workbench-server}
python=${PYTHON:-python3}
folder=$PWD/build/container
suite=bookworm # its Python is the one that the wheels are for

has() { command -v "$1" >/dev/null || { echo "$1 is missing: $2" >&2; exit 1; }; }
has buildah "apt-get install buildah"
has mmdebstrap "apt-get install mmdebstrap"
has "$python" "name one with PYTHON=..."
[ "$(id -u)" = 0 ] || { echo "run it as root: sudo $0" >&2; exit 1; }
buildah() { command buildah --storage-driver vfs "$@"; }

base=localhost/workbench-base
if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
  mkdir -p "$folder"
  sources=/etc/apt/sources.list.d/debian.sources
  mmdebstrap --variant=minbase --include=python3,python3-pip \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/man/*' \
    "$suite" "$folder/base.tar" $([ -f "$sources" ] && echo "$sources")
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$folder/base.tar" / >/dev/null
  buildah config --env PATH=/usr/local/bin:/usr/bin:/bin --cmd python3 "$container"
  buildah commit --quiet --rm --format docker "$container" "$base" >/dev/null
  rm "$folder/base.tar"
fi

wheels=$folder/wheels
stamp=$(cat requirements.lock deploy/serve.txt | sha256sum | cut -c 1-16)
if [ ! -f "$wheels/$stamp" ]; then
  rm -rf "$wheels" && mkdir -p "$wheels"
  "$python" -m pip download --quiet --dest "$wheels" --only-binary=:all: --python-version 3.11 \
    --constraint requirements.lock --requirement deploy/serve.txt
  touch "$wheels/$stamp"
fi

# No file says when it was built. Only the format of docker has a health check.
buildah bud --quiet --isolation chroot --format docker --timestamp 0 --tag "$image" \
  --build-arg "BASE=$base" --build-arg PIP_NO_INDEX=1 --build-arg PIP_FIND_LINKS=/wheels \
  --volume "$wheels:/wheels:ro" .
