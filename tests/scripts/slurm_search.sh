#!/bin/bash
#SBATCH --job-name=search-rn18
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --gres=gpu:8
#SBATCH --partition=gpu
#SBATCH --mem=0
#SBATCH --time=1440
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append

what='search search-rn18'
run=/runs/search-rn18
launch=/runs/search-rn18/launch
folder=/runs/search-rn18/launch/20260101-000000
logs=/runs/search-rn18/launch/20260101-000000
code=/runs/search-rn18/launch/code-0123456789ab
python=/venv/bin/python
data=data/imagenet
scratch=/tmp
interface=''
listen=127.0.0.1
ranks=1
gpus=8
restarts=20
warn=600
preflight=1
preflight_only=0
look=(/runs/search-rn18/launch/code-0123456789ab/configs/recipes/imagenet/rn18_w2a2.yaml 'data.path="data/imagenet"' --devices=8 --disk=2 --bandwidth=5 'run.dir="/runs/search-rn18"' --independent)
arguments=(/runs/search-rn18/launch/code-0123456789ab/configs/search/imagenet_rn18.yaml trials=24 'recipe="/runs/search-rn18/launch/code-0123456789ab/configs/recipes/imagenet/rn18_w2a2.yaml"' 'name="imagenet_rn18"')
export NCCL_DEBUG=WARN

# ---- the same in every job: launch/scripts/signals.sh

say() { printf '%(%F %T)T  %s\n' -1 "$*"; }

# Slurm tells this script, ahead of the time limit (USR1) or when somebody takes its nodes away (USR1 or TERM). It passes
# the first word on and waits: one that comes later would make a run end at once.
asked='' child=''
ask() {
    say "asked to save and stop ($1)"
    if [[ -z $asked && -n $child ]]; then kill -USR1 "$child" 2>/dev/null; fi
    asked=1
}
trap 'ask USR1' USR1
trap 'ask TERM' TERM


# ---- the same in every job: launch/scripts/begin.sh

set -uo pipefail

# A controller that is busy says nothing: it is asked again.
slurm() {
    for _ in {1..6}; do
        "$@" && return
        sleep 5
    done
    return 1
}
job=$SLURM_JOB_ID # of a task of an array, the last of which has the id of the whole array: with its number
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi

restart=${SLURM_RESTART_COUNT:-0}
say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart $restart of at most $restarts: $what"
if ((restart > restarts)); then
    say "restarted $restart times, at most $restarts are allowed: giving up. Submitting it again goes on"
    slurm scontrol update JobId="$job" Requeue=0
    exit 1
fi
if [[ -e $launch/stop ]]; then
    say "told to stop before it began"
    exit 99
fi

# The snapshot before all else; the folder that the job was submitted from at the end, for a plug-in that lies there.
export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}:$PWD" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun has not taken it from sbatch since Slurm 22.05
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((SLURM_CPUS_ON_NODE > ranks ? SLURM_CPUS_ON_NODE / ranks : 1))}"
if [[ -n $interface ]]; then export NCCL_SOCKET_IFNAME="$interface" GLOO_SOCKET_IFNAME="$interface"; fi

env | LC_ALL=C sort | grep -E '^(SLURM|CUDA|NCCL|GLOO|OMP|RAY|TORCH|NULSQ|PYTHON|LD_LIBRARY_PATH|LOADEDMODULES|PATH)' |
    grep -viE '^[^=]*(token|secret|password|key|jwt)' >"$folder/environment-$SLURM_JOB_ID.txt"

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) # this script runs there
address=$("$python" -m launch.batch address \
    "$(slurm scontrol show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)") || exit 1
free_port() { "$python" -m launch.batch port "$SLURM_CLUSTER_NAME-$SLURM_JOB_ID-$restart"; } # right before its use

# Wait for a process through all signals; its exit code.
await() {
    while kill -0 "$1" 2>/dev/null; do wait "$1"; done
    wait "$1"
}

# What srun says of tasks that end comes into this job's own log. `since_now`: from here on it is the next step's.
log=$(readlink -f "/proc/$$/fd/2") since=0
since_now() { since=$(stat --format=%s "$log" 2>/dev/null || echo 0); }

