#!/bin/bash
# The browser that the tests of this folder drive: installed with apt where it is missing.
set -eu
command -v chromium >/dev/null && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "make test-browser needs chromium; as root on Debian it installs it itself: sudo make test-browser" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends chromium
