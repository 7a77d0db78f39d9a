"""Print what pyproject.toml requires, and what the named extras do, one requirement a line.

The image installs these in a layer of their own, which a change of code leaves alone.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
print(*project["dependencies"], sep="\n")
for extra in sys.argv[1:]:
    print(*project["optional-dependencies"][extra], sep="\n")
