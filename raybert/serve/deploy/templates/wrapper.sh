#!/bin/sh
# Ray starts this program as `PROGRAM -db -f FILE ...`.
{{ python }} -I {{ adapter }} "$3" {{ defaults }} {{ rules }} {{ table }} || exit 1
# HAProxy ends with the Ray process that started it, also when that one is killed; without this, it
# would keep the port.
guard="setpriv --pdeathsig TERM"
$guard true 2> /dev/null || guard=
exec $guard {{ binary }} "$@"
