#!/bin/sh
# Builds and runs the C tests: run.sh plain|asan|tsan [program [test]]. Binaries go to a directory of their own, which is
# removed afterwards. Exit status 0: all passed.
set -eu
mode=${1:?usage: run.sh plain|asan|tsan [program [test]]}
here=$(cd "$(dirname "$0")" && pwd)
native=$here/../../tuimig/core/native
plain="-std=gnu11 -O2 -g -msse4.2 -D_GNU_SOURCE -Wall -Wextra -Wshadow -Wconversion -Werror -pthread"
flags=$plain
case $mode in
plain) ;;
asan) flags="$flags -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer" ;;
tsan) flags="$flags -fsanitize=thread -fno-omit-frame-pointer" ;;
*) echo "unknown mode: $mode" >&2 && exit 2 ;;
esac
# A child that dies of a signal is part of many tests: what it dies of is for the test to see.
export ASAN_OPTIONS="handle_segv=0:handle_sigbus=0:${ASAN_OPTIONS:-}"
export TSAN_OPTIONS="handle_segv=0:handle_sigbus=0:halt_on_error=1:die_after_fork=0:${TSAN_OPTIONS:-}"

# NATIVE_BUILD: a directory that outlives this run, so that several runs of one mode share what is compiled.
if [ -n "${NATIVE_BUILD:-}" ]; then
    build=$NATIVE_BUILD
else
    build=$(mktemp -d)
    trap 'rm -rf "$build"' EXIT INT TERM
fi
if [ ! -e "$build/.compiled" ]; then
    mkdir -p "$build/engine"
    export CC="${CC:-gcc}" flags build
    for source in "$native"/*.c; do
        case $(basename "$source") in init.c | _engine.c) ;; *) echo "$source" ;; esac # another program; generated
    done | xargs -P "$(nproc)" -I{} sh -c '$CC $flags -c "$1" -o "$build/engine/$(basename "$1").o"' - {}
    # Programs of their own, never under a sanitizer: what the tests do with them is no ordinary use of memory.
    $CC $plain -static -o "$build/tuimig-init" "$native/init.c"
    $CC $plain -I"$here" -o "$build/target_writers" "$here/target_writers.c"
    $CC $plain -I"$here" -o "$build/subject" "$here/subject.c"
    touch "$build/.compiled"
fi
export TUIMIG_INIT="$build/tuimig-init" SUBJECT="$build/subject" TARGET_WRITERS="$build/target_writers"
failed=0
for source in "$here"/test_*.c; do
    name=$(basename "$source" .c)
    [ -z "${2:-}" ] || [ "$2" = "$name" ] || continue
    ${CC:-gcc} $flags -I"$native" -I"$here" "$source" "$here/lazy.c" "$here/held.c" "$build"/engine/*.o -o "$build/$name"
    echo "$mode $name"
    "$build/$name" ${3:-} || failed=1
done
exit $failed
