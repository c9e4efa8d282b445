#!/bin/sh
# Runs raybert in a submitted job, with a Python that has Ray. `python` on the PATH of the head may be
# another one than that of the Ray which runs this job: it is found by the library that this process's
# parents have loaded.

of_ray() {
    process=$PPID
    while [ "${process:-0}" -gt 1 ]; do
        sed -n 's#^.* \(/.*\)/lib/python[^/]*/[a-z]*-packages/ray/_raylet.so$#\1/bin/python#p' \
            "/proc/$process/maps" 2>/dev/null | head -n 1
        process=$(sed -n 's/^PPid:[^0-9]*//p' "/proc/$process/status" 2>/dev/null)
    done
}

for python in $(of_ray) python python3; do
    if "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("ray") is None)' 2>/dev/null
    then
        exec "$python" -u -m raybert "$@"
    fi
done
echo "raybert: no python on the cluster's head can import ray; put that of Ray on the PATH" >&2
exit 2
