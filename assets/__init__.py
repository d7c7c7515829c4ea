"""In which order things are made: Dagster assets and their checks, each a thin call into the other packages.

No rule of the data and no client lives here; `from __future__ import annotations` must not appear in this package,
because Dagster reads the annotations of asset functions.
"""
