#!/bin/sh
# Measure every figure of speed on the pages; `sh nbs/bench.sh --rounds 6` takes less time
set -eu
cd "$(dirname "$0")"
nadam-bench --compiled --training --growth --json bench.json "$@"
FASTAI_NADAM_KERNEL=0 nadam-bench --nets mlp,xresnet34 --opts NAdam,DozatNAdam --json bench_without_kernel.json "$@"
