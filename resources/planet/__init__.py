"""The embedded planet: a synthetic world that answers Flickr's and Earth Engine's protocols on loopback.

The world itself is world.py; catalogue and protocols are in the modules beside it. The clients that speak
with it are the production ones, one package up. Nothing is imported here.
"""
