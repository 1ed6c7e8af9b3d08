#!/bin/sh
# The container's first process: capd with the options given, and capd-release after it, however capd ended.
# A kill of the whole container ends this too; then the next start puts back what was left.
# PALS_CAPD_POLICY, PALS_CAPD_STATE: files elsewhere; PALS_CAPD_DRY_RUN=1: write nothing to boards.
set -u
policy=${PALS_CAPD_POLICY:-/etc/pals/capd.toml}
state=${PALS_CAPD_STATE:-/var/lib/pals-capd}
dry_run=${PALS_CAPD_DRY_RUN:+--dry-run}

capd= stopped=
tell() { [ -z "$capd" ] || kill "$1" "$capd" 2>/dev/null; }
trap 'stopped=1; tell -TERM' TERM INT
trap 'tell -HUP' HUP
python3 -m pals_capd.main --policy "$policy" --state "$state" $dry_run "$@" &
capd=$!
[ -z "$stopped" ] || tell -TERM
# A signal ends `wait` early; it is over when capd is gone.
while :; do
	wait "$capd"
	code=$?
	kill -0 "$capd" 2>/dev/null || break
done
python3 -m pals_capd.release --policy "$policy" --state "$state" $dry_run --wait 5
released=$?
[ "$code" -ne 0 ] || code=$released
exit "$code"
