
# ---- one trial of an array, each a run with a recipe of its own: launch/scripts/array.sh

run=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$list/runs.txt")
arguments=("$list/$(printf '%05d' "$SLURM_ARRAY_TASK_ID").yaml" --no-test)
