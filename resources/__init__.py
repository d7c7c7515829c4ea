"""Who we call: Flickr, Earth Engine, image hosts, storage, and frozen models.

Each module holds one client over one maintained library; what the answers mean is decided in graft_pipeline.
"""
