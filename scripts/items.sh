# Sourced by gpu_harvest.sh: runs named commands one after the other, each once and within its own time.
#
#   begin part1 470          the items of "part1", all of them within 470 seconds
#   item NAME SECONDS COMMAND...           (PATIENCE=4: four times that long)
#   finish                   a table; fails if an item did
#
# A command passes with 0 and is left out with 77, its last line saying why; neither runs again when the same items are
# begun again, all others do. One that is out of time is interrupted, 15 seconds later killed, with all it has started.
# $STATE/part1.tsv: name, status, seconds, last line, of every item that ended. $OUT/part1.log: what they printed. After
# every item the table so far, and whatever a function `keep` puts there, is in $OUT. DRY=1 only lists the items.
STATE=${STATE:-build/harvest}
OUT=${OUT:-$STATE}
GRACE=${GRACE:-15}

begin() {
  part=$1 budget=$2 names=() table=$STATE/$1.tsv log=$OUT/$1.log from=$SECONDS
  if [ -n "${DRY:-}" ]; then echo "$part: at most $budget s"; return; fi
  mkdir -p "$STATE" "$OUT"
  touch "$table" "$log"
}

item() {
  local name=$1 limit=$(($2 * ${PATIENCE:-1})) begun=$SECONDS left=$((budget - (SECONDS - from))) status last
  shift 2
  names+=("$name")
  if [ -n "${DRY:-}" ]; then printf '%-14s %4d s  %s\n' "$name" "$limit" "$(printf '%q ' "$@")"; return; fi
  if grep -qP "^$name\t(pass|skip)\t" "$table"; then echo "=== $name: done before"; return; fi
  limit=$((limit < left ? limit : left))
  if [ "$limit" -lt 1 ]; then record "$name" left 0 "no time was left: run $part again"; return; fi
  echo "=== $name (at most $limit s): $*" | tee -a "$log"
  timeout -s INT -k "$GRACE" "$limit" "$@" >"$log.item" 2>&1 </dev/null
  case $? in 0) status=pass ;; 77) status=skip ;; 124 | 137) status=timeout ;; *) status=FAIL ;; esac
  last=$(grep -v '^[[:space:]]*$' "$log.item" | tail -n 1 | tr -d '=\t' | cut -c 1-110)
  cat "$log.item" >>"$log"
  rm "$log.item"
  record "$name" "$status" $((SECONDS - begun)) "$last"
}

record() {
  grep -vP "^$1\t" "$table" >"$table.new"
  printf '%s\t%s\t%s\t%s\n' "$@" >>"$table.new"
  mv "$table.new" "$table"
  echo "=== $1: $2 after $3 s; $4" | tee -a "$log"
  if [ "$OUT" != "$STATE" ]; then cp "$table" "$OUT"; fi
  if declare -F keep >/dev/null; then keep; fi
}

finish() {
  local name status seconds last
  if [ -n "${DRY:-}" ]; then return; fi
  {
    printf '\n%s: %d s\n%-14s %-8s %5s  %s\n' "$part" $((SECONDS - from)) item status s "last line"
    for name in "${names[@]}"; do
      IFS=$'\t' read -r name status seconds last < <(grep -P "^$name\t" "$table")
      printf '%-14s %-8s %5d  %s\n' "$name" "$status" "$seconds" "$last"
    done
  } | tee -a "$log"
  ! grep -qP '^\S+\t(FAIL|timeout|left)\t' "$table"
}
