"""Region partitions: the one dynamic partition set of the asset graph.

What a region is, its key and its projection, is in regions.py.
"""

import dagster as dg

#: Keys are region keys such as N42W072; `regions` adds them, nothing removes them.
REGION_PARTITIONS = dg.DynamicPartitionsDefinition(name="region")

#: Everything that gathers all regions: training sets and what follows.
ALL_REGIONS = dg.AllPartitionMapping()
