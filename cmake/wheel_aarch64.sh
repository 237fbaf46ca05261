#!/usr/bin/env bash
# Cross-compiles the aarch64 wheel into dist: apt-get install g++-aarch64-linux-gnu. Run by `make wheel-aarch64`.
set -euo pipefail

command -v aarch64-linux-gnu-g++ >/dev/null || { echo "a compiler is missing: apt-get install g++-aarch64-linux-gnu" >&2; exit 1; }
python=$("$BIN/python" -c 'import sys; print("{}.{}".format(*sys.version_info))')
folder=$PWD/build/arm64
suffix=.cpython-${python/./}-aarch64-linux-gnu.so

# Python's headers for arm64, taken from Debian by lists of their own: nothing is installed here.
mkdir -p "$folder"/{lists/partial,cache/archives/partial,root}
: >"$folder/status"
apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State::lists="$folder/lists"
  -o Dir::Cache="$folder/cache" -o Dir::State::status="$folder/status")
"${apt[@]}" update
(cd "$folder" && "${apt[@]}" download "libpython$python-dev") ||
  { echo "Debian has no libpython$python-dev for arm64 here: use its own version of Python" >&2; exit 1; }
dpkg -x "$folder"/libpython"$python"-dev_*.deb "$folder/root"

root=$folder/root/usr
export CMAKE_GENERATOR=Ninja _PYTHON_HOST_PLATFORM=linux-aarch64 SETUPTOOLS_EXT_SUFFIX=$suffix
export SKBUILD_CMAKE_ARGS="-DCMAKE_TOOLCHAIN_FILE=$PWD/cmake/aarch64-linux-gnu.cmake;-DNB_SUFFIX=$suffix;\
-DPython_INCLUDE_DIR=$root/include/python$python;-DCMAKE_CXX_FLAGS=-I$root/include"
"$BIN/python" -m build --wheel --outdir build/wheel-aarch64 .
"$BIN/auditwheel" repair --wheel-dir dist build/wheel-aarch64/*.whl
