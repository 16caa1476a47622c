#!/usr/bin/env bash
# Installs a wheel into an empty environment, and uses it from an empty folder: help, training on
# the packaged configuration, an answer of that adapter, the demo. It needs the package index only.
#
#   scripts/check_wheel.sh dist/moe_jax-0.2.0-py3-none-any.whl [python3.12]
set -euo pipefail

wheel=$(realpath "$1")
python=${2:-python3}
largest=$((3 * 1024 * 1024)) # bytes

size=$(stat -c %s "$wheel")
echo "$(basename "$wheel"): $size bytes, $("$python" --version)"
if [ "$size" -gt "$largest" ]; then
    echo "the wheel is larger than $largest bytes: what was added to moe_jax/?" >&2
    exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/environment"
mkdir "$work/empty"
cd "$work/empty"
# Nothing of a checkout, and no cache of an earlier run, is in reach.
unset PYTHONPATH
export PATH="$work/environment/bin:$PATH" XDG_CACHE_HOME="$work/cache" HF_HUB_OFFLINE=1
run() {
    echo "\$ $*"
    "$@"
}

run pip install --quiet "$wheel"
run pip check
file=$(python -c 'import moe_jax; print(moe_jax.__file__)')
case $file in
    "$work"/environment/*) ;;
    *) echo "moe_jax was imported from $file, not from the wheel" >&2 && exit 1 ;;
esac
run moe-jax --version
run moe-jax --help
run moe-jax demo --only-data
run moe-jax train --config demo_output/tiny_mixlora.py --config.training.steps=60
run moe-jax generate --adapter runs/tiny_mixlora --prompt $'Write the opposite.\n\nhot\n\n'
run moe-jax demo
pip list 2> /dev/null | grep -E '^(jax|jaxlib|flax|optax|orbax-checkpoint|transformers|numpy) '
echo "the wheel works with $(python --version)"
