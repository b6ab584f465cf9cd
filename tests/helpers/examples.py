"""How many examples hypothesis tries: few by default, all in the gate."""

import os
from typing import Any

from hypothesis import settings

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "fast")
FEWEST = 10


def examples(count: int, **options: Any) -> settings:
    """Settings of a property: `count` examples in the profile `deep`, a quarter in `fast`."""
    if PROFILE == "fast":
        count = min(count, max(FEWEST, count // 4))
    return settings(max_examples=count, **options)
