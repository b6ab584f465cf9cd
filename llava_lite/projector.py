"""The projector `mlp2x_gelu` (LLaVA-1.5, arXiv 2310.03744, section 3.2): image features -> embeds.

Shapes: U image tokens, C_v vision width, C decoder width.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from llava_lite.config import LlavaConfig


class Projector(nn.Module):
    """Linear layers with exact (erf) GELU in between; no norm, no residual."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        widths = [config.vision.hidden_size] + [config.text.hidden_size] * config.projector_depth
        self.layers = nn.ModuleList(
            nn.Linear(wide_in, wide_out)
            for wide_in, wide_out in zip(widths[:-1], widths[1:], strict=True)
        )

    def forward(self, image_features: Tensor) -> Tensor:
        """(..., U, C_v) -> (..., U, C)"""
        x = self.layers[0](image_features)
        for layer in self.layers[1:]:
            x = layer(F.gelu(x))
        return x
