"""The workbook's helpers: a folder a step, in the order of the walk; each imports only what stands before it.

core < checkpoints (00) < inputs (01) < sessions < patches (02) < export (03) < graphs (04) < engines (05) < chat (06)
< fast (07) < bench < standin < workbook < cli

Importing any of it keeps this process, and those that it starts, off the network.
"""

import os
import sys

__version__ = "0.1.0"

# Hugging Face's libraries ask the hub, and ONNX Runtime's wheel sends telemetry, unless told before they load.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", ORT_DISABLE_TELEMETRY="1")
# A notebook may have loaded them already: they have read the variables, and take the same from their modules.
if "huggingface_hub.constants" in sys.modules:
    vars(sys.modules["huggingface_hub.constants"])["HF_HUB_OFFLINE"] = True
if "onnxruntime" in sys.modules:
    sys.modules["onnxruntime"].disable_telemetry_events()
