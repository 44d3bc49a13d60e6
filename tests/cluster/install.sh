#!/bin/bash
# What the tests of this folder start: installed with apt where it is missing; nothing to do where all is there.
set -eu
missing=()
for needed in sbatch:slurm-wlm slurmctld:slurmctld slurmd:slurmd munged:munge ip:iproute2 mpirun:openmpi-bin; do
  PATH=$PATH:/usr/sbin:/sbin command -v "${needed%%:*}" >/dev/null || missing+=("${needed##*:}")
done
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "make test-cluster needs ${missing[*]}; as root on Debian or Ubuntu it installs them itself: sudo make test-cluster" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}"
