
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
