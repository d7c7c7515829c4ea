"""The search page: its HTTP application and its static files, the vendored map library among them.

What is searched is in search.py; models, storage and the planet's base map are handed in by the command line.
"""
