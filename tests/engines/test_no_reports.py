"""Model libraries that report their use to their makers do not do so here, in any process that imports the worker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
import embedstream_worker

def forbid(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        print("REPORTS", event, args[1:], flush=True)

sys.addaudithook(forbid)
import huggingface_hub.constants
import openvino
import openvino.tools.ovc
import nncf
import transformers.integrations.hub_kernels as kernels
import torch
openvino.convert_model(torch.nn.Linear(2, 2), example_input=torch.zeros(1, 2))
print("off", huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY, not kernels._kernels_enabled)
"""


ASKED_FOR = {"DO_NOT_TRACK": "0", "HF_HUB_DISABLE_TELEMETRY": "0", "USE_HUB_KERNELS": "1"}


def test_nothing_is_sent_and_nothing_is_left_in_the_users_home_though_the_environment_asks_for_it(
    tmp_path: Path,
) -> None:
    reasons = ("CI", "NNCF_CI", "TF_BUILD", "JENKINS_URL")  # by which a library would be quiet of its own accord
    environment = {name: value for name, value in os.environ.items() if name not in reasons}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM],
        env=environment | {"HOME": str(tmp_path)} | ASKED_FOR,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "off True True"
    assert "REPORTS" not in done.stdout
    assert not (tmp_path / "intel").exists()
