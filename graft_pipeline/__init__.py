"""What GRAFT means: regions, photos, tiles, scenes, pairs, and the rules between them.

Nothing here calls a service, loads torch or earthengine-api, or knows Dagster (but for the modules that
compose the asset graph and talk to its instance: definitions, partitions, automation, conditions, instance,
backfills, demo and the command line).
"""
