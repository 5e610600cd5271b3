#!/bin/sh
# Copies what an installation needs into a registry that a cluster without a way out can reach.
#
#   deploy/mirror.sh list    REGISTRY            what there is to copy, one image a line
#   deploy/mirror.sh images  REGISTRY MIRROR     copies the images and the chart (needs crane and helm)
#   deploy/mirror.sh model   SOURCE FOLDER       fetches and seals a model, for a claim (HF_ENDPOINT is obeyed)
#
# REGISTRY is where releases are, such as ghcr.io/octavo-project. Then install with
#   --set images.registry=MIRROR --set model.fetch.enabled=false --set model.claim.create=false \
#   --set model.claim.name=CLAIM --set model.name=NAME
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
version=$(sed -n 's/^version: //p' "$here/helm/octavo/Chart.yaml")

images() {
  for name in gateway scheduler worker-cpu worker-cuda; do
    echo "$1/octavo-$name:$version"
  done
}

case "${1:-}" in
list)
  images "${2:?REGISTRY}"
  echo "$2/charts/octavo:$version"
  ;;
images)
  images "${2:?REGISTRY}" | while read -r image; do
    crane copy "$image" "${3:?MIRROR}/${image##*/}"
  done
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  helm pull "oci://$2/charts/octavo" --version "$version" --destination "$folder"
  helm push "$folder/octavo-$version.tgz" "oci://$3/charts"
  ;;
model)
  octavo model fetch "${3:?FOLDER}" --source="$2"
  ;;
*)
  sed -n 's/^# \{0,1\}//p' "$0" | sed 1d
  exit 2
  ;;
esac
