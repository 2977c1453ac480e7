#!/bin/bash
# Builds the peer of `scripts/bench serve`: llama-server of the Python package llama-cpp-python, which carries llama.cpp
# with its server, compiled for this machine's processor.
#
#   serve-peer.sh OUTPUT_DIR TREE    leaves llama/ (programs and libraries), native/libggml-cpu.so and inputs.txt
#                                    there. TREE is llama.cpp as the engine has it.
#
# 0.3.36 is the version whose ggml is nearest to the engine's: 0.25.3 beside 0.26.0 of llama-cpp-sys-2 0.1.161.
# native/ is agentd natively built: the processor's back end of the engine's own tree and options, for this machine alone, in
# the place of the variant that agentd chooses at run time. Everything else of the engine is the same file.
# JOBS limits the compilers that run at once.
set -euo pipefail
out=${1:?usage: serve-peer.sh OUTPUT_DIR TREE} tree=${2:?usage: serve-peer.sh OUTPUT_DIR TREE}
package=llama_cpp_python-0.3.36.tar.gz
digest=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
mkdir -p "$out"
[ -f "$out/inputs.txt" ] && { echo "serve peer: cached in $out"; exit 0; }
for tool in cmake g++ python3; do
  command -v "$tool" >/dev/null || { echo "missing $tool: apt-get install build-essential cmake python3-pip" >&2; exit 3; }
done
jobs=${JOBS:-$(nproc)}
if ! echo "$digest  $out/$package" | sha256sum --check --status 2>/dev/null; then
  python3 -m pip download --quiet --no-deps --no-binary :all: --dest "$out" llama-cpp-python==0.3.36
  echo "$digest  $out/$package" | sha256sum --check --quiet
fi
source=$out/llama_cpp_python-0.3.36/vendor/llama.cpp
[ -d "$source" ] || tar -xzf "$out/$package" -C "$out"

# Without what a server on this machine's own address has no use for: TLS, the web page, tests, examples.
cmake -S "$source" -B "$out/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=ON \
  -DCMAKE_BUILD_RPATH_USE_ORIGIN=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF \
  -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF >"$out/configure.log" 2>&1 ||
  { tail -20 "$out/configure.log" >&2; exit 1; }
cmake --build "$out/build" -j "$jobs" --target llama-server >"$out/build.log" 2>&1 ||
  { tail -20 "$out/build.log" >&2; exit 1; }
# GGML_NATIVE is refused for a library that is loaded at run time; for the compiler it means -march=native.
mkdir -p "$out/native-source"
# The crate has not all files that ggml wants as a project of its own.
printf 'cmake_minimum_required(VERSION 3.14)\nproject(native C CXX)\nadd_subdirectory("%s/ggml" ggml)\n' "$tree" \
  >"$out/native-source/CMakeLists.txt"
cmake -S "$out/native-source" -B "$out/build-native" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=OFF -DBUILD_SHARED_LIBS=ON \
  -DCMAKE_C_FLAGS=-march=native -DCMAKE_CXX_FLAGS=-march=native -DGGML_BACKEND_DL=ON -DGGML_OPENMP=OFF \
  -DGGML_LLAMAFILE=ON -DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF >"$out/configure-native.log" 2>&1 ||
  { tail -20 "$out/configure-native.log" >&2; exit 1; }
cmake --build "$out/build-native" -j "$jobs" --target ggml-cpu >"$out/build-native.log" 2>&1 ||
  { tail -20 "$out/build-native.log" >&2; exit 1; }
mkdir -p "$out/llama" "$out/native"
cp -P "$out"/build/bin/llama-server "$out"/build/bin/*.so* "$out/llama/"
find "$out/build-native" -name 'libggml-cpu.so' -exec cp {} "$out/native/" \;
[ -f "$out/native/libggml-cpu.so" ] || { echo "no native back end was built" >&2; exit 1; }

# The peer's half of two loops from one source; ours is linked with the engine's libraries when it is measured.
gcc -O2 -I "$source/include" -I "$source/ggml/include" "$(dirname "$0")/serve-loop.c" -o "$out/llama/loop" \
  -L "$out/llama" -Wl,-rpath,'$ORIGIN' -lllama -lggml -lggml-base
{
  echo "llama-cpp-python 0.3.36 sha256 $digest"
  sed -n 's/^set(GGML_VERSION_\(MAJOR\|MINOR\|PATCH\) \([0-9]*\))/peer ggml \1 \2/p' "$source/ggml/CMakeLists.txt"
  sed -n 's/^set(GGML_VERSION_\(MAJOR\|MINOR\|PATCH\) \([0-9]*\))/our ggml \1 \2/p' "$tree/ggml/CMakeLists.txt"
  g++ --version | head -1
} >"$out/inputs.txt"
rm -rf "$out/build" "$out/build-native" "$out/native-source" "$out/llama_cpp_python-0.3.36"
echo "serve peer: built in $out"
