"""For other programs: the evaluation kits lmms-eval and VLMEvalKit, and Ray Data pipelines.

Each module imports its package only when it is used.
"""

from typing import Any


def lmms_eval_manifest() -> Any:
    """The manifest for lmms-eval's entry point group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    module = "llava_lite.integrations.lmms_eval"
    return ModelManifest(
        model_id="llava_lite",
        simple_class_path=f"{module}.LlavaLite",
        chat_class_path=f"{module}.LlavaLiteChat",
        aliases=("llava-lite",),
    )
