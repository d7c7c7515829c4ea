"""Answering questions about an image: question to program (writers), program to answer (interpreter), and how well.

The encoders that see are in training/encoders.py; nothing here is learned.
"""
