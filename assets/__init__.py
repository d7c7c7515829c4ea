"""In which order things are made: Dagster assets and their checks, each a thin call into the other packages.

No rule of the data and no client lives here. Annotations stay objects (no postponed evaluation): Dagster reads them.
"""

import warnings

import dagster as dg

# Features that we use knowingly and that constraints.txt pins: owners of jobs, checks per partition, and what Pipes
# itself uses.
warnings.filterwarnings("ignore", message="Parameter `owners`", category=dg.BetaWarning)
warnings.filterwarnings("ignore", message="Specifying a partitions_def on", category=dg.PreviewWarning)
warnings.filterwarnings("ignore", message="Function `PipesMessageReader", category=dg.PreviewWarning)
