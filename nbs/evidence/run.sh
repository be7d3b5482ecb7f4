#!/bin/sh
# All runs of tutorial.compare, in the order of its protocol. Run it again to go on where it was stopped: nbs/evidence/run.sh [OUT]
set -eu
cd "$(dirname "$0")"
out=${1:-.}
tasks="digits mnist autoencoder mnist1d text_gru text_transformer diamonds photo"
pair="NAdam,NAdam(nesterov=False)"
dozat="$pair,DozatNAdam(sqr_mom=0.99)"
compare() { # FOLDER TASK options
    f=$1 t=$2; shift 2
    nadam-compare --task "tasks.py:$t" --out "$out/$f/$t" --n_workers 2 --grow 0 "$@"
}
lrs() { python -W ignore -c "import tasks; lo,hi = tasks.$1.lrs; print(*(f'{lo*10**(i/($2-1)*2):.4g}' for i in range($2)), sep=',')"; }
search="--search lr,mom,wd --trials 32 --trial_seeds 2 --seeds 30"

for t in $tasks; do
    compare landscape $t --opts "$pair" --epochs 8 --lrs "$(lrs $t 5)" --momenta 0.9875,0.975,0.95,0.9,0.8,0.67 --wds 0.01 --seeds 2
done
for t in $tasks; do compare middle $t --opts "$pair" --epochs 8 $search; done
for t in $tasks; do compare short $t --opts "$pair" --epochs 2 $search; done
lr="--epochs 8 --search lr --trials 8 --trial_seeds 2 --seeds 15"
for t in houses code_conv digits_vit; do
    compare held_out $t --opts "$pair" --moms 0.95,0.85,0.95 $lr
    compare held_out_nadam $t --opts NAdam --moms 0.9,0.7,0.9 $lr
    compare held_out_adam $t --opts "NAdam(nesterov=False)" --moms 0.8,0.4,0.8 $lr
done
for t in $tasks; do compare long $t --opts "$pair" --epochs 32 --search lr,mom,wd --trials 16 --trial_seeds 1 --seeds 10; done
for t in $tasks; do compare middle $t --opts "$dozat" --epochs 8 $search; done
for t in $tasks; do compare middle $t --opts "$dozat,Adam(eps=1e-8)" --epochs 8 $search; done
for t in $tasks; do compare middle-999 $t --opts "NAdam(sqr_mom=0.999),NAdam(nesterov=False,sqr_mom=0.999)" --epochs 8 $search; done
for i in 1 2 3; do # exploratory: three more searches, each with the next 32 points of the sequence
    for t in $tasks; do compare short-$i $t --opts "$pair" --epochs 2 $search --skip $((32*i)); done
    for t in $tasks; do compare middle-$i $t --opts "$pair" --epochs 8 $search --skip $((32*i)); done
done
./run_user.sh "$out" # what a fastai user asks: PROTOCOL.md
