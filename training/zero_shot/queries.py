"""Queries of the shared space: how words become the one vector that images are compared with.

What they are compared with is in graft_pipeline/search.py; sets of classes are in prompts.py.
"""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from graft_pipeline.errors import InputError
from training.encoders import Clip, encode_texts
from training.zero_shot.classify import class_embeddings
from training.zero_shot.prompts import PromptSet


def text_vector(clip: Clip, words: str) -> NDArray[np.float32]:
    """f_T of a few words, in the templates that every prompt set of words has.

    Args:
        clip: any model of the shared space.
        words: what is searched for, such as `solar farm`.

    Returns:
        (D,) float32, L2-normalised.

    Raises:
        InputError: if there are no words.
    """
    if not words.strip():
        raise InputError('Name what is searched for in words, such as "solar farm".')
    return class_embeddings(PromptSet.of_words([words.strip()]), partial(encode_texts, clip))[0]
