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

title='search search-rn18'
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
preflight_arguments=(/runs/search-rn18/launch/code-0123456789ab/configs/recipes/imagenet/rn18_w2a2.yaml 'data.path="data/imagenet"' --devices=8 --disk=2 --bandwidth=5 'run.dir="/runs/search-rn18"' --independent)
arguments=(/runs/search-rn18/launch/code-0123456789ab/configs/search/imagenet_rn18.yaml trials=24 'recipe="/runs/search-rn18/launch/code-0123456789ab/configs/recipes/imagenet/rn18_w2a2.yaml"' 'name="imagenet_rn18"')
export NCCL_DEBUG=WARN

# ---- in every job: launch/scripts/signals.sh

say() { printf '%(%F %T)T  %s\n' -1 "$*"; }

# Slurm signals this script before the time limit (USR1), or when a job of higher priority takes its nodes (USR1 or
# TERM). The script forwards the first signal and waits: a second one would end the run at once.
stopping='' child=''
on_signal() {
    say "signal $1: the job saves and stops"
    if [[ -z $stopping && -n $child ]]; then kill -USR1 "$child" 2>/dev/null; fi
    stopping=1
}
trap 'on_signal USR1' USR1
trap 'on_signal TERM' TERM


# ---- in every job: launch/scripts/begin.sh

set -uo pipefail

# COMMAND: a busy controller does not answer, so Slurm's commands are tried several times.
slurm() {
    for _ in {1..6}; do
        "$@" && return
        sleep 5
    done
    return 1
}
job=$SLURM_JOB_ID # of one task; the last task of an array has the id of the whole array, so tasks are named by number
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi

restart=${SLURM_RESTART_COUNT:-0}
say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart $restart of at most $restarts: $title"
if ((restart > restarts)); then
    say "restarted $restart times, at most $restarts are allowed: giving up. Submit it again to continue"
    slurm scontrol update JobId="$job" Requeue=0
    exit 1
fi
if [[ -e $launch/stop ]]; then
    say "a stop was requested before the job started"
    exit 99
fi

# The snapshot comes first; the folder that the job was submitted from comes last, for a plug-in in it.
export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}:$PWD" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not take it from sbatch since Slurm 22.05
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((SLURM_CPUS_ON_NODE > ranks ? SLURM_CPUS_ON_NODE / ranks : 1))}"
if [[ -n $interface ]]; then export NCCL_SOCKET_IFNAME="$interface" GLOO_SOCKET_IFNAME="$interface"; fi

env | LC_ALL=C sort | grep -E '^(SLURM|CUDA|NCCL|GLOO|OMP|RAY|TORCH|NULSQ|PYTHON|LD_LIBRARY_PATH|LOADEDMODULES|PATH)' |
    grep -viE '^[^=]*(token|secret|password|key|jwt)' >"$folder/environment-$SLURM_JOB_ID.txt"

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) # this script runs there
address=$("$python" -m launch.batch address \
    "$(slurm scontrol show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)") || exit 1
free_port() { "$python" -m launch.batch port "$SLURM_CLUSTER_NAME-$SLURM_JOB_ID-$restart"; } # call it right before use

# PROCESS: wait until it ends, also if signals interrupt the waiting. Returns its exit code.
await() {
    while kill -0 "$1" 2>/dev/null; do wait "$1"; done
    wait "$1"
}

# srun reports ended tasks into this job's own log. `mark_step` remembers where the next step's part starts.
log=$(readlink -f "/proc/$$/fd/2") step_start=0
mark_step() { step_start=$(stat --format=%s "$log" 2>/dev/null || echo 0); }

# COMMAND: run it once on every node, with a log for each node. Does nothing after a signal.
on_each_node() {
    if [[ -n $stopping ]]; then return 143; fi
    mark_step
    srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=60 \
        --open-mode=append --output="$logs/$SLURM_JOB_ID-%n-%N.log" "$@" &
    child=$!
    if [[ -n $stopping ]]; then kill -USR1 "$child" 2>/dev/null; fi
    await "$child"
    local exit_code=$?
    child=''
    return "$exit_code"
}

# MODULE ARGUMENT...: run it in all ranks. Their rendezvous is on the first node, which is recognized by its number:
# torch would compare host names, but a node may have several names, or resolve its own to loopback.
in_ranks() {
    local port
    port=$(free_port) || return 1
    # shellcheck disable=SC2016
    on_each_node bash -c 'exec "$0" -m torch.distributed.run --rdzv-conf="is_host=$((SLURM_NODEID == 0))" "$@"' \
        "$python" --nnodes="$SLURM_NNODES" --nproc-per-node="$ranks" --rdzv-id="$SLURM_JOB_ID-$restart" \
        --rdzv-backend=c10d --rdzv-endpoint="$address:$port" \
        --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout="$warn" -m "$@"
}

# REASON: put the job back into the queue, unless a stop was requested, it is being cancelled, or no restart is left.
requeue() {
    if [[ -e $launch/stop ]]; then
        say "$1; a stop was requested: not put back into the queue"
    elif ! state=$(slurm squeue --noheader --jobs="$job" --format=%T); then
        say "$1; Slurm does not answer: submit it again to continue"
    elif [[ $state != RUNNING ]]; then
        say "$1; the job is being cancelled: not put back into the queue"
    elif ((restart >= restarts)); then
        say "$1; restarted $restart times, at most $restarts are allowed: submit it again to continue"
    else
        say "$1; back into the queue"
        slurm scontrol requeue "$job" && exit 0
        say "scontrol requeue failed: submit it again to continue"
    fi
    exit 99
}

