#!/usr/bin/env bash
# Builds what the tests run: the image, and an S3 server under the name that the manifests have.
#
#   BASE         where the image starts from; without it Debian with Python, made on the spot, so
#                that no registry is needed
#   TORCH_LINKS  where torch without CUDA is; without it where pip here is told to look, else where
#                the Dockerfile says
#   VARIANT      cuda: the image with CUDA instead, localhost/trm_dist:cuda, which no test runs
#
# Needs root and: buildah debootstrap podman runc netavark iptables
set -euo pipefail
cd "$(dirname "$0")/../.."
export CONTAINERS_CONF=$PWD/tests/k8s/containers.conf
authorities=/etc/ssl/certs/ca-certificates.crt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ -z "${BASE:-}" ]; then
    BASE=localhost/trm-dist-base:bookworm
    if ! podman image exists "$BASE"; then
        debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
            bookworm "$work/root" >"$work/log" || { tail "$work/log"; exit 1; }
        if [ -e $authorities ]; then  # a proxy of this machine may have one of its own
            cp $authorities "$work/root$authorities"
            printf '[global]\ncert = %s\n' $authorities >"$work/root/etc/pip.conf"
        fi
        tar -C "$work/root" -c . | podman import - "$BASE" >/dev/null
    fi
fi

VARIANT=${VARIANT:-cpu}
image=localhost/trm_dist:latest
options=(--isolation chroot --layers --build-arg "BASE=$BASE" --build-arg "VARIANT=$VARIANT")
if [ "$VARIANT" = cuda ]; then
    image=localhost/trm_dist:cuda
    TORCH_LINKS=
else
    TORCH_LINKS=${TORCH_LINKS:-$(.venv/bin/pip config get global.find-links 2>/dev/null || true)}
fi
if [ -n "$TORCH_LINKS" ]; then
    options+=(--build-arg "TORCH_LINKS=$TORCH_LINKS")
    if [ -d "$TORCH_LINKS" ]; then options+=(--volume "$TORCH_LINKS:$TORCH_LINKS:ro"); fi
fi
SECONDS=0
buildah bud "${options[@]}" --file docker/Dockerfile --tag "$image" .
echo "built in $SECONDS s: $(podman image inspect "$image" --format '{{.Size}}') bytes"

s3=$(sed -n 's/^ *image: *\(chrislusf.*\)/\1/p' k8s/overlays/local/s3.yaml)
mkdir -p "$work/s3"
cp .venv/bin/weed "$work/s3/"
printf 'FROM %s\nCOPY weed /usr/bin/weed\n' "$BASE" >"$work/s3/Dockerfile"
buildah bud --isolation chroot --tag "docker.io/$s3" "$work/s3" >/dev/null
