
# ---- a run: launch/scripts/train.sh

stamp() { stat --format='%i %z' "$run/outcome.json" 2>/dev/null; }
before=$(stamp)
in_ranks nulsq.train "${arguments[@]}"
ended=$?

# torchrun makes 1 of every exit code of its ranks: what the run itself wrote decides, if it wrote anything this time.
outcome=''
if [[ $(stamp) != "$before" ]]; then outcome=$("$python" -m launch.batch outcome "$run"); fi
say "ended with exit code $ended, outcome ${outcome:-not written}"
if [[ $outcome == saved ]]; then put_back saved; fi
if [[ -n $asked && -z $outcome ]]; then put_back "not begun"; fi
if ((ended)) && [[ $outcome != diverged ]]; then put_back_unless_its_own "$ended"; fi
exit "$ended"
