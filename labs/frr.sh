#!/bin/bash
# One FRR router for the supervisor: its daemons, configured, as one process that ends with any of
# them. Usage: frr.sh DIRECTORY, which belongs to the user frr and holds frr.conf.
set -eu
directory=$1
children=()
trap 'trap - TERM; kill "${children[@]}" 2>/dev/null; wait; exit 0' TERM INT
rm -f "$directory"/*.vty "$directory"/zserv.api "$directory"/*.pid
touch "$directory/vtysh.conf"
for name in zebra bfdd bgpd; do
    words=()
    if [ "$name" = bfdd ]; then words=(--bfdctl "$directory/bfdd.sock"); fi
    "/usr/lib/frr/$name" -P 0 -A 127.0.0.1 -f "$directory/none.conf" -i "$directory/$name.pid" \
        -z "$directory/zserv.api" --vty_socket "$directory" --log stdout "${words[@]}" &
    children+=($!)
    until [ -S "$directory/$name.vty" ]; do sleep 0.1; done
done
vtysh --vty_socket "$directory" --config_dir "$directory" -f "$directory/frr.conf"
wait -n
echo "a daemon of FRR ended"
kill "${children[@]}" 2>/dev/null || true
exit 1
