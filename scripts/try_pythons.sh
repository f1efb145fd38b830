#!/usr/bin/env bash
# Whether the wheel works on each Python here: the main job, and tests that see the wheel alone.
#
#     bash scripts/try_pythons.sh                  # 3.10 to 3.13, as found on PATH or in pyenv
#     bash scripts/try_pythons.sh 3.12             # only this one
#     WITH_TORCH=1 bash scripts/try_pythons.sh     # and PyTorch, gigabytes each, from 3.11 on
#
# Every Python gets an environment of its own, which is removed again; one line of result for each.
# Exit status: 0 if all passed, 1 if one did not, 2 if none was found.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ $# -gt 0 ] || set -- 3.10 3.11 3.12 3.13

find_python() { # the newest 3.X that runs
    local installed candidate
    installed=$(ls -d "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python 2>/dev/null | sort -Vr)
    for candidate in "python$1" $installed; do
        "$candidate" -c 'import venv' 2>/dev/null && command -v "$candidate" && return
    done
    return 1
}

# a copy: pip builds in place, and tests beside the sources would import those
mkdir "$work/source" "$work/tests"
cd "$root" || exit 1
git ls-files -z --cached --others --exclude-standard | xargs -0 ls -d 2>/dev/null |
    tar cf - -T - | tar xf - -C "$work/source"
mv "$work/source/tests" "$work/tests/tests"
cd "$work/tests" || exit 1

folders=(tests/store tests/cache tests/cli/test_flags.py tests/mlx_metal/test_borrowed.py)
options=(-q -p no:cacheprovider)
extra=
if [ -n "${WITH_TORCH:-}" ]; then
    extra="[torch]"
    folders+=(tests/ops tests/cli)
else
    options+=(--noconftest --ignore tests/store/test_factorize.py)
    options+=(--ignore tests/cache/test_cache_files.py -k "not torch and not both")
fi

try() { # Python: prints what it found, and fails if anything did
    local python=$work/venv/bin/python log=$work/log wheels
    rm -rf "$work/venv" "$work/cache"
    export XKV_NO_CALIBRATION=1 XDG_CACHE_HOME=$work/cache OMP_NUM_THREADS=1
    { "$1" -m venv "$work/venv" &&
        "$python" -m pip wheel --quiet --no-deps -w "$work/dist" "$work/source"; } >"$log" 2>&1 ||
        { echo "the wheel cannot be built: $(tail -n 1 "$log")"; return 1; }
    wheels=("$work"/dist/xkv-*.whl)
    "$python" -m pip install --quiet "${wheels[0]}$extra" pytest hypothesis >"$log" 2>&1 ||
        { echo "the wheel cannot be installed: $(tail -n 1 "$log")"; return 1; }
    "$python" -m pip list --format=freeze 2>/dev/null |
        grep -E '^(mlx|mlx-lm|torch|transformers)==' | tr '\n' ' '
    "$python" -m xkv.generate --max-tokens 6 --compression 16 >"$log" 2>&1 &&
        grep -q "inherited scarlet needles" "$log" ||
        { echo "no right answer: $(tail -n 1 "$log")"; return 1; }
    "$work/venv/bin/xkv" --help >"$log" 2>&1 || { echo "xkv --help fails"; return 1; }
    "$python" -m pytest "${options[@]}" "${folders[@]}" >"$log" 2>&1
    local status=$?
    [ $status = 0 ] || grep -E '^(FAILED|ERROR|E  )' "$log" | head -n 20 >&2
    echo "answers, $(tail -n 1 "$log")"
    return $status
}

found=0 failed=0
for version; do
    if python=$(find_python "$version"); then
        found=1
        result=$(try "$python") || failed=1
        echo "$("$python" -V): $result"
    else
        echo "Python $version: not found"
    fi
done
[ $found = 1 ] || exit 2
exit $failed
