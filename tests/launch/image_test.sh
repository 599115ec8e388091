#!/usr/bin/env bash
# Builds the Dockerfile on a CPU base made from nothing, without a daemon, and trains kvcat_tiny in the result.
#
#   image_test.sh [DIR]      working folder (a new one under TMPDIR, removed at the end; a given one is kept)
#
# Needs root, and Debian's packages buildah and debootstrap. pip's settings and the certificates of this machine are mounted into
# the build, and are not in the image. IMAGE_BUDGET=seconds per build step (1800).
set -euo pipefail
cd "$(dirname "$0")/../.."

for program in buildah debootstrap; do
  command -v "$program" > /dev/null || { echo "image test: SKIPPED: $program is not installed (Debian: buildah debootstrap)"; exit 0; }
done
[[ $(id -u) == 0 ]] || { echo "image test: SKIPPED: needs root"; exit 0; }

work=${1:-}
if [[ -z $work ]]; then
  work=$(mktemp -d)
  trap 'umount -R "$work/storage/overlay" 2> /dev/null || true; rm -rf "$work"' EXIT
fi
mkdir -p "$work"
budget=${IMAGE_BUDGET:-1800}
# Without overlayfs every layer is a copy of all before it: slow, and some 50 GB.
driver=vfs
mkdir -p "$work"/probe/{l,u,w,m}
if mount -t overlay overlay -o "lowerdir=$work/probe/l,upperdir=$work/probe/u,workdir=$work/probe/w" "$work/probe/m" 2> /dev/null; then
  umount "$work/probe/m"
  driver=overlay
fi
rm -rf "$work/probe"
store=(--root "$work/storage" --runroot "$work/run" --storage-driver "$driver")
say() { printf '\n== image test: %s (%s)\n' "$*" "$(date +%T)"; }

# pip as it is set up here, in one file, with the local folders that it names, and where certificates come from.
certificates=${PIP_CERT:-${SSL_CERT_FILE:-${REQUESTS_CA_BUNDLE:-/etc/ssl/certs/ca-certificates.crt}}}
mounts=(--volume "$certificates:/etc/ssl/certs/ca-certificates.crt:ro" --volume "$work/pip.conf:/etc/pip.conf:ro")
python3 -m pip config list | python3 -c '
import ast, sys

print("[global]", "cert = /etc/ssl/certs/ca-certificates.crt", sep="\n")
options = {}
for line in sys.stdin:
    key, _, value = line.strip().partition("=")
    name = key.rpartition(".")[2]
    if name.endswith(("index-url", "find-links", "timeout", "trusted-host")):
        options[name] = ast.literal_eval(value)
for name, value in options.items():
    print(name, "=", "\n    ".join(["", *value.split()]) if " " in value else value)
' > "$work/pip.conf"
while read -r folder; do
  mounts+=(--volume "$folder:$folder:ro")
done < <(grep -oE '(file://|[ =])/[^ ]+' "$work/pip.conf" | sed -E 's#^(file://|[ =])##; s#/simple/?$##' | sort -u \
  | while read -r path; do if [[ -d $path ]]; then echo "$path"; fi; done)

say "base: Debian with Python in a virtual environment, as NGC's images have it"
if [[ ! -d $work/base/opt/venv ]]; then
  mirror=$(awk '/^deb / { for (i = 2; i <= NF; i++) if ($i ~ /^https?:/) { print $i; exit } } /^URIs:/ { print $2; exit }' \
    /etc/apt/sources.list /etc/apt/sources.list.d/* 2> /dev/null || true)
  time debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$work/base" \
    "${mirror:-http://deb.debian.org/debian}" > "$work/debootstrap.log" 2>&1 || { tail "$work/debootstrap.log"; exit 1; }
  chroot "$work/base" python3 -m venv /opt/venv
  rm -rf "$work/base/var/cache/apt" "$work/base/var/lib/apt/lists"
fi
if ! buildah "${store[@]}" inspect localhost/cpu-base:1 > /dev/null 2>&1; then
  container=$(buildah "${store[@]}" from scratch)
  buildah "${store[@]}" add --quiet "$container" "$work/base" / > /dev/null
  buildah "${store[@]}" config --env PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
  buildah "${store[@]}" commit --quiet --rm "$container" localhost/cpu-base:1
fi

say "build"
time timeout "$budget" buildah "${store[@]}" bud --isolation chroot --pull-never --format docker --layers \
  --build-arg BASE_IMAGE=localhost/cpu-base:1 --build-arg REVISION="$(git rev-parse HEAD)" "${mounts[@]}" \
  --tag localhost/kvcat:cpu --file Dockerfile .

say "what is in it"
buildah "${store[@]}" inspect --type image --format \
  'user {{.OCIv1.Config.User}}, labels {{.OCIv1.Config.Labels}}, health {{.Docker.Config.Healthcheck.Test}}' localhost/kvcat:cpu
du -sh "$work/base" "$work/storage"

container=$(buildah "${store[@]}" from --pull-never localhost/kvcat:cpu)
inside() { timeout "$budget" buildah "${store[@]}" run --isolation chroot "$container" -- "$@"; }

say "its user is not root, and can change nothing of the project"
# shellcheck disable=SC2016 # expanded inside
inside bash -c 'id; test "$(id -u)" = 10001; ! touch /opt/kvcat/x 2> /dev/null'
say "training"
time inside bash -c 'cd /tmp && nemo llm pretrain --factory "kvcat_tiny(dir='"'/tmp/runs'"')" -y trainer.max_steps=6 2>&1 | tail -n 15
  cat /tmp/runs/kvcat_tiny/kvcat/finished.json && tail -n 1 /tmp/runs/kvcat_tiny/kvcat/metrics.jsonl'
say "launcher"
inside bash -c 'cd /tmp && KVCAT_RUN_DIR=/tmp/runs/two /opt/kvcat/launch/torchrun.sh -- python -c "print(42)"'
say "health command"
inside kvcat train doctor || echo "image test: kvcat train doctor: exit code $?"
buildah "${store[@]}" rm "$container" > /dev/null
say "done"
