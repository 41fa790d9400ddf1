#!/usr/bin/env bash
# The action's second step: check what the inputs name. SDSURGERY_PYTHON is the first step's Python; the inputs are in
# INPUT_PATH, INPUT_PROFILE and so on.
set -euo pipefail

# Names of files are anybody's: Python reads the lists and the patterns, no shell does.
exec "${SDSURGERY_PYTHON:?is the Python that the first step made}" -I -X utf8 "$(dirname "$0")/verify_weights.py"
