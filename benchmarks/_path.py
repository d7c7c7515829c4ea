"""Takes this folder off the import path, where training.py would hide the package of that name.

Import it before that package; a benchmark that needs other files of this folder imports them first.
"""

import sys
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent.resolve()]