on_each_node() { # COMMAND: once on every node, output appended to a log for each; not at all once asked to stop
    if [[ -n $asked ]]; then return 143; fi
    since_now
    srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=60 \
        --open-mode=append --output="$logs/$SLURM_JOB_ID-%n-%N.log" "$@" &
    child=$!
    if [[ -n $asked ]]; then kill -USR1 "$child" 2>/dev/null; fi
    await "$child"
    local exit_code=$?
    child=''
    return "$exit_code"
}

# MODULE ARGUMENT...: in all ranks. They meet on the first node, which knows that it is the one by its number: torch asks
# for names, and a node may have several, or take its own for its loopback.
in_ranks() {
    local port
    port=$(free_port) || return 1
    # shellcheck disable=SC2016
    on_each_node bash -c 'exec "$0" -m torch.distributed.run --rdzv-conf="is_host=$((SLURM_NODEID == 0))" "$@"' \
        "$python" --nnodes="$SLURM_NNODES" --nproc-per-node="$ranks" --rdzv-id="$SLURM_JOB_ID-$restart" \
        --rdzv-backend=c10d --rdzv-endpoint="$address:$port" \
        --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout="$warn" -m "$@"
}

# Put the job back into the queue, unless it was told to stop, is being cancelled, or has come back often enough.
put_back() { # WHY
    if [[ -e $launch/stop ]]; then
        say "$1; told to stop, so it is not put back into the queue"
    elif ! state=$(slurm squeue --noheader --jobs="$job" --format=%T); then
        say "$1; Slurm does not answer: submitting it again goes on"
    elif [[ $state != RUNNING ]]; then
        say "$1; the job is being ended from outside, so it is not put back into the queue"
    elif ((restart >= restarts)); then
        say "$1; restarted $restart times, at most $restarts are allowed: submitting it again goes on"
    else
        say "$1; back into the queue"
        slurm scontrol requeue "$job" && exit 0
        say "scontrol requeue failed: submitting it again goes on"
    fi
    exit 99
}

# After a failure: was it the cluster's? Slurm repeats what it could not tell a crashed node's step, by the step's number,
# and the job's next attempt has the same. A task that was killed before any other had ended by itself was killed from
# outside: once one has failed, srun ends the others. And does every node still run what it is given? Slurm notices a
# crashed one only after minutes.
put_back_unless_its_own() { # EXIT_CODE
    if (($1 == 128 + 9 || $1 == 128 + 15)) && awk '/^srun: error: .*: tasks? [-0-9,]+: / {
        found = /: (Killed|Terminated)$/; exit } END { exit !found }' <(tail -c "+$((since + 1))" "$log"); then
        put_back "killed from outside"
    fi
    if ((SLURM_NNODES == 1)); then return; fi # this script runs there
    for _ in 1 2; do
        timeout -k 10 60 srun --overlap --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 true &&
            return
        sleep 5
    done
    put_back "a node does not answer"
}

if [[ -n $scratch ]]; then
    export NULSQ_SCRATCH="$scratch"
    on_each_node "$python" -m launch.stage "$data" "$scratch"
    ended=$?
    if [[ -n $asked ]]; then put_back "not begun"; fi
    if ((ended)); then
        put_back_unless_its_own "$ended"
        say "the data could not be copied to $scratch: see $folder/$SLURM_JOB_ID-*.log"
        exit 1
    fi
fi

if ((preflight)); then
    in_ranks launch.preflight "${look[@]}" --report "$folder/preflight-$SLURM_JOB_ID-$restart.json"
    ended=$?
    if [[ -n $asked ]]; then put_back "not begun"; fi
    if ((ended)); then
        put_back_unless_its_own "$ended"
        say "preflight failed: see $folder/$SLURM_JOB_ID-*.log"
        exit 4
    fi
    say "preflight passed"
fi
if ((preflight_only)); then exit 0; fi

# ---- a search on a Ray of this job's own: launch/scripts/ray.sh
# `ray symmetric-run` would do less: it hides its errors, passes no signal on and ends every Ray of this user's.

ray=("$python" -c 'import sys; from ray.scripts.scripts import main; sys.exit(main())')

