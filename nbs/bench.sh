#!/bin/sh
# Measure every figure of speed on the pages; `sh nbs/bench.sh --rounds 6` takes less time
set -eu
cd "$(dirname "$0")"
nadam-bench --compiled --training --growth --json bench.json "$@"
# and without the kernel in C
export FASTAI_NADAM_KERNEL=0
nadam-bench --nets xresnet34 --opts NAdam,DozatNAdam --training --json bench_without_kernel.json "$@"
