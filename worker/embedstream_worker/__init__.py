"""From blocks to vectors: embed-worker and embed-search.

Model libraries report their use to their makers, and one fetches code by itself. Both are off here, before any of
them can be imported, in every process that imports this package.
"""

import os
import sys

os.environ |= {"USE_HUB_KERNELS": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}

# OpenVINO and NNCF ask for this module, and go on quietly where it is not installed.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
