
# ---- one trial of an array, which is a run with its own recipe: launch/scripts/array.sh

run=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$trials/runs.txt")
arguments=("$trials/$(printf '%05d' "$SLURM_ARRAY_TASK_ID").yaml")
