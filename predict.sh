#!/bin/sh
# Segments every CT in the inputs folder: `sh predict.sh [INPUTS] [OUTPUTS] [options]`, in the image and from a checkout alike.
# The caller's folder stays the current one, so that relative paths mean what the caller typed.
# -P keeps that folder off Python's path: an `inference/` that happens to lie there is not ours.
here=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "$0")")" && pwd) || exit 1
if [ -d "$here/.venv/bin" ]; then PATH="$here/.venv/bin:$PATH"; fi
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec python -P -m inference "$@"
