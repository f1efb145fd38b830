#!/usr/bin/env bash
# All that needs a GPU, in about ten minutes: kernels against their twins, parity, timings.
#
#     bash scripts/check_gpu.sh                                # writes into scripts/results/gpu
#     bash scripts/check_gpu.sh FOLDER
#     bash scripts/check_gpu.sh FOLDER parity bench            # only these parts
#     CHECK_GPU_ON_CPU=1 bash scripts/check_gpu.sh FOLDER      # every part, tiny, without a GPU
#
# PYTHON names the interpreter (python3). A part that fails or runs past its time stops no other.
# Exit status: 0 if all parts passed, 1 if one did not, 2 if none could run.
set -uo pipefail

python=${PYTHON:-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$(realpath -m -- "${1:-$root/scripts/results/gpu}")
parts=" ${*:2} "
cd "$root" || exit 2
export HF_HUB_OFFLINE=1  # nothing is fetched
export OMP_NUM_THREADS=1  # on the CPU is only what is small: threads wait longer than they work
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if ! device=$("$python" -c '
import torch
import xkv.backends.torch_cuda
print("cuda" if torch.cuda.is_available() else "cpu")' 2>&1); then
    echo "error: $python cannot import the PyTorch backend: $(tail -n 1 <<<"$device");" \
        "install the project there first: pip install -e '.[torch]'" >&2
    exit 2
fi
device=$(tail -n 1 <<<"$device")

machine=(scripts/gpu_machine.py)
kernels=(-m pytest tests/torch_cuda/triton_kernels -p no:cacheprovider -p no:benchmark)
kernels+=(--tb=short -rfs)
doctor=(-m xkv.doctor --backend torch --lengths 1024)
parity=(scripts/parity_gpu.py --device "$device")
step=(scripts/gpu_step.py --device "$device" --batches 1 4)
bench=(scripts/bench_gpu.py --device "$device" --replay only --batches)
if [ "$device" = cuda ]; then
    unset TRITON_INTERPRET
    workers=$(nproc)
    kernels+=(--require-backend cuda -n "$((workers < 12 ? workers : 12))")
    # of 131072 tokens in full three caches fit into 80 GB
    bench+=(1 3 8 --lengths 131072 32768 --runs 2 --factorize-tokens 8192 --max-seconds 205)
elif [ "${CHECK_GPU_ON_CPU:-}" = 1 ]; then
    kernels+=(-k "matches_reference and (L64 or L264)")
    parity+=(--max-tokens 4)
    step+=(--tokens 1024)
    bench+=(1 2 --tiny --lengths 600 --steps 4 --runs 2)
else
    echo "error: PyTorch sees no GPU on this machine; CHECK_GPU_ON_CPU=1 runs every part on the" \
        "CPU, tiny" >&2
    exit 2
fi
mkdir -p "$out" || exit 2
is_wanted() { [[ "$parts" = "  " || "$parts" = *" $1 "* ]]; }
rm -f "$out/summary.txt"
for name in machine kernels parity bench; do
    is_wanted "$name" && rm -f "$out/$name".{txt,json,md}
done
{ is_wanted doctor || is_wanted step; } && rm -f "$out/attention.txt"
n_failed=0

# part NAME SECONDS FILE COMMAND...: output goes into FILE.txt, one line about it into summary.txt
part() {
    local name=$1 limit=$2 file=$out/$3.txt began=$SECONDS status verdict
    is_wanted "$name" || return 0
    shift 3
    timeout --kill-after=10 "$limit" "$@" >>"$file" 2>&1
    status=$?
    case $status in
        0) verdict=passed ;;
        124 | 137) verdict="FAILED: ran past $limit seconds" ;;
        *) verdict="FAILED: exit status $status" ;;
    esac
    echo "$name: $verdict, $((SECONDS - began)) s" | tee -a "$out/summary.txt"
    if [ "$status" != 0 ]; then
        n_failed=$((n_failed + 1))
        tail -n 25 "$file" | cut -c -300
    fi
}

part machine 30 machine "$python" "${machine[@]}"
# compiles, beside the tests and not timed, what is timed after them
warming=
if is_wanted kernels; then
    timeout --kill-after=10 195 "$python" "${doctor[@]}" >/dev/null 2>&1 &
    warming=$!
fi
# without Triton its tests would be skipped, which is no pass
part kernels 200 kernels bash -c '"$0" -c "import triton" && "$0" "$@"' "$python" "${kernels[@]}"
[ -n "$warming" ] && wait "$warming"
part parity 120 parity "$python" "${parity[@]}"
part doctor 50 attention "$python" "${doctor[@]}"
part step 90 attention "$python" "${step[@]}"
part bench 255 bench "$python" "${bench[@]}" --out "$out/bench"

for file in machine.txt attention.txt bench.md; do
    [ -e "$out/$file" ] && cat "$out/$file"
done
echo
cat "$out/summary.txt"
exit "$((n_failed > 0))"
