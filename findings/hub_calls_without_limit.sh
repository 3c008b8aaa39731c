#!/usr/bin/env bash
# huggingface_hub 2.4.0: some calls wait for ever for a server that takes them and does not answer.
#
# Input: a server on this machine that accepts connections and says nothing, as HF_ENDPOINT; each
# call has 40 seconds in a process of its own.
# Seen with huggingface_hub 2.4.0:
#   dataset_info ended
#   auth_check waited
#   list_repo_tree waited
# Source: default_client_factory in huggingface_hub/utils/_http.py makes the shared client with
# timeout=None; HfApi.auth_check gives its call no timeout of its own, and list_repo_tree hands
# timeout=None on to it by name, which counts more than the timeout of a client from
# set_client_factory.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet huggingface_hub==2.4.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON' | tee seen
import os
import socket
import subprocess
import sys

CALLS = {
    "dataset_info": "HfApi().dataset_info('org/name', timeout=5)",
    "auth_check": "HfApi().auth_check('org/name', repo_type='dataset')",
    "list_repo_tree": "list(HfApi().list_repo_tree('org/name', repo_type='dataset'))",
}
with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    for name, call in CALLS.items():
        code = f"from huggingface_hub import HfApi\n{call}"
        try:
            subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, "HF_ENDPOINT": address, "HF_HOME": "home"},
                stderr=subprocess.DEVNULL,
                timeout=40,
                check=False,
            )
            print(name, "ended")
        except subprocess.TimeoutExpired:
            print(name, "waited")
PYTHON
grep -qx "dataset_info ended" seen && grep -qx "auth_check waited" seen
grep -qx "list_repo_tree waited" seen
