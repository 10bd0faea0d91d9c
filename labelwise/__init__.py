"""Label-efficient image classification: pretrain on your images, compare honestly on few labels.

Names are imported on first use, so that `import labelwise` does not wait for torch.
"""

import os
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labelwise.config import FinetuneSettings, PretrainSettings, StudySettings
    from labelwise.errors import LabelwiseError
    from labelwise.models.weights import load_encoder
    from labelwise.stages.pretraining import pretrain
    from labelwise.stages.repeating import finetune
    from labelwise.stages.reporting import report
    from labelwise.stages.scanning import scan
    from labelwise.studies.studying import study

_HOMES = {
    "FinetuneSettings": "labelwise.config",
    "LabelwiseError": "labelwise.errors",
    "PretrainSettings": "labelwise.config",
    "StudySettings": "labelwise.config",
    "finetune": "labelwise.stages.repeating",
    "load_encoder": "labelwise.models.weights",
    "pretrain": "labelwise.stages.pretraining",
    "report": "labelwise.stages.reporting",
    "scan": "labelwise.stages.scanning",
    "study": "labelwise.studies.studying",
}

os.environ.setdefault(
    "HF_HUB_DISABLE_TELEMETRY", "1"
)  # read when `datasets` or timm is imported; nobody is told who runs us
__version__ = version("labelwise")
__all__ = [
    "FinetuneSettings",
    "LabelwiseError",
    "PretrainSettings",
    "StudySettings",
    "__version__",
    "finetune",
    "load_encoder",
    "pretrain",
    "report",
    "scan",
    "study",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'labelwise' has no attribute '{name}'")
