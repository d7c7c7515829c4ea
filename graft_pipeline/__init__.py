"""What GRAFT means: regions, photos, tiles, scenes, pairs, and the rules between them.

Nothing here calls a service, loads torch or earthengine-api, or knows Dagster (but for the modules that
compose the asset graph: definitions, partitions, automation, demo).
"""