# Ray's servers listen on every interface whatever one sets: they demand a token, made for this job.
RAY_TMPDIR=$(mktemp -d /tmp/nulsq-XXXXXX) || exit 1 # a short path: sockets lie below it
unset RAY_AUTH_TOKEN RAY_ADDRESS
export RAY_TMPDIR RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token-$SLURM_JOB_ID"
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH") || exit 1
common=(--block --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="$gpus" --object-store-memory=268435456 --disable-usage-stats)

port=$(free_port) || exit 1
parts=() # processes that have to live as long as the search
finish() {
    local part step
    # srun makes SIGKILL of a SIGTERM, and Ray's processes outlive that: they are told by scancel.
    step=$(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format='%i %j' | sed -n 's/ *ray-nodes *$//p')
    if [[ -n $step ]]; then scancel --signal=TERM "$step"; fi
    if ((${#parts[@]})); then kill -TERM "${parts[0]}" 2>/dev/null; fi
    for part in "${parts[@]}"; do
        for _ in {1..60}; do kill -0 "$part" 2>/dev/null && sleep 0.5; done
        kill -KILL "$part" 2>/dev/null
    done
    if ((SLURM_NNODES > 1)); then
        timeout 60 srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 rm -rf "$RAY_TMPDIR"
    fi
    rm -rf "$RAY_AUTH_TOKEN_PATH" "$RAY_TMPDIR"
}
trap finish EXIT
gone='' # the exit code of the part that ended first
all_live() {
    local part
    for part in "${parts[@]}"; do
        if ! kill -0 "$part" 2>/dev/null; then
            wait "$part"
            gone=$?
            return 1
        fi
    done
}

"${ray[@]}" start --head --node-ip-address="$address" --port="$port" --ray-client-server-port="$((port + 1))" \
    --dashboard-port="$((port + 2))" --dashboard-agent-listen-port="$((port + 3))" --dashboard-host="$listen" \
    --temp-dir="$RAY_TMPDIR" "${common[@]}" >>"$folder/$SLURM_JOB_ID-ray-head-$first.log" 2>&1 &
parts+=($!)
tries=0
until (exec 3<>"/dev/tcp/$address/$port") 2>/dev/null; do
    if ! all_live || ((++tries > 240)); then
        say "Ray's head did not start on $first: see $folder/$SLURM_JOB_ID-ray-head-$first.log"
        exit 1
    fi
    sleep 0.5
done
if ((SLURM_NNODES > 1)); then
    since_now
    srun --nodes="$((SLURM_NNODES - 1))" --ntasks="$((SLURM_NNODES - 1))" --ntasks-per-node=1 --exclude="$first" \
        --kill-on-bad-exit=1 --open-mode=append --output="$logs/$SLURM_JOB_ID-ray-%n-%N.log" --job-name=ray-nodes \
        "${ray[@]}" start --address="$address:$port" "${common[@]}" &
    parts+=($!)
fi
if [[ -n $asked ]]; then
    finish
    put_back "not begun"
fi

# --extend is for a search that has finished: a job that comes back has said it already.
if [[ ! -e $run/finished ]]; then
    kept=()
    for ((i = 0; i < ${#arguments[@]}; i++)); do
        case ${arguments[i]} in
        --extend) ((i++)) ;;
        --extend=*) ;;
        *) kept+=("${arguments[i]}") ;;
        esac
    done
    arguments=("${kept[@]}")
fi

"$python" -m tune.search "${arguments[@]}" address="$address:$port" nodes="$SLURM_NNODES" &
child=$!
if [[ -n $asked ]]; then kill -USR1 "$child" 2>/dev/null; fi
lost=''
while kill -0 "$child" 2>/dev/null; do
    if [[ -z $lost ]] && ! all_live; then
        lost=1
        say "a part of Ray has ended: see $folder/$SLURM_JOB_ID-ray-*.log; the search is asked to stop"
        kill -USR1 "$child" 2>/dev/null
    fi
    sleep 1 &
    wait $!
done
wait "$child"
ended=$?
child=''
finish # before the job may go back into the queue: Slurm gives it few seconds then
trap - EXIT
say "the search ended with exit code $ended"
if [[ -n $lost ]]; then
    put_back_unless_its_own "$gone"
    exit 1
fi
if ((ended == 99)); then put_back saved; fi
if [[ -n $asked ]] && ((ended == 138)); then put_back "not begun"; fi # the signal came before Python could take it
exit "$ended"