# EXIT_CODE: after a failure, put the job back into the queue if the cluster caused it. There are two such cases:
# A task was killed before any other task had ended by itself. When a task fails, srun ends the others, but later. A
# message that Slurm could not deliver to a crashed node is repeated when the node is back; it names the step by its
# number, which the job's next attempt uses again.
# A node does not answer. Slurm itself notices a crashed node only after minutes.
requeue_after_cluster_failure() {
    if (($1 == 128 + 9 || $1 == 128 + 15)) && awk '/^srun: error: .*: tasks? [-0-9,]+: / {
        killed = /: (Killed|Terminated)$/; exit } END { exit !killed }' <(tail -c "+$((step_start + 1))" "$log"); then
        requeue "killed from outside"
    fi
    if ((SLURM_NNODES == 1)); then return; fi # this script runs on that node
    for _ in 1 2; do
        timeout -k 10 60 srun --overlap --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 true &&
            return
        sleep 5
    done
    requeue "a node does not answer"
}

if [[ -n $scratch ]]; then
    export NULSQ_SCRATCH="$scratch"
    on_each_node "$python" -m launch.stage "$data" "$scratch"
    exit_code=$?
    if [[ -n $stopping ]]; then requeue "not started"; fi
    if ((exit_code)); then
        requeue_after_cluster_failure "$exit_code"
        say "the data could not be copied to $scratch: see $folder/$SLURM_JOB_ID-*.log"
        exit 1
    fi
fi

if ((preflight)); then
    in_ranks launch.preflight "${preflight_arguments[@]}" --report "$folder/preflight-$SLURM_JOB_ID-$restart.json"
    exit_code=$?
    if [[ -n $stopping ]]; then requeue "not started"; fi
    if ((exit_code)); then
        requeue_after_cluster_failure "$exit_code"
        say "preflight failed: see $folder/$SLURM_JOB_ID-*.log"
        exit 4
    fi
    say "preflight passed"
fi
if ((preflight_only)); then exit 0; fi

# ---- a search on a Ray of this job's own: launch/scripts/ray.sh
# `ray symmetric-run` is no substitute: it hides errors, forwards no signals and ends every Ray of the same user.

ray=("$python" -c 'import sys; from ray.scripts.scripts import main; sys.exit(main())')

# Ray's servers listen on every interface, which cannot be changed. They demand a token, which is made for this job.
RAY_TMPDIR=$(mktemp -d /tmp/nulsq-XXXXXX) || exit 1 # a short path, because the paths of sockets are limited
unset RAY_AUTH_TOKEN RAY_ADDRESS
export RAY_TMPDIR RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token-$SLURM_JOB_ID"
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH") || exit 1
common=(--block --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="$gpus" --object-store-memory=268435456 --disable-usage-stats)

port=$(free_port) || exit 1
parts=() # processes of Ray that must live as long as the search: the head, and srun with the other nodes
finish() {
    local part step
    # scancel ends the other nodes' Ray: srun turns SIGTERM into SIGKILL, which Ray's own child processes outlive.
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
part_exit_code='' # of the part that ended first
all_live() {
    local part
    for part in "${parts[@]}"; do
        if ! kill -0 "$part" 2>/dev/null; then
            wait "$part"
            part_exit_code=$?
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
    mark_step
    srun --nodes="$((SLURM_NNODES - 1))" --ntasks="$((SLURM_NNODES - 1))" --ntasks-per-node=1 --exclude="$first" \
        --kill-on-bad-exit=1 --open-mode=append --output="$logs/$SLURM_JOB_ID-ray-%n-%N.log" --job-name=ray-nodes \
        "${ray[@]}" start --address="$address:$port" "${common[@]}" &
    parts+=($!)
fi
if [[ -n $stopping ]]; then
    finish
    requeue "not started"
fi

# --extend needs a finished search. A job that comes back has extended it already, so the option is left out.
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
if [[ -n $stopping ]]; then kill -USR1 "$child" 2>/dev/null; fi
part_lost=''
while kill -0 "$child" 2>/dev/null; do
    if [[ -z $part_lost ]] && ! all_live; then
        part_lost=1
        say "a part of Ray has ended: see $folder/$SLURM_JOB_ID-ray-*.log; the search is stopped"
        kill -USR1 "$child" 2>/dev/null
    fi
    sleep 1 &
    wait $!
done
wait "$child"
exit_code=$?
child=''
finish # before the job may go back into the queue, because Slurm then leaves it only a few seconds
trap - EXIT
say "the search ended with exit code $exit_code"
if [[ -n $part_lost ]]; then
    requeue_after_cluster_failure "$part_exit_code"
    exit 1
fi
if ((exit_code == 99)); then requeue saved; fi
if [[ -n $stopping ]] && ((exit_code == 138)); then requeue "not started"; fi # the signal came before Python handled it
exit "$exit_code"
