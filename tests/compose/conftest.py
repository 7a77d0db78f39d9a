"""What runs beside a container engine is collected there alone."""

from __future__ import annotations

import os

INSIDE = "GPUFARM_TEST_COMPOSE_INSIDE"

collect_ignore = [] if os.environ.get(INSIDE) else ["inside"]
