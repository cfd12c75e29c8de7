
# ---- a run: launch/scripts/train.sh

outcome_version() { stat --format='%i %z' "$run/outcome.json" 2>/dev/null; }
before=$(outcome_version)
in_ranks nulsq.train "${arguments[@]}"
exit_code=$?

# torchrun turns every non-zero exit code of its ranks into 1. The run's outcome.json decides, if this attempt wrote it.
outcome=''
if [[ $(outcome_version) != "$before" ]]; then outcome=$("$python" -m launch.batch outcome "$run"); fi
say "ended with exit code $exit_code, outcome ${outcome:-not written}"
if [[ $outcome == saved ]]; then requeue saved; fi
if [[ -n $stopping && -z $outcome ]]; then requeue "not started"; fi
if ((exit_code)) && [[ $outcome != diverged ]]; then requeue_after_cluster_failure "$exit_code"; fi
exit "$exit_code"
