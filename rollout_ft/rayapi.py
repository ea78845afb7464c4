"""Ray, as an untyped thing: its own annotations are too incomplete to check against.

Owns nothing but the name. Imported only by actors, the command line and metrics.
"""

from __future__ import annotations

from typing import Any

import ray as _ray

ray: Any = _ray
