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

