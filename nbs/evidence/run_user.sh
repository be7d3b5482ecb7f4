#!/bin/sh
# All runs of the two questions in PROTOCOL.md, in its order. Run it again to go on where it was stopped: nbs/evidence/run_user.sh [OUT]
set -eu
cd "$(dirname "$0")"
out=${1:-.}
[ -d node_modules/emoji-datasource-twitter ] || npm install --no-save --no-package-lock emoji-datasource-twitter@16.0.0
scratch="digits mnist autoencoder mnist1d text_gru text_transformer diamonds photo houses code_conv digits_vit"
tuned="emoji digits diamonds docstring prose_lm mnist"
arms="Adam,NAdam,NAdam(nesterov=False),DozatNAdam"
compare() { # FOLDER FILE TASK options
    f=$1 task=$2:$3 t=$3; shift 3
    nadam-compare --task "$task" --out "$out/$f/$t" --n_workers 2 --grow 0 --baseline Adam "$@"
}
for t in $scratch; do compare swap_middle tasks.py $t --opts "$arms" --epochs 8 --lr_find own; done
for t in $tuned; do compare finetune tasks_finetune.py $t --opts "$arms" --fine_tune; done
for t in $scratch; do compare swap_middle_adam tasks.py $t --opts "$arms" --epochs 8 --lr_find Adam; done
for t in $scratch; do compare swap_long tasks.py $t --opts "$arms" --epochs 32 --lr_find own; done
search="--search lr,mom --lrs 5e-4,2e-2 --trials 10 --trial_seeds 2 --seeds 10"
for t in $tuned; do compare finetune_tuned tasks_finetune.py $t --opts "Adam,NAdam" --fine_tune $search; done
for t in $scratch; do compare swap_long_adam tasks.py $t --opts "$arms" --epochs 32 --lr_find Adam; done
