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

