"""What an aligned encoder can do without labels: classify, retrieve and segment by text, and how well.

Everything here takes embeddings; they are made in training/encoders.py.
"""
